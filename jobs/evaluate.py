"""Evaluate a saved model on a data set, or put a training's folds together, into the paper's tables.

python jobs/evaluate.py --model REF --out DIR --dataset stacks|mosmed|covid20|manifest --data URI
python jobs/evaluate.py --model REF --out DIR --images DIR --masks DIR
python jobs/evaluate.py --model STORAGE/EXPERIMENT-KEY --out DIR

REF is models:/NAME@ALIAS, models:/NAME/VERSION, or the path or URI of a saved model; of a training it is the folder
that jobs/train.py names at its end, whose folds were evaluated on their own test parts. A mask is the image's name with
_lung-infection (0 background, 1 lung, 2 lesion) or _mask (lesion). Writes metrics.json and metrics.csv, tables.md, a
CSV and a plot per table, rows.parquet, and pictures of the cases (a training's lie with its folds).

A volume that is refused, that storage does not give or that meets a fault of this software does not stop the others;
the last line of the log counts them. Exit codes:

0  done; refused volumes are in the data report above the tables
2  usage
3  refused to start
4  done, but for volumes that storage did not give or that met a fault of this software: the figures lack them
1  anything else; the same command continues
"""

import argparse
import csv
import io
import json
import logging
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import ray
from cluster import check_tracking, connect, parser, place, start_logging

from covtanet import storage, tracking
from covtanet.data import stacks
from covtanet.data.datasets import DATASETS, read_volumes, root_of
from covtanet.data.labels import LabelledVolume
from covtanet.data.prepared import PreparedVolume
from covtanet.errors import CheckpointError, ConfigError
from covtanet.evaluation import figures, rows
from covtanet.evaluation.pipeline import Evaluated, Task, evaluate_each
from covtanet.inference.predictor import window_of
from covtanet.model.checkpoint import SavedModel, load_model
from covtanet.report import data_report, plots
from covtanet.report.tables import Table, paper_tables
from covtanet.training import experiment
from covtanet.training.distributed import prepare_volumes

logger = logging.getLogger("covtanet.evaluate")

SECOND_DATA_SET = ("stacks", "covid20", "images")
DEFAULT_STEP_MM = 2.5
# What is no fault of a volume, so that the figures lack one that belongs to them.
FAILURES = ("storage", "internal_error")


def add_data_options(options: argparse.ArgumentParser) -> None:
    """What a model is evaluated on, alike for evaluation and promotion."""
    options.add_argument("--dataset", choices=DATASETS, help="layout of the data set")
    options.add_argument("--data", help="folder or s3:// prefix of the data set")
    options.add_argument("--images", help="folder of NIfTI images, instead of --dataset and --data")
    options.add_argument("--masks", help="folder of their masks")
    options.add_argument("--storage", help="where prepared volumes are kept, as for training")


def parse() -> argparse.Namespace:
    """Read the command line."""
    options = parser(__doc__)
    options.add_argument(
        "--model", required=True, help="models:/..., a saved model, or a training's folder"
    )
    options.add_argument("--out", required=True, help="folder or s3:// prefix for what is written")
    add_data_options(options)
    return options.parse_args()


def main() -> int:
    """Run the job; what refuses to start is told in one line."""
    arguments = parse()
    start_logging()
    try:
        return run(arguments)
    except (ConfigError, CheckpointError) as error:
        logger.error("%s", error)
        return 3
    except OSError as error:
        logger.error("storage: %s", type(getattr(error, "cause", None) or error).__name__)
        return 1
    except ray.exceptions.RayError as error:  # its text may name a study
        logger.error(
            "Ray: %s; the same command continues",
            type(getattr(error, "cause", None) or error).__name__,
        )
        return 1
    finally:
        ray.shutdown()


