"""A training step of phase 1 by earlier settings and by those of recipes/lung-box.toml.

Earlier settings: MONAI's augmentation slice by slice, two micro-batches on one worker, which runs
each of them forward twice, memory returned to the system, and float32. Network, size and slices per
step are the same; the slices are noise. Every measurement has a process to itself, because the
handling of memory is chosen at its start.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import ROOT, Result, say
from covtanet.config import load_config
from covtanet.model.registry import build_segmenter
from covtanet.runtime import RETURN_MEMORY
from covtanet.training.augment import AugmentConfig, Augmenter
from covtanet.training.batch_augment import BatchAugmentConfig, BatchAugmenter
from covtanet.training.checkpoint import save_progress
from covtanet.training.config import TrainingConfig
from covtanet.training.feed import Rows, Sampling
from covtanet.training.loop import Progress, fit
from covtanet.training.phase1 import Augment, phase1
from covtanet.training.phase_config import PhaseConfig
from covtanet.training.pool import SamplePool
from covtanet.training.ranks import Ranks
from covtanet.training.trainer import KEEP_MEMORY

CPU = torch.device("cpu")
SLICES_PER_STEP = 8
NUM_STEPS = 2
# Processes per setting, which take turns.
NUM_TURNS = 3
# Recipes whose network and size are measured.
NETWORKS = {"lung-box": "V8, lung box of 256 pixels", "demo": "V7, small, 128 pixels"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a step that changed."""

    name: str
    augments_batches: bool = True
    micro_batches: int = 1
    keeps_memory: bool = True
    precision: str = "float32"


# Each has one change more than the one before.
SETTINGS = (
    Settings(name="earlier settings", augments_batches=False, micro_batches=2, keeps_memory=False),
    Settings(name="augmentation of whole batches", micro_batches=2, keeps_memory=False),
    Settings(name="and one micro-batch", keeps_memory=False),
    Settings(name="and memory kept"),
    Settings(name="and bfloat16", precision="bfloat16"),
)


def measure() -> list[Result]:
    """(u) steps by earlier and by new settings, of two networks."""
    return [row for recipe in NETWORKS for row in _measure_network(recipe)]


def _measure_network(recipe: str) -> list[Result]:
    """Measure all settings in turns; CPU time, which other work on the machine changes least."""
    spent: list[list[float]] = [[] for _ in SETTINGS]
    checkpoint_steps = []
    for turn in range(NUM_TURNS):
        for number, times in enumerate(spent):
            step_s, checkpoint_s = _run(recipe, number)
            times.append(step_s)
            checkpoint_steps.append(checkpoint_s / step_s)
        seconds = [round(times[-1], 2) for times in spent]
        say(f"{NETWORKS[recipe]}, turn {turn}: CPU seconds per step {seconds}")
    medians = [statistics.median(times) for times in spent]
    results = []
    for settings, step_s in zip(SETTINGS[1:], medians[1:], strict=True):
        what = f"{NETWORKS[recipe]}: steps per CPU second over {SETTINGS[0].name}, {settings.name}"
        # The bound is that of the settings that any CPU has; bfloat16 needs its instructions.
        bound = ">= 1.5 x" if settings.name == "and memory kept" else ""
        results.append(Result("u", what, f"{medians[0] / step_s:.2f} x", bound))
    what = f"{NETWORKS[recipe]}: a checkpoint on a local disk, now beside the training, in steps"
    results.append(Result("u", what, f"{statistics.median(checkpoint_steps):.2f}"))
    return results


def _run(recipe: str, number: int) -> tuple[float, float]:
    """Return the CPU seconds of a step and of a checkpoint, measured in another process."""
    memory = KEEP_MEMORY if SETTINGS[number].keeps_memory else RETURN_MEMORY
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.throughput", recipe, str(number)]
    environment = {**os.environ, **memory, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    )
    step_s, checkpoint_s = done.stdout.split()[-2:]
    return float(step_s), float(checkpoint_s)


def main() -> int:
    """Measure one setting in this process, print CPU seconds of a step and of a checkpoint."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("recipe", choices=NETWORKS)
    options.add_argument("settings", type=int, choices=range(len(SETTINGS)))
    arguments = options.parse_args()
    torch.set_num_threads(1)
    config = load_config(ROOT / "recipes" / f"{arguments.recipe}.toml").training
    training = _Training(config, SETTINGS[arguments.settings])
    # The first steps do not count: libraries load and memory is taken from the system.
    training.run()
    started = time.process_time()
    progress = training.run()
    step_s = (time.process_time() - started) / NUM_STEPS
    with tempfile.TemporaryDirectory() as folder:
        started = time.process_time()
        save_progress(Path(folder), progress)
        print(step_s, time.process_time() - started)
    return 0


class _Training:
    """A network and its samples; a run takes ``NUM_STEPS`` steps."""

    def __init__(self, config: TrainingConfig, settings: Settings) -> None:
        self.config = _phase_config(config, settings)
        sampling = Sampling(batch_size=self.config.batch_size)
        count = settings.micro_batches
        pool = SamplePool(_rows(config), sampling, count, config.num_neighbours)
        self.lanes: dict[int, Any] = {number: pool.lane(number) for number in range(count)}
        torch.manual_seed(0)
        module = build_segmenter(config.architecture.segnet)
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        loss = config.phase1_loss
        augment = _augment(settings)
        self.phase = phase1(module, module, self.config, loss, [], Ranks(), augment)

    def run(self) -> Progress:
        """Train one short epoch."""
        return fit(self.config, self.phase, self.lanes, Ranks(), 0, Progress(), lambda _: None)


def _rows(config: TrainingConfig) -> Rows:
    """Return noise as slices; each is a volume, so that neighbours are copies."""
    count = SLICES_PER_STEP * NUM_STEPS
    shape = (count, config.window.size_px, config.window.size_px)
    generator = np.random.default_rng(0)
    return {
        "name": np.array([f"v{index:03d}:00000" for index in range(count)]),
        "has_lesion": np.ones(count, bool),
        "levels": generator.integers(0, 65536, shape, dtype=np.uint16),
        "lesion": (generator.random(shape) > 0.9).astype(np.uint8),
    }


def _phase_config(config: TrainingConfig, settings: Settings) -> PhaseConfig:
    return replace(
        config.phase1,
        num_epochs=1,
        batch_size=SLICES_PER_STEP // settings.micro_batches,
        micro_batches=settings.micro_batches,
        precision=settings.precision,
    )


def _augment(settings: Settings) -> Augment:
    if settings.augments_batches:
        return BatchAugmenter(BatchAugmentConfig(is_on=True), CPU).whole
    return Augmenter(AugmentConfig(is_on=True))


if __name__ == "__main__":
    sys.exit(main())
