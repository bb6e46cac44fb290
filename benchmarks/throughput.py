"""A training step of phase 1 by earlier settings and by those of recipes/lung-box.toml.

Earlier settings: MONAI's augmentation slice by slice, two micro-batches on one worker, which runs
each of them forward twice, and float32. Network, size and slices per step are the same; the slices
are noise.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import ROOT, Result, say
from covtanet.config import load_config
from covtanet.model.registry import build_segmenter
from covtanet.training.augment import AugmentConfig, Augmenter
from covtanet.training.batch_augment import BatchAugmentConfig, BatchAugmenter
from covtanet.training.checkpoint import save_progress
from covtanet.training.config import TrainingConfig
from covtanet.training.feed import Rows, Sampling
from covtanet.training.loop import Phase, Progress, fit
from covtanet.training.phase1 import Augment, phase1
from covtanet.training.phase_config import PhaseConfig
from covtanet.training.pool import SamplePool
from covtanet.training.ranks import Ranks

CPU = torch.device("cpu")
SLICES_PER_STEP = 8
NUM_STEPS = 2
# The first turn does not count: libraries load and kernels are chosen.
NUM_TURNS = 4


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a step that changed."""

    name: str
    augments_batches: bool
    micro_batches: int
    precision: str


SETTINGS = (
    Settings(name="earlier settings", augments_batches=False, micro_batches=2, precision="float32"),
    Settings(
        name="augmentation of whole batches",
        augments_batches=True,
        micro_batches=2,
        precision="float32",
    ),
    Settings(
        name="and one micro-batch", augments_batches=True, micro_batches=1, precision="float32"
    ),
    Settings(name="and bfloat16", augments_batches=True, micro_batches=1, precision="bfloat16"),
)


def measure() -> list[Result]:
    """(u) steps by earlier and by new settings, of two networks."""
    torch.set_num_threads(1)
    recipe = load_config(ROOT / "recipes" / "lung-box.toml").training
    demo = load_config(ROOT / "recipes" / "demo.toml").training
    results = _measure_network("V8, lung box of 256 pixels", recipe)
    results += _measure_network("V7, small, 128 pixels", demo)
    return [*results, _measure_checkpoint(recipe)]


def _measure_network(name: str, config: TrainingConfig) -> list[Result]:
    """Measure all settings in turns; CPU time, which other work on the machine changes least."""
    rows = _rows(config)
    trainings = {settings.name: _training(config, settings, rows) for settings in SETTINGS}
    spent: dict[str, list[float]] = {label: [] for label in trainings}
    for turn in range(NUM_TURNS):
        for label, train in trainings.items():
            started = time.process_time()
            train()
            spent[label].append((time.process_time() - started) / NUM_STEPS)
        seconds = [round(times[-1], 2) for times in spent.values()]
        say(f"{name}, turn {turn}: CPU seconds per step {seconds}")
    step_s = {label: statistics.median(times[1:]) for label, times in spent.items()}
    first = step_s[SETTINGS[0].name]
    results = []
    for settings in SETTINGS[1:]:
        is_last = settings is SETTINGS[-1]
        text = f"{first / step_s[settings.name]:.2f} x"
        what = f"{name}: steps per CPU second over {SETTINGS[0].name}, {settings.name}"
        results.append(Result("u", what, text, ">= 1.5 x" if is_last else ""))
    return results


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


def _training(config: TrainingConfig, settings: Settings, rows: Rows) -> Callable[[], object]:
    """Return a work of ``NUM_STEPS`` steps."""
    phase_config = _phase_config(config, settings)
    sampling = Sampling(batch_size=phase_config.batch_size)
    pool = SamplePool(rows, sampling, settings.micro_batches, config.num_neighbours)
    lanes: dict[int, Any] = {number: pool.lane(number) for number in range(settings.micro_batches)}
    phase = _phase(config, phase_config, _augment(settings))
    return lambda: fit(phase_config, phase, lanes, Ranks(), 0, Progress(), lambda _: None)


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


def _phase(config: TrainingConfig, phase_config: PhaseConfig, augment: Augment) -> Phase[Any]:
    torch.manual_seed(0)
    module = build_segmenter(config.architecture.segnet)
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return phase1(module, module, phase_config, config.phase1_loss, [], Ranks(), augment)


def _measure_checkpoint(config: TrainingConfig) -> Result:
    """Measure writing a checkpoint, which earlier trainings waited for after every epoch."""
    settings = SETTINGS[-1]
    phase_config = _phase_config(config, settings)
    pool = SamplePool(_rows(config), Sampling(batch_size=SLICES_PER_STEP), 1, config.num_neighbours)
    phase = _phase(config, phase_config, _augment(settings))
    progress = fit(phase_config, phase, {0: pool.lane()}, Ranks(), 0, Progress(), lambda _: None)
    with tempfile.TemporaryDirectory() as folder:
        started = time.process_time()
        save_progress(Path(folder), progress)
        spent = time.process_time() - started
    steps = spent / progress.history[-1]["step_s"]
    what = "V8: writing a checkpoint locally, now beside the training, in steps"
    return Result("u", what, f"{steps:.2f}")