def run(arguments: argparse.Namespace) -> int:
    """Collect rows, derive every figure, write tables and pictures."""
    check_tracking()
    out = place(arguments.out, "--out")
    is_registered = arguments.model.startswith("models:")
    ref = arguments.model if is_registered else place(arguments.model, "--model")
    outcomes: Counter[str] = Counter()
    is_training = not is_registered and storage.exists(storage.join(ref, experiment.CONFIG))
    if is_training:
        described = json.loads(storage.read_bytes(storage.join(ref, experiment.CONFIG)))
        dataset, found = described["config"]["dataset"], experiment.evaluation_rows(ref)
        about = {"training": described["key"], "data_digest": described["data_digest"]}
        measured_on = f"experiment {described['name']}, {described['data']} ({dataset}), test parts of its folds"
    else:
        dataset, labelled, root = volumes_of(arguments)
        with tempfile.TemporaryDirectory() as folder:
            resolved = tracking.resolve_model(ref, Path(folder))
            model = load_model(resolved.folder, resolved.digest)
        connect()
        prepared_uri = storage.join(
            place(arguments.storage, "--storage") if arguments.storage else out, "prepared"
        )
        volumes, refused = prepare(model, labelled, root, prepared_uri)
        evaluated = predict(model, volumes, prepared_uri, storage.join(out, "pictures"))
        found, outcomes = evaluated.rows, count(refused, evaluated)
        seen = seen_volumes(model, volumes)
        known = None if seen is None else len(seen)
        about = {
            "model_digest": resolved.digest,
            "model_version": resolved.version,
            "num_volumes_trained_on": known,
        }
        told = (
            "unknown how many of them trained on"
            if known is None
            else f"{known} of them trained on"
        )
        measured_on = (
            f"{arguments.data or arguments.images} ({dataset}), {len(found)} volumes, {told}"
        )
        if known != 0:
            logger.warning("%s: these figures may flatter the model", told)
    if not found:
        raise ConfigError(
            "there is nothing to evaluate: no finished fold, or no volume with a mask or a grade"
        )
    write(out, found, about, measured_on, is_second_data_set=dataset in SECOND_DATA_SET)
    if is_training:
        write_pictures(out, ref, found)
    return concluded(outcomes)


def count(refused: list[PreparedVolume], evaluated: Evaluated) -> Counter[str]:
    """How many volumes were evaluated, and why the others were not."""
    reasons = [str(volume.reason) for volume in refused]
    kinds = [
        failure.partition(":")[0].partition(",")[0].replace(" ", "_")
        for failure in evaluated.failures.values()
    ]
    return Counter({"evaluated": len(evaluated.rows)}) + Counter([*reasons, *kinds])


def concluded(outcomes: Counter[str]) -> int:
    """Log the count of outcomes; return the exit code."""
    if outcomes:
        logger.info(
            "%s", ", ".join(f"{number} {outcome}" for outcome, number in sorted(outcomes.items()))
        )
    return 4 if set(outcomes) & set(FAILURES) else 0


def write_pictures(out: str, experiment_uri: str, found: list[dict[str, Any]]) -> None:
    """The networks side by side, where the training's models and prepared slices are still there."""
    try:
        picture = experiment.side_by_side(experiment_uri, found)
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


def volumes_of(arguments: argparse.Namespace) -> tuple[str, list[LabelledVolume], str]:
    """Name, volumes and root of the data set that the options ask for."""
    if arguments.images and arguments.masks:
        images, masks = place(arguments.images, "--images"), place(arguments.masks, "--masks")
        return "images", stacks.pair(images, masks), images
    if not arguments.dataset or not arguments.data:
        raise ConfigError("--dataset and --data are needed, or --images and --masks")
    data = place(arguments.data, "--data")
    return arguments.dataset, read_volumes(arguments.dataset, data), root_of(data)


def prepare(
    model: SavedModel, labelled: list[LabelledVolume], root: str, prepared_uri: str
) -> tuple[list[PreparedVolume], list[PreparedVolume]]:
    """Volumes as this model reads them, and those that are refused, with their reasons."""
    step_mm = model.preprocessing.slice_step_mm
    if step_mm is None:
        step_mm = DEFAULT_STEP_MM
    found = prepare_volumes(
        labelled, root, prepared_uri, window_of(model), step_mm, refuses_unread=True
    )
    print(data_report.as_text(found, ()), flush=True)
    refused = [volume for volume in found if volume.reason]
    for volume in refused:
        logger.warning("volume %s is refused: %s", volume.key, volume.reason)
    return [volume for volume in found if not volume.reason], refused


