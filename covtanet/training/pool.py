"""Samples in memory, dealt out to the lanes anew every epoch. numpy only.

The slices of all patients meet in one permutation, so that a micro-batch mixes patients, and every
sample that an epoch draws is in one of its micro-batches.
"""

from collections.abc import Collection, Iterator

import numpy as np
from numpy.typing import NDArray

from covtanet.training.feed import Rows, Sampling
from covtanet.training.neighbours import Neighbours


class SamplePool:
    """All samples of a phase, of which every worker holds a copy.

    rows: columns of equal length, with ``name`` (text) and ``has_lesion`` (bool) among them.
    num_neighbours: slices on either side that are added to ``levels`` as channels. single: series
    whose slices have no neighbours.
    """

    def __init__(
        self,
        rows: Rows,
        sampling: Sampling,
        num_lanes: int = 1,
        num_neighbours: int = 0,
        single: Collection[str] = (),
    ) -> None:
        # Rows may arrive in any order.
        order = np.argsort(rows["name"], kind="stable")
        self.rows = {name: values[order] for name, values in rows.items()}
        self.sampling = sampling
        self.num_lanes = num_lanes
        self.neighbours: Neighbours | None = None
        if num_neighbours:
            self.neighbours = Neighbours(self.rows["name"].tolist(), single)
        # The last epoch that was dealt and its micro-batches: all lanes ask for the same epoch.
        self._dealt: tuple[int, list[NDArray[np.intp]]] = (-1, [])

    def lane(self, number: int = 0) -> "PoolLane":
        """Return one of the lanes."""
        return PoolLane(self, number)

    def deal(self, epoch: int) -> list[NDArray[np.intp]]:
        """Return the epoch's micro-batches as indices of rows, step by step and lane by lane."""
        if self._dealt[0] != epoch:
            self._dealt = (epoch, self._deal(epoch))
        return self._dealt[1]

    def _deal(self, epoch: int) -> list[NDArray[np.intp]]:
        names = self.rows["name"].tolist()
        drawn = self.sampling.drawn(names, self.rows["has_lesion"].tolist(), epoch)
        indices = np.flatnonzero([name in drawn for name in names])
        num_steps = count_steps(len(indices), self.sampling.batch_size, self.num_lanes)
        if not num_steps:
            return []
        # By seed and epoch: a restart repeats the order of an undisturbed run.
        rng = np.random.default_rng([self.sampling.seed, epoch])
        # Sizes differ by one at most.
        return np.array_split(rng.permutation(indices), num_steps * self.num_lanes)

    def take(self, indices: NDArray[np.intp], generator: np.random.Generator | None = None) -> Rows:
        """Return the rows of a micro-batch; levels are (B, C, H, W) if there are neighbours.

        generator: draws the neighbours of a training; without it they are the adjacent slices.
        """
        if self.neighbours is None:
            return {name: values[indices] for name, values in self.rows.items()}
        rows = {name: values[indices] for name, values in self.rows.items() if name != "levels"}
        channels = self.neighbours.adjacent(indices)
        if generator is not None:
            channels = self.neighbours.draw(indices, generator)
        return rows | {"levels": self.rows["levels"][channels]}


class PoolLane:
    """A lane of a pool."""

    def __init__(self, pool: SamplePool, number: int) -> None:
        self.pool = pool
        self.number = number

    def num_batches(self, epoch: int) -> int:
        """Return the number of micro-batches of an epoch, the same for all lanes."""
        return len(self.pool.deal(epoch)) // self.pool.num_lanes

    def batches(self, epoch: int) -> Iterator[Rows]:
        """Yield the epoch's micro-batches, shuffled."""
        dealt = self.pool.deal(epoch)[self.number :: self.pool.num_lanes]
        for step, indices in enumerate(dealt):
            # Lanes count from 1 here: a seed that ends in zeros is that of the permutation.
            seed = [self.pool.sampling.seed, epoch, 1 + self.number, step]
            yield self.pool.take(indices, np.random.default_rng(seed))

    def in_order(self) -> Iterator[Rows]:
        """Yield all samples of the pool in the order of their names."""
        num_samples = len(self.pool.rows["name"])
        size = self.pool.sampling.batch_size
        for start in range(0, num_samples, size):
            yield self.pool.take(np.arange(start, min(start + size, num_samples)))


def count_steps(num_samples: int, batch_size: int, num_lanes: int) -> int:
    """Return the steps of an epoch that leave no sample out; 0 if one step has too few samples.

    Micro-batches of at most ``batch_size``, of one size or nearly so. If one of them would be empty
    or hold a single sample, of which batch norm may have no variance, there are fewer steps:
    micro-batches then hold up to 4 samples with a ``batch_size`` of 2 or 3, and up to 2 with 1.
    """
    step_size = batch_size * num_lanes
    if num_samples < step_size:
        return 0
    fewest_per_step = min(batch_size, 2) * num_lanes
    return min(-(-num_samples // step_size), num_samples // fewest_per_step)
