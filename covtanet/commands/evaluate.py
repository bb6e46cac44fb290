"""Evaluate a saved model on a data set, or join a training's folds, into the paper's tables.

covtanet evaluate --model REF --out DIR --dataset LAYOUT --data URI
covtanet evaluate --model REF --out DIR --images DIR --masks DIR [--intensity grey8:LOW:HIGH]
covtanet evaluate --model STORAGE/EXPERIMENT-KEY --out DIR

REF is models:/NAME@ALIAS, models:/NAME/VERSION, or the path or URI of a saved model; of a training
it is the folder that `covtanet train` names at its end, whose folds were evaluated on their own
test parts. Volumes in HU are measured as screening would measure them, in pixels of their source,
with its lung mask and without; grey values without a line to HU at the network's input size. A mask
is the image's name with _lung-infection (0 background, 1 lung, 2 lesion) or _mask (lesion). Writes
metrics.json and metrics.csv, tables.md, a CSV and a plot per table, rows.parquet, and pictures of
the cases (a training's lie with its folds).

A volume that is refused, that storage does not give or that meets a fault of this software does
not stop the others; the log counts them at its end. `python jobs/evaluate.py` is the same command.

Exit codes:

0  done; refused volumes are in the data report above the tables
1  storage, Ray or this software failed; the same command continues
2  usage
3  refused to start
4  done, but the metrics lack volumes that storage did not give or that met a fault of this software
"""

import argparse
import logging
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from covtanet import storage, tracking
from covtanet.cluster import wait_for_gpus
from covtanet.data.datasets import DATASETS, DataSource, open_data, open_images
from covtanet.data.labels import check_intensity
from covtanet.data.prepared import PreparedVolume
from covtanet.errors import CheckpointError, ConfigError
from covtanet.evaluation.output import make_output
from covtanet.experiments import results
from covtanet.experiments.model_evaluation import (
    count_outcomes,
    describe_outcomes,
    has_failures,
    predict,
    prepare_for,
    seen_sources,
)
from covtanet.model.saved_model import SavedModel, load_model
from covtanet.report import data_report
from covtanet.runtime import (
    ExitCode,
    check_tracking,
    connect,
    location,
    parser,
    run_command,
)
from covtanet.shared_folders import check_shared

logger = logging.getLogger("covtanet.evaluate")

# Their results go to Table III, as those of the paper's Dataset-2.
SECOND_DATA_SET = ("stacks", "covid20", "images")


@dataclass(frozen=True, kw_only=True)
class Collected:
    """Rows of an evaluation and the data they were measured on."""

    rows: Sequence[dict[str, Any]]
    dataset: str
    about: Mapping[str, Any]
    """Identity of the model or experiment."""
    measured_on: str
    outcomes: Counter[str] = field(default_factory=Counter)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(run, parse(argv))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    options = parser(__doc__, "evaluate")
    options.add_argument(
        "--model", required=True, help="models:/..., a saved model, or a training's folder"
    )
    options.add_argument("--out", required=True, help="folder or s3:// prefix of the output")
    add_data_options(options)
    return options.parse_args(argv)


def add_data_options(options: argparse.ArgumentParser) -> None:
    """Add the options that name labelled data, the same for evaluation and promotion."""
    options.add_argument("--dataset", choices=DATASETS, help="layout of the data set")
    options.add_argument("--data", help="folder or s3:// prefix of the data set")
    options.add_argument("--images", help="folder of NIfTI images, instead of --dataset and --data")
    options.add_argument("--masks", help="folder of their masks")
    options.add_argument(
        "--intensity",
        default="auto",
        help="values of --images: hu, grey8:LOW:HIGH for grey values 0..255 with the HU of 0 and "
        "255, grey8 for an unknown line, or auto, which tells HU from grey8 (default)",
    )
    options.add_argument(
        "--storage", help="location in which prepared volumes are kept, as for training"
    )


def run(arguments: argparse.Namespace) -> int:
    """Collect rows, derive every metric, write tables and pictures."""
    check_tracking()
    out = location(arguments.out, "--out")
    ref = arguments.model
    if not ref.startswith("models:"):
        ref = location(ref, "--model")
    is_training = not ref.startswith("models:") and results.is_experiment(ref)
    collected = _collect_folds(ref) if is_training else _evaluate_model(ref, out, arguments)
    if not collected.rows:
        raise ConfigError(
            "there is nothing to evaluate: no finished fold, or no volume with a mask or a grade"
        )
    _write(out, collected)
    if is_training:
        _write_pictures(out, ref, collected.rows)
    return conclude(collected.outcomes)