def predict(
    model: SavedModel, volumes: list[PreparedVolume], prepared_uri: str, pictures_uri: str
) -> Evaluated:
    """A model's rows; of one trained in phase 1 alone, only for volumes with a lesion mask."""
    diagnoses = model.capabilities.diagnoses
    task = Task(
        model=model,
        network=str(model.provenance.get("network", "V7")),
        fold=None,
        prepared_uri=prepared_uri,
        pictures_uri=pictures_uri,
        diagnoses=diagnoses,
        segments=model.capabilities.segments,
    )
    return evaluate_each(
        task, [volume for volume in volumes if diagnoses or volume.lesion_px is not None]
    )


def seen_volumes(model: SavedModel, volumes: list[PreparedVolume]) -> set[str] | None:
    """Source digests of the volumes that the model was trained or validated on; null where the model does not say."""
    if "seen_sources" not in model.provenance:
        return None
    seen = set(model.provenance["seen_sources"])
    return {
        str(volume.source_digest) for volume in volumes if str(volume.source_digest)[:16] in seen
    }


def write(
    out: str,
    found: list[dict[str, Any]],
    about: dict[str, Any],
    measured_on: str,
    *,
    is_second_data_set: bool,
) -> None:
    """All that an evaluation leaves."""
    summary = figures.summarise(found)
    tables = paper_tables(summary, measured_on, is_second_data_set=is_second_data_set)
    metrics = {**about, "measured_on": measured_on, "research_use_only": True, "networks": summary}
    text = "\n".join(table.as_markdown() for table in tables)
    files = {
        "metrics.json": (json.dumps(metrics, indent=1, sort_keys=True) + "\n").encode(),
        "tables.md": f"{text}\n{by_size(summary)}".encode(),
        "metrics.csv": flat_csv(summary).encode(),
        "rows.parquet": rows.to_parquet(found),
    }
    for table in tables:
        files |= table_files(table)
    for name, network in summary.items():
        judged = network["classification"]
        if judged["num_volumes"]:
            own = [row for row in found if row["network"] == name]
            files[f"{name}-confusion.png"] = plots.confusion(name, judged)
            files[f"{name}-roc.png"] = plots.roc(name, own, judged)
            files[f"{name}-reliability.png"] = plots.reliability(name, judged)
    for path, data in files.items():
        storage.write_bytes(storage.join(out, path), data)
    print(f"\n{text}\nwritten to {out}: {', '.join(sorted(files))}")


def table_files(table: Table) -> dict[str, bytes]:
    """A table as CSV and as a picture, named after its number."""
    name = re.sub(r"\W+", "-", table.title.partition(",")[0].lower())
    return {f"{name}.csv": table.as_csv().encode(), f"{name}.png": plots.bars(table)}


def flat_csv(summary: dict[str, Any]) -> str:
    """Every figure on a line of its own: network, its path in metrics.json, value; null as an empty field."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["network", "figure", "value"])

    def write_all(network: str, path: str, value: Any) -> None:
        if isinstance(value, dict | list):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for name, inner in items:
                write_all(network, f"{path}/{name}" if path else str(name), inner)
        else:
            writer.writerow([network, path, value])

    for network, figures_of_it in summary.items():
        write_all(network, "", figures_of_it)
    return out.getvalue()


def by_size(summary: dict[str, Any]) -> str:
    """Dice by the lesion's share of its slice, as Markdown."""
    lines = [
        "### Dice by lesion size",
        "",
        "| network | lesion of the slice | slices | Dice |",
        "|---|---|---|---|",
    ]
    for name, network in summary.items():
        for size in network["segmentation"].get("dice_by_lesion_size", ()):
            dice = "-" if size["dice"] is None else f"{100 * size['dice']:.1f}"
            span = f"{100 * size['above']:g}-{100 * size['to']:g} %"
            lines.append(f"| {name} | {span} | {size['num_slices']} | {dice} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
