"""Lanes: streams of samples that make the micro-batches of a step. numpy only.

An optimizer step takes one micro-batch from every lane. Lanes are shared out over the ranks, so
that the number of ranks changes which rank computes a micro-batch, and never its samples. The
samples of an epoch and their order follow from seed, epoch and lane alone: an interrupted training
goes on as if it had not been interrupted. ``pool`` holds samples in memory, ``stream`` reads them
from storage every epoch.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Rows = dict[str, NDArray[Any]]


class Lane(Protocol):
    """One stream of samples. A micro-batch is a dict of columns, ``name`` among them."""

    def num_batches(self, epoch: int) -> int:
        """Return the number of micro-batches of an epoch."""
        ...

    def batches(self, epoch: int) -> Iterator[Rows]:
        """Yield the epoch's micro-batches, shuffled."""
        ...

    def in_order(self) -> Iterator[Rows]:
        """Yield all samples in a fixed order, for validation; the last batch may be smaller."""
        ...


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling of an epoch from a lane.

    Choice: all samples, since precision needs negatives; the paper names no sampling.
    """

    batch_size: int
    seed: int = 0
    lesion_free_share: float = 1.0
    """Share of the slices without lesion that an epoch uses; other slices every epoch."""
    slices_per_volume: int = 0
    """Most slices of a volume that an epoch uses, other slices every epoch, so that a long scan
    does not outweigh a short one; 0 for all."""

    def drawn(self, names: Sequence[str], has_lesion: Sequence[bool], epoch: int) -> set[str]:
        """Return the names of the samples that an epoch uses. A name is SERIES or SERIES:SLICE."""
        by_volume: dict[str, list[tuple[float, str]]] = defaultdict(list)
        for name, is_marked in zip(names, has_lesion, strict=True):
            # A lot from a digest, not from a generator: it depends on neither lanes nor the order
            # of samples.
            digest = hashlib.blake2b(f"{self.seed}:{epoch}:{name}".encode(), digest_size=4).digest()
            # In [0, 1), since the digest has four bytes.
            lot = int.from_bytes(digest, "big") / 2**32
            if is_marked:
                by_volume[series_of(name)].append((lot, name))
            elif lot < self.lesion_free_share:
                # Scaled to 0..1: as likely as a marked slice to be among the first of its volume.
                by_volume[series_of(name)].append((lot / self.lesion_free_share, name))
        limit = self.slices_per_volume or None
        return {name for lots in by_volume.values() for _, name in sorted(lots)[:limit]}


def series_of(name: str) -> str:
    """Return the series of a sample's name."""
    return name.partition(":")[0]


def volumes_of(rows: Rows) -> list[str]:
    """Return the series that the rows come from, sorted."""
    return sorted({series_of(str(name)) for name in rows["name"]})


def assign_lanes(sizes: Mapping[str, int], num_lanes: int) -> list[list[str]]:
    """Deal volumes out over lanes, the largest first to the lane with the fewest samples.

    Lanes for validation; those of the training are dealt out anew every epoch.
    """
    lanes: list[list[str]] = [[] for _ in range(num_lanes)]
    load = [0] * num_lanes
    # Ties are broken by name, so that every start deals in the same way.
    for key in sorted(sizes, key=lambda key: (-sizes[key], key)):
        lightest = load.index(min(load))
        lanes[lightest].append(key)
        load[lightest] += sizes[key]
    return [sorted(lane) for lane in lanes]


def steps(lanes: Sequence[Lane], epoch: int, num_steps: int) -> Iterator[list[Rows]]:
    """Yield the epoch's steps; a thread gathers the next one meanwhile."""
    gathered = _gather(lanes, epoch, num_steps)
    with ThreadPoolExecutor(1, thread_name_prefix="next-step") as pool:
        upcoming = pool.submit(next, gathered)
        for number in range(num_steps):
            step = upcoming.result()
            if number + 1 < num_steps:
                upcoming = pool.submit(next, gathered)
            yield step


def _gather(lanes: Sequence[Lane], epoch: int, num_steps: int) -> Iterator[list[Rows]]:
    """Yield one micro-batch of every lane for each step."""
    streams = [lane.batches(epoch) for lane in lanes]
    for _ in range(num_steps):
        # One micro-batch of every lane: the global batch does not depend on the number of workers.
        yield [next(stream) for stream in streams]


def seed_of(*parts: int) -> int:
    """Return one seed from several numbers, the same on every machine."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint32)[0])
