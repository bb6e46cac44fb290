"""Order of an epoch's samples that are read from storage. numpy only.

Files are dealt out to the lanes anew every epoch. A lane reads its files in windows that fit in
memory and mixes the samples of a window. All of it follows from seed and epoch alone, so neither
the number of workers nor a restart changes a micro-batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from covtanet.training.feed import Sampling
from covtanet.training.sample_files import SampleFile


class Sample(NamedTuple):
    """A sample of a lane's epoch: its window, and its row in one of the window's files."""

    window: int
    file: int
    row: int


@dataclass(frozen=True, kw_only=True)
class LanePlan:
    """What a lane reads in an epoch, and in which order it takes the samples."""

    windows: list[list[int]]
    """Files of each window, as indices of all files."""
    batches: list[list[Sample]]


@dataclass(frozen=True, kw_only=True)
class EpochPlan:
    """Files and steps of an epoch."""

    files: list[list[int]]
    """Of each lane, in the order of reading; indices of all files."""
    rows: list[list[int]]
    """Drawn rows of each of all files."""
    num_steps: int


def plan_epoch(
    files: Sequence[SampleFile], sampling: Sampling, num_lanes: int, epoch: int
) -> EpochPlan:
    """Draw the samples of an epoch and deal its files out to the lanes.

    A file goes to the lane with the fewest samples so far, so that lanes are level to within one
    volume.
    """
    names = [name for file in files for name in file.names]
    has_lesion = [is_marked for file in files for is_marked in file.has_lesion]
    drawn = sampling.drawn(names, has_lesion, epoch)
    rows = [[row for row, name in enumerate(file.names) if name in drawn] for file in files]
    lanes: list[list[int]] = [[] for _ in range(num_lanes)]
    load = [0] * num_lanes
    # By seed and epoch: a restart repeats the order of an undisturbed run.
    rng = np.random.default_rng([sampling.seed, epoch])
    for index in rng.permutation(len(files)).tolist():
        if rows[index]:
            lightest = load.index(min(load))
            lanes[lightest].append(index)
            load[lightest] += len(rows[index])
    num_steps = _count_steps(load, sampling.batch_size)
    return EpochPlan(files=lanes, rows=rows, num_steps=num_steps)


def _count_steps(load: Sequence[int], batch_size: int) -> int:
    """Return the steps in which the fullest lane takes all its samples.

    Fewer if the emptiest lane would have a micro-batch of a single sample, of which batch norm may
    have no variance. load: samples of each lane.
    """
    return min(-(-max(load) // batch_size), min(load) // min(batch_size, 2))


def plan_lane(
    files: Sequence[SampleFile],
    plan: EpochPlan,
    sampling: Sampling,
    lane: int,
    epoch: int,
    window_bytes: int,
) -> LanePlan:
    """Return the windows and micro-batches of one lane.

    Micro-batches have ``batch_size`` samples or fewer, all of nearly one size; of 2 and 3 up to 4,
    of 1 up to 2. A lane with more samples than that leaves some out.
    """
    windows = _windows(files, plan.files[lane], window_bytes)
    # Lanes count from 1 here: a seed that ends in zeros is that of the files' order.
    rng = np.random.default_rng([sampling.seed, epoch, 1 + lane])
    samples: list[Sample] = []
    for number, indices in enumerate(windows):
        drawn = [Sample(number, index, row) for index in indices for row in plan.rows[index]]
        samples += [drawn[position] for position in rng.permutation(len(drawn)).tolist()]
    largest = max(sampling.batch_size, min(2 * sampling.batch_size, 4))
    taken = samples[: plan.num_steps * largest]
    return LanePlan(windows=windows, batches=list(_split(taken, plan.num_steps)))


def _windows(
    files: Sequence[SampleFile], indices: Sequence[int], window_bytes: int
) -> list[list[int]]:
    """Cut a lane's files into windows of about equal size, none larger by more than a file.

    Of equal size: the last one would else mix the samples of few volumes.
    """
    total = sum(files[index].num_bytes for index in indices)
    num_windows = max(1, -(-total // window_bytes))
    windows: list[list[int]] = [[] for _ in range(num_windows)]
    done = 0
    for index in indices:
        windows[done * num_windows // max(1, total)].append(index)
        done += files[index].num_bytes
    return [window for window in windows if window]


def _split(samples: Sequence[Sample], count: int) -> Iterator[list[Sample]]:
    """Cut samples into ``count`` successive parts, whose sizes differ by one at most."""
    for number in range(count):
        start = number * len(samples) // count
        stop = (number + 1) * len(samples) // count
        yield list(samples[start:stop])