def _collect_folds(experiment_uri: str) -> Collected:
    described = results.read_description(experiment_uri)
    return Collected(
        rows=results.evaluation_rows(experiment_uri),
        dataset=described.dataset,
        about={"training": described.key, "data_digest": described.data_digest},
        measured_on=f"experiment {described.name}, {described.data_uri} ({described.dataset}), "
        "test parts of its folds",
    )


def _evaluate_model(ref: str, out: str, arguments: argparse.Namespace) -> Collected:
    source = open_source(arguments)
    with tempfile.TemporaryDirectory() as folder:
        resolved = tracking.resolve_model(ref, Path(folder))
        model = load_model(resolved.folder, resolved.digest)
    connect()
    wait_for_gpus()
    folder_uri = location(arguments.storage, "--storage") if arguments.storage else out
    kept_uri = folder_uri if arguments.storage else ""
    check_shared(written={"--out": out, "--storage": kept_uri}, read=data_locations(arguments))
    prepared_uri = storage.join(folder_uri, "prepared")
    data = prepare_for(model, source, prepared_uri)
    print(data_report.as_text(data.all_volumes, ()), flush=True)
    pictures_uri = storage.join(out, "pictures")
    evaluated = predict(model, data.volumes, source, prepared_uri, pictures_uri)
    num_seen = _count_seen(model, data.volumes)
    seen = "unknown how many of them trained on"
    if num_seen is not None:
        seen = f"{num_seen} of them trained on"
    if num_seen != 0:
        logger.warning("%s: these metrics may flatter the model", seen)
    return Collected(
        rows=evaluated.rows,
        dataset=source.name,
        about={
            "model_digest": resolved.digest,
            "model_version": resolved.version,
            "num_volumes_trained_on": num_seen,
        },
        measured_on=f"{arguments.data or arguments.images} ({source.name}), "
        f"{len(evaluated.rows)} volumes, {seen}",
        outcomes=count_outcomes(data.refused, evaluated),
    )


def open_source(arguments: argparse.Namespace) -> DataSource:
    """Return the labelled volumes that the options name."""
    if arguments.images and arguments.masks:
        images = location(arguments.images, "--images")
        check_intensity(arguments.intensity)
        return open_images(images, location(arguments.masks, "--masks"), arguments.intensity)
    if not arguments.dataset or not arguments.data:
        raise ConfigError("--dataset and --data are needed, or --images and --masks")
    return open_data(arguments.dataset, location(arguments.data, "--data"))


def data_locations(arguments: argparse.Namespace) -> dict[str, str]:
    """Return the locations of labelled data, by the options that name them."""
    names = ("data", "images", "masks")
    given = {f"--{name}": getattr(arguments, name) for name in names}
    return {option: location(uri, option) for option, uri in given.items() if uri}


def _count_seen(model: SavedModel, volumes: Sequence[PreparedVolume]) -> int | None:
    """Return how many of the volumes the model was trained on; null if it does not say."""
    seen = seen_sources(model, volumes)
    return None if seen is None else len(seen)


def _write(out: str, collected: Collected) -> None:
    output = make_output(
        collected.rows,
        collected.about,
        collected.measured_on,
        is_second_data_set=collected.dataset in SECOND_DATA_SET,
    )
    for path, data in output.files.items():
        storage.write_bytes(storage.join(out, path), data)
    print(f"\n{output.text}\nwritten to {out}: {', '.join(sorted(output.files))}")


def _write_pictures(out: str, experiment_uri: str, rows: Sequence[dict[str, Any]]) -> None:
    """Write the networks side by side, if the models and prepared slices are still there."""
    try:
        picture = results.side_by_side(experiment_uri, rows)
    except (OSError, CheckpointError) as error:
        logger.warning(
            "no networks.png: models or prepared slices are gone, %s", type(error).__name__
        )
        return
    if picture:
        storage.write_bytes(storage.join(out, "networks.png"), picture)
        print(
            "networks.png: best, median and worst slice; green found, blue false alarm, red missed"
        )


def conclude(outcomes: Counter[str]) -> int:
    """Log the count of outcomes; return the exit code."""
    if outcomes:
        logger.info("%s", describe_outcomes(outcomes))
    return ExitCode.BELOW_BOUND if has_failures(outcomes) else ExitCode.DONE
