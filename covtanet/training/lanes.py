"""Lanes of a worker: prepared slices or volumes from storage, in memory or streamed every epoch."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from covtanet import storage
from covtanet.data.prepared_file import samples_of
from covtanet.training.config import TrainingConfig
from covtanet.training.feed import Rows, Sampling, seed_of
from covtanet.training.pool import SamplePool

# The shuffle buffer holds at most so many rows and so many bytes.
SHUFFLE_ROWS = 512
SHUFFLE_BYTES = 1 << 30
# Rows per batch of Ray Data; the lane cuts them into micro-batches afterwards.
READ_SLICES = 32
READ_VOLUMES = 2
NUM_FETCH_THREADS = 4

# Opens a shard of Ray Data by its name: anything with ``iter_batches``.
OpenShard = Callable[[str], Any]


@dataclass(frozen=True, kw_only=True)
class LaneSpec:
    """A lane as the driver describes it to a worker."""

    shard: str
    """Name of the lane's Ray dataset."""
    names: tuple[str, ...]
    """Of all samples of the lane."""
    has_lesion: tuple[bool, ...]
    bytes_per_sample: int
    uris: tuple[str, ...] = ()
    """In phase 1 the prepared volumes that hold the slices; empty in phase 2, in which a sample is
    a whole volume."""
    single: tuple[str, ...] = ()
    """Series whose slices are not neighbours in one patient."""


def fit_in_memory(config: TrainingConfig, lanes: Sequence[LaneSpec]) -> bool:
    """Return whether every worker may keep all samples of a phase."""
    num_bytes = sum(len(lane.names) * lane.bytes_per_sample for lane in lanes)
    return num_bytes <= config.cache_bytes


def sample_pool(
    specs: Sequence[LaneSpec],
    sampling: Sampling,
    size_px: int,
    open_shard: OpenShard,
    num_lanes: int = 1,
    num_neighbours: int = 0,
) -> SamplePool:
    """Return the samples of lanes in memory, read once and dealt out to ``num_lanes``."""
    single = frozenset(key for spec in specs for key in spec.single)
    blocks = [block for spec in specs for block in _read_once(spec, size_px, open_shard)]
    return SamplePool(_join(blocks), sampling, num_lanes, num_neighbours, single)


def _read_once(spec: LaneSpec, size_px: int, open_shard: OpenShard) -> Iterator[Rows]:
    if not spec.uris:
        yield from _read(spec, size_px, open_shard)
        return
    # Slices are read without Ray Data: the start of its plan costs more than reading them.
    with ThreadPoolExecutor(NUM_FETCH_THREADS) as pool:
        tables = pool.map(lambda uri: pq.read_table(BytesIO(storage.read_bytes(uri))), spec.uris)
        yield from (slice_rows(table, size_px) for table in tables)


def _read(spec: LaneSpec, size_px: int, open_shard: OpenShard, **shuffle: int) -> Iterator[Rows]:
    """Yield a lane's rows from its Ray dataset.

    There is no dataset if there are too few volumes for every lane.
    """
    if not spec.names:
        return
    shard = open_shard(spec.shard)
    if shard is None:
        raise RuntimeError(f"Ray Train has no dataset {spec.shard}")
    if not spec.uris:
        for batch in shard.iter_batches(batch_size=READ_VOLUMES, batch_format="numpy", **shuffle):
            yield {**batch, "name": batch["name"].astype(str)}
        return
    for table in shard.iter_batches(batch_size=READ_SLICES, batch_format="pyarrow", **shuffle):
        yield slice_rows(table, size_px)


def slice_rows(table: pa.Table, size_px: int) -> Rows:
    """Return a block of prepared slices as the columns of a lane."""
    samples = samples_of(table, size_px)
    if samples.lesion is None:
        raise RuntimeError("phase 1 got slices without lesion masks")
    # A sample is named by its volume and slice, which a draw and an error message use.
    pairs = zip(table["volume"].to_pylist(), table["slice"].to_pylist(), strict=True)
    return {
        "name": np.array([slice_name(volume, index) for volume, index in pairs]),
        "has_lesion": np.asarray(table["lesion_px"]) > 0,
        "levels": samples.levels,
        "lesion": samples.lesion,
    }


def slice_name(volume: str, index: int) -> str:
    """Return the name of a sample of phase 1; a sample of phase 2 has its volume's name."""
    return f"{volume}:{index:05d}"


def _join(blocks: list[Rows]) -> Rows:
    if not blocks:
        return {"name": np.array([], dtype=str), "has_lesion": np.array([], dtype=bool)}
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


class StreamLane:
    """A lane that is read from its Ray dataset every epoch, through a shuffle buffer.

    Choice: the buffer mixes the slices of neighbouring files only; the order of files follows from
    the volumes' digests.
    """

    def __init__(
        self, spec: LaneSpec, sampling: Sampling, lane: int, size_px: int, open_shard: OpenShard
    ) -> None:
        self.spec = spec
        self.sampling = sampling
        self.lane = lane
        self.size_px = size_px
        self.open_shard = open_shard

    def num_batches(self, epoch: int) -> int:
        """Return the number of whole micro-batches of an epoch."""
        return len(self._names(epoch)) // self.sampling.batch_size

    def batches(self, epoch: int) -> Iterator[Rows]:
        """Yield the epoch's micro-batches in the buffer's order."""
        # Bounded by rows and by bytes; at least one row, however large.
        buffer = max(1, min(SHUFFLE_ROWS, SHUFFLE_BYTES // self.spec.bytes_per_sample))
        blocks = _read(
            self.spec,
            self.size_px,
            self.open_shard,
            local_shuffle_buffer_size=buffer,
            # By epoch and lane: an epoch that is repeated after a restart has the same order.
            local_shuffle_seed=seed_of(self.sampling.seed, epoch, self.lane),
        )
        # Drawn by name, so that the choice does not depend on the order in which blocks come.
        drawn = self._names(epoch)
        yield from regroup((_select(block, drawn) for block in blocks), self.sampling.batch_size)

    def _names(self, epoch: int) -> set[str]:
        return self.sampling.drawn(self.spec.names, self.spec.has_lesion, epoch)

    def in_order(self) -> Iterator[Rows]:
        """Yield all samples in the files' order."""
        size = self.sampling.batch_size
        for rows in _read(self.spec, self.size_px, self.open_shard):
            for start in range(0, len(rows["name"]), size):
                yield {name: values[start : start + size] for name, values in rows.items()}


def _select(rows: Rows, names: set[str]) -> Rows:
    is_selected = np.array([name in names for name in rows["name"].tolist()], bool)
    return {name: values[is_selected] for name, values in rows.items()}


def regroup(blocks: Iterator[Rows], batch_size: int) -> Iterator[Rows]:
    """Cut a stream of rows into whole batches; the rest is dropped."""
    pending: Rows = {}
    for block in blocks:
        # The rest of a block opens the next micro-batch.
        pending = _join([pending, block]) if pending else block
        while len(pending["name"]) >= batch_size:
            yield {name: values[:batch_size] for name, values in pending.items()}
            pending = {name: values[batch_size:] for name, values in pending.items()}
