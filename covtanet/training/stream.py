"""Samples that are read from storage every epoch, by threads that read ahead of the training.

Of each lane two windows are in memory: the one that its micro-batches are taken from, and the next
one, of the next epoch if need be, which threads read meanwhile. ``stream_plan`` has the order.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from covtanet.training.feed import Rows, Sampling
from covtanet.training.neighbours import Neighbours
from covtanet.training.sample_files import ReadFile, SampleFile
from covtanet.training.stream_plan import EpochPlan, LanePlan, Sample, plan_epoch, plan_lane

# Bytes of a window; a lane has two in memory. Part of the order of samples, so it follows neither
# from the machine nor from the number of workers. 680 slices of 512 pixels with their masks, or
# 2700 of 256, some 17 and 68 volumes of 40.
WINDOW_BYTES = 512 << 20
NUM_READ_THREADS = 4
# Validation files that are read ahead.
FILES_AHEAD = 2 * NUM_READ_THREADS


@dataclass(frozen=True, kw_only=True)
class _Loaded:
    """A file's samples in memory."""

    rows: Rows
    neighbours: Neighbours | None

    def take(self, row: int, generator: np.random.Generator | None = None) -> Rows:
        """Return one sample; levels are (1, C, H, W) if there are neighbours.

        generator: draws the neighbours of a training; without it they are the adjacent slices.
        """
        sample = {name: values[row : row + 1] for name, values in self.rows.items()}
        if self.neighbours is None:
            return sample
        middle: NDArray[np.intp] = np.array([row])
        channels = self.neighbours.adjacent(middle)
        if generator is not None:
            channels = self.neighbours.draw(middle, generator)
        return sample | {"levels": self.rows["levels"][channels]}


class SampleStream:
    """All samples of a phase in storage, dealt out to the lanes anew every epoch.

    read: reads a file in a thread. num_epochs: files are read ahead for no later epoch.
    num_neighbours: slices on either side that are added to ``levels`` as channels.
    """

    def __init__(
        self,
        files: Sequence[SampleFile],
        sampling: Sampling,
        read: ReadFile,
        num_lanes: int = 1,
        num_epochs: int = 1,
        num_neighbours: int = 0,
        window_bytes: int = WINDOW_BYTES,
    ) -> None:
        # By name: the order depends on neither that of the files nor on the split's.
        self.files = sorted(files, key=lambda file: file.series)
        self.sampling = sampling
        self.num_lanes = num_lanes
        self.num_epochs = num_epochs
        self._read = read
        self._num_neighbours = num_neighbours
        self._window_bytes = window_bytes
        self._pool = ThreadPoolExecutor(NUM_READ_THREADS, thread_name_prefix="read-samples")
        # The last epochs that were planned: lanes that read ahead ask for two.
        self._plans: dict[int, EpochPlan] = {}

    def lane(self, number: int = 0) -> "StreamLane":
        """Return one of the lanes."""
        return StreamLane(self, number)

    def plan(self, epoch: int) -> EpochPlan:
        """Return the plan of an epoch, the same for all lanes."""
        if epoch not in self._plans:
            planned = plan_epoch(self.files, self.sampling, self.num_lanes, epoch)
            kept = {known: plan for known, plan in self._plans.items() if known == epoch - 1}
            self._plans = kept | {epoch: planned}
        return self._plans[epoch]

    def plan_lane(self, epoch: int, number: int) -> LanePlan:
        """Return the windows and micro-batches of a lane's epoch."""
        return plan_lane(
            self.files, self.plan(epoch), self.sampling, number, epoch, self._window_bytes
        )

    def start_reading(self, index: int) -> Future[_Loaded]:
        """Have a thread read one of the files."""
        return self._pool.submit(self._load, self.files[index])

    def _load(self, file: SampleFile) -> _Loaded:
        rows = self._read(file)
        if tuple(rows["name"].tolist()) != file.names:
            raise RuntimeError(f"file of {file.series}: other samples than its description names")
        neighbours = None
        if self._num_neighbours:
            single = () if file.is_continuous else (file.series,)
            neighbours = Neighbours(file.names, single)
        return _Loaded(rows=rows, neighbours=neighbours)


class StreamLane:
    """A lane of a stream."""

    def __init__(self, stream: SampleStream, number: int) -> None:
        self.stream = stream
        self.number = number
        # Files of the windows in memory or on their way there, by epoch and window.
        self._windows: dict[tuple[int, int], dict[int, Future[_Loaded]]] = {}

    def num_batches(self, epoch: int) -> int:
        """Return the number of micro-batches of an epoch, the same for all lanes."""
        return self.stream.plan(epoch).num_steps

    def batches(self, epoch: int) -> Iterator[Rows]:
        """Yield the epoch's micro-batches, shuffled."""
        plan = self.stream.plan_lane(epoch, self.number)
        for step, samples in enumerate(plan.batches):
            seed = [self.stream.sampling.seed, epoch, 1 + self.number, step]
            generator = np.random.default_rng(seed)
            yield join([self._take(plan, epoch, sample, generator) for sample in samples])

    def _take(
        self, plan: LanePlan, epoch: int, sample: Sample, generator: np.random.Generator
    ) -> Rows:
        is_new = (epoch, sample.window) != next(iter(self._windows), None)
        if is_new:
            self._enter(plan, epoch, sample.window)
        loaded = self._windows[epoch, sample.window][sample.file].result()
        return loaded.take(sample.row, generator)

    def _enter(self, plan: LanePlan, epoch: int, window: int) -> None:
        """Start to read a window and the next one, and forget all others."""
        before = self._windows
        self._windows = {}
        for key, files in ((epoch, window), plan.windows[window]), *self._next(plan, epoch, window):
            if key not in before:
                before[key] = {index: self.stream.start_reading(index) for index in files}
            self._windows[key] = before.pop(key)
        for futures in before.values():
            for future in futures.values():
                future.cancel()

    def _next(
        self, plan: LanePlan, epoch: int, window: int
    ) -> list[tuple[tuple[int, int], list[int]]]:
        """Return key and files of the window after this one; none after the last epoch's."""
        if window + 1 < len(plan.windows):
            return [((epoch, window + 1), plan.windows[window + 1])]
        if epoch + 1 < self.stream.num_epochs:
            following = self.stream.plan_lane(epoch + 1, self.number)
            return [((epoch + 1, 0), files) for files in following.windows[:1]]
        return []

    def in_order(self) -> Iterator[Rows]:
        """Yield all samples of the stream in the order of their names."""
        size = self.stream.sampling.batch_size
        for loaded in self._files_in_order():
            num_samples = len(loaded.rows["name"])
            for start in range(0, num_samples, size):
                rows = range(start, min(start + size, num_samples))
                yield join([loaded.take(row) for row in rows])

    def _files_in_order(self) -> Iterator[_Loaded]:
        indices = iter(range(len(self.stream.files)))
        pending = deque(map(self.stream.start_reading, islice(indices, FILES_AHEAD)))
        while pending:
            loaded = pending.popleft().result()
            pending.extend(map(self.stream.start_reading, islice(indices, 1)))
            yield loaded


def join(blocks: Iterable[Rows]) -> Rows:
    """Return blocks of rows as one."""
    parts = list(blocks)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
