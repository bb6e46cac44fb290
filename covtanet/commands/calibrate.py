"""Measure a saved model in bfloat16 and in 8 bits, so that screening may use them.

covtanet calibrate --model REF --out DIR --images DIR --masks DIR
covtanet calibrate --model REF --out DIR --images DIR --masks DIR --test-images DIR --test-masks DIR

Of the patients in --images one in --every gives the slices from which the 8-bit ranges are taken.
All others, and those in --test-images, are screened in float32 and by each engine, in pixels of
their source. On a machine with a GPU its engines are measured, cuda-bf16 or cuda-fp16, else those
of the processor; differences of the other kind of engine stay, so that two calls measure both. The
model is written to --out with the differences; REF is not changed. Screening takes the fastest
engine that the machine has if the mean Dice fell by at most 0.005, the involvement differs by at
most 0.005 in the mean, and no rejection, diagnosis or severity changed; the other engines only if
they are asked for by name. Patients whom the model was not trained on give the fairer measure.

REF and the volumes are as for `covtanet evaluate`. 8 bits need `pip install 'covtanet[quantize]'`
(NNCF) for this command, not for screening. No Ray is started. `python jobs/calibrate.py` is the
same command.

Exit codes:

0  done
1  storage or this software failed
2  usage
3  refused to start: no such model, no volumes, NNCF missing, or the machine cannot give an engine
4  written, but an engine is outside the bounds: screening does not take it unasked
"""

import argparse
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from covtanet import tracking
from covtanet.data.datasets import DataSource, open_images
from covtanet.data.labels import check_intensity
from covtanet.errors import CheckpointError, ConfigError
from covtanet.experiments.calibration import (
    CALIBRATED,
    calibrate,
    default_engines,
    split_data,
)
from covtanet.machine import num_cores
from covtanet.model.description import EngineDifference
from covtanet.model.saved_model import load_model, save_model
from covtanet.report.summary import table
from covtanet.runtime import ExitCode, check_tracking, location, parser, run_command

logger = logging.getLogger("covtanet.calibrate")

NUM_SLICES = 150


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(run, parse(argv))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    options = parser(__doc__, "calibrate")
    options.add_argument("--model", required=True, help="models:/... or a saved model")
    options.add_argument("--out", required=True, help="folder of the calibrated model; must be new")
    for prefix, text in (("", "calibration and measure"), ("test-", "measure alone")):
        needed = not prefix
        options.add_argument(f"--{prefix}images", required=needed, help=f"images for {text}")
        options.add_argument(f"--{prefix}masks", required=needed, help="folder of their masks")
        options.add_argument(
            f"--{prefix}intensity", default="auto", help="as for covtanet evaluate"
        )
        options.add_argument(
            f"--{prefix}name",
            default=f"{prefix}images",
            help="name of the data set in model.json",
        )
    options.add_argument(
        "--engine",
        action="append",
        choices=CALIBRATED,
        help="engine to measure, may be repeated; default: all that this machine can give",
    )
    options.add_argument(
        "--every", type=int, default=3, help="one patient in so many for the ranges; default: 3"
    )
    options.add_argument(
        "--num-slices",
        type=int,
        default=NUM_SLICES,
        help=f"slices for the ranges; default: {NUM_SLICES}",
    )
    arguments = options.parse_args(argv)
    if bool(arguments.test_images) != bool(arguments.test_masks):
        options.error("--test-images and --test-masks belong together")
    if arguments.every < 1 or arguments.num_slices < 1:
        options.error("--every and --num-slices must be at least 1")
    return arguments


def run(arguments: argparse.Namespace) -> int:
    """Calibrate, measure, write the model."""
    check_tracking()
    out = Path(location(arguments.out, "--out"))
    if out.exists():
        raise ConfigError("--out exists; give a folder that does not, a model is written whole")
    ref = arguments.model
    if not ref.startswith("models:"):
        ref = location(ref, "--model")
    with tempfile.TemporaryDirectory() as folder:
        resolved = tracking.resolve_model(ref, Path(folder))
        model = load_model(resolved.folder, resolved.digest)
    if not model.capabilities.segments:
        raise CheckpointError("the model marks no lesions, so that no engine can be compared")
    engines = tuple(dict.fromkeys(arguments.engine or default_engines()))
    if not engines:
        raise ConfigError("this machine can give no engine below float32: no such instructions")
    sources = _open_sources(arguments)
    data = split_data(sources, arguments.every, arguments.test_name)
    # The CPUs that this process may use, which may be fewer than those of the machine.
    num_threads = num_cores()
    calibrated = calibrate(model, data, engines, arguments.num_slices, num_threads)
    digest = save_model(out, calibrated)
    measured = {name: calibrated.engines[name] for name in engines}
    lines = [(name, describe(difference)) for name, difference in measured.items()]
    print(table("Engines against float32", lines))
    print(f"\nwritten to {arguments.out}, digest {digest}")
    return conclude(measured)


def _open_sources(arguments: argparse.Namespace) -> Mapping[str, DataSource]:
    sources = {}
    for prefix in ("", "test_"):
        images, masks, intensity, name = (
            getattr(arguments, f"{prefix}{part}")
            for part in ("images", "masks", "intensity", "name")
        )
        if not images:
            continue
        option = prefix.replace("_", "-")
        check_intensity(intensity)
        images = location(images, f"--{option}images")
        masks = location(masks, f"--{option}masks")
        if name in sources:
            raise ConfigError(f"two data sets are named {name}; give them two names")
        sources[name] = open_images(images, masks, intensity)
    return sources


def describe(difference: EngineDifference) -> str:
    """Return the difference of an engine in one line."""
    verdict = "within the bounds" if difference.is_within_bounds else "OUTSIDE the bounds"
    return (
        f"{verdict}: Dice {_number(difference.mean_dice)} (float32 "
        f"{_number(difference.mean_dice_float32)}), involvement differs by "
        f"{_number(difference.mean_involvement_difference)} in the mean, "
        f"{_number(difference.max_involvement_difference)} at most, lesion volume x "
        f"{_number(difference.lesion_volume_ratio)}, {difference.num_status_changes} changes of "
        f"status, {difference.num_volumes} volumes with {difference.num_slices} slices"
    )


def _number(value: float | None) -> str:
    return "null" if value is None else f"{value:.4f}"


def conclude(engines: Mapping[str, EngineDifference]) -> int:
    """Log the engines that are outside the bounds; return the exit code."""
    outside = [name for name, value in engines.items() if not value.is_within_bounds]
    for name in outside:
        logger.warning("engine %s is outside the bounds: only by name", name)
    return ExitCode.BELOW_BOUND if outside else ExitCode.DONE
