"""The plan of a run: its frozen manifest, and the workers that the cluster has room for."""

import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from covtanet import ray_data, storage
from covtanet.archive import manifest
from covtanet.cluster import wait_for_idle
from covtanet.decoding.child_process import refuse_weak_sandbox
from covtanet.errors import ConfigError
from covtanet.ledger.incremental import PreviousRuns, read_previous_runs
from covtanet.ledger.run import Run
from covtanet.ledger.series_keys import SeriesKeys, keys_of, position_of
from covtanet.ledger.work import KEYS_PER_BATCH, manifest_batches, write_manifest
from covtanet.screening.config import ScreeningConfig
from covtanet.screening.listing import (
    list_folders,
    list_server,
    note_contents,
    read_series,
    split_scan,
)
from covtanet.screening.node_watch import cpus_by_node
from covtanet.screening.scan import scan
from covtanet.screening.worker_counts import (
    WorkerCounts,
    most_workers,
    num_cpus_needed,
    worker_counts,
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The work of a run and the workers for it."""

    num_series: int
    num_bytes: int
    """Bytes of the series whose size is known."""
    num_finished: int
    num_nodes: int
    """Nodes with CPUs."""
    num_cpus: int
    num_gpus: int
    workers: WorkerCounts
    most_workers: WorkerCounts
    """Workers that the pools grow to when nodes join."""

    @property
    def num_remaining(self) -> int:
        """Series that have no row yet."""
        return self.num_series - self.num_finished


def make_manifest(run: Run, config: ScreeningConfig) -> None:
    """List the archive, read the headers on the cluster and freeze the manifest, unless it exists.

    Raises:
        ConfigError: the archive is empty, or this machine cannot confine the sandbox.
    """
    # Before anything is listed or written.
    refuse_weak_sandbox(config.decode_limits)
    # A manifest is frozen: a run that continues has the series of its first start.
    if storage.exists(run.work_uri("manifest.parquet")):
        return
    ray_data.configure(preserve_order=True)  # so that a limit means the same series each time
    previous_runs = read_previous_runs(run) if run.since_last else PreviousRuns()
    with tempfile.TemporaryDirectory() as folder:
        _freeze(run, config, previous_runs, Path(folder))


def _freeze(run: Run, config: ScreeningConfig, previous_runs: PreviousRuns, folder: Path) -> None:
    """Make the manifest in a local folder, then publish it."""
    series = folder / "series.parquet"
    ignored = folder / "ignored.parquet"
    folders = None
    if storage.is_dicomweb(run.archive):
        uid_counts = list_server(run, series, ignored)
    else:
        folders = folder / "folders.parquet"
        uid_counts = _scan_folders(run, config, previous_runs, folder, folders, series, ignored)
    arrange = manifest.join_by_uid if config.group_by == "uid" else manifest.flag_repeated
    arranged = arrange(read_series(series), uid_counts)
    remaining = _unsettled(arranged, run, previous_runs)
    if run.limit:
        remaining = islice(remaining, run.limit)
    # A run with a limit has not listed all: its folders settle nothing.
    write_manifest(run, remaining, ignored, None if run.limit else folders)


def _scan_folders(
    run: Run,
    config: ScreeningConfig,
    previous_runs: PreviousRuns,
    folder: Path,
    folders: Path,
    series: Path,
    ignored: Path,
) -> Counter[str]:
    """Write the series and ignored objects of an archive of objects, and its folders.

    Returns how often each series UID occurs, folders that were not read included.
    """
    listing = folder / "listing.parquet"
    by_uid = config.group_by == "uid"
    # A series that is spread over folders may have changed in any of them: none is skipped.
    skipping = replace(previous_runs, folders={}) if by_uid else previous_runs
    num_folders, num_objects = list_folders(run, listing, folders, skipping)
    if not num_folders:
        raise ConfigError(
            "nothing lies under the archive, expected a folder or prefix with objects"
        )
    rows = scan(run, config.decode_limits, listing, num_objects)
    # Series that are joined by UID must all be read before the first of them is complete.
    limit = 0 if by_uid else run.limit
    uid_counts, scanned = split_scan(rows, series, ignored, limit)
    # Before the manifest: its write ends the planning.
    skipped_uids = note_contents(run, folders, scanned, previous_runs)
    for uid in uid_counts:
        uid_counts[uid] += skipped_uids[run.pseudonym(uid)]
    return uid_counts


def _unsettled(
    rows: Iterator[dict[str, Any]], run: Run, previous_runs: PreviousRuns
) -> Iterator[dict[str, Any]]:
    """Yield the series to screen, under their pseudonyms if identities are hidden."""
    for row in rows:
        row = {**row, "series_key": run.pseudonym(row["series_key"])}
        if not previous_runs.settles(row, run):
            yield row


def make_plan(run: Run, config: ScreeningConfig, finished: SeriesKeys) -> Plan:
    """Count the remaining work and choose the workers among the CPUs that are free.

    finished: keys of the series that have a row, sorted.

    Raises:
        ConfigError: too few CPUs are idle, or none of the cluster's GPUs.
    """
    num_series = 0
    num_bytes = 0
    num_finished = 0
    for batch in manifest_batches(run, ["series_key", "num_bytes"], KEYS_PER_BATCH):
        num_series += batch.num_rows
        num_bytes += pc.sum(batch["num_bytes"]).as_py() or 0
        num_finished += int((position_of(keys_of(batch), finished) >= 0).sum())
    node_cpus = list(cpus_by_node().values())
    num_cpus, num_gpus = wait_for_idle(partial(num_cpus_needed, node_cpus))
    num_needed = num_cpus_needed(node_cpus, num_gpus)
    if num_cpus < num_needed:
        raise ConfigError(
            f"the cluster has {num_cpus} of {sum(node_cpus)} CPUs free, expected at least "
            f"{num_needed}: {num_needed - 2} to predict, 1 to decode and 1 to measure "
            "(ray start --num-cpus)"
        )
    # Each decoder fetches one series at a time.
    max_decoders = config.max_pacs_requests if storage.is_dicomweb(run.archive) else None
    workers = worker_counts(num_cpus, node_cpus, num_gpus, max_decoders)
    return Plan(
        num_series=num_series,
        num_bytes=num_bytes,
        num_finished=num_finished,
        num_nodes=len(node_cpus),
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        workers=workers,
        most_workers=most_workers(workers, len(node_cpus), config.max_nodes or 1, max_decoders),
    )
