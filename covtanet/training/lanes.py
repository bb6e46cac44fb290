"""Lanes of a worker: samples in memory if they fit, else read from storage every epoch. No Ray."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from covtanet.training.config import TrainingConfig
from covtanet.training.feed import Lane
from covtanet.training.phase_config import PhaseConfig
from covtanet.training.pool import SamplePool
from covtanet.training.sample_files import (
    ReadFile,
    SampleFile,
    read_features,
    read_slices,
    read_volume,
)
from covtanet.training.stream import NUM_READ_THREADS, SampleStream, join


def fit_in_memory(config: TrainingConfig, files: Iterable[SampleFile]) -> bool:
    """Return whether every worker may keep all samples of a phase."""
    return sum(file.num_bytes for file in files) <= config.cache_bytes


def training_lanes(
    config: TrainingConfig,
    phase: int,
    files: Sequence[SampleFile],
    numbers: Iterable[int],
    *,
    in_memory: bool,
) -> dict[int, Lane]:
    """Return some of a phase's training lanes by number.

    Lanes share one pool or stream, which mixes the volumes of all lanes.
    """
    samples: SamplePool | SampleStream
    settings = phase_config(config, phase)
    if in_memory:
        samples = _pool(config, phase, files, settings.micro_batches)
    else:
        samples = SampleStream(
            files,
            config.sampling(settings),
            _reader(config, phase),
            settings.micro_batches,
            settings.num_epochs,
            _num_neighbours(config, phase),
        )
    return {number: samples.lane(number) for number in numbers}


def validation_lanes(
    config: TrainingConfig, phase: int, lanes: Iterable[Sequence[SampleFile]], *, in_memory: bool
) -> list[Lane]:
    """Return lanes for validation. lanes: whole volumes of each; one without files is left out."""
    filled = [files for files in lanes if files]
    if in_memory:
        return [_pool(config, phase, files).lane() for files in filled]
    sampling = config.sampling(phase_config(config, phase))
    read = _reader(config, phase)
    num_neighbours = _num_neighbours(config, phase)
    return [
        SampleStream(files, sampling, read, num_neighbours=num_neighbours).lane()
        for files in filled
    ]


def phase_config(config: TrainingConfig, phase: int) -> PhaseConfig:
    """Return the settings of a phase."""
    return config.phase1 if phase == 1 else config.phase2


def _pool(
    config: TrainingConfig, phase: int, files: Sequence[SampleFile], num_lanes: int = 1
) -> SamplePool:
    with ThreadPoolExecutor(NUM_READ_THREADS) as pool:
        rows = join(pool.map(_reader(config, phase), files))
    sampling = config.sampling(phase_config(config, phase))
    single = frozenset(file.series for file in files if not file.is_continuous)
    return SamplePool(rows, sampling, num_lanes, _num_neighbours(config, phase), single)


def _num_neighbours(config: TrainingConfig, phase: int) -> int:
    # Phase 2's volumes have their neighbours already.
    return config.num_neighbours if phase == 1 else 0


def _reader(config: TrainingConfig, phase: int) -> ReadFile:
    if phase == 1:
        return partial(read_slices, size_px=config.window.size_px)
    if config.keeps_features:
        return read_features
    return partial(
        read_volume,
        num_slices=config.architecture.num_slices,
        num_neighbours=config.num_neighbours,
    )
