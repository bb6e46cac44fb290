"""The screening on Ray Data, in order; the one place of screening that knows Ray.

``make_manifest`` reads the headers of an archive; ``screen`` is the pipeline. What crosses between workers is the
network's input and packed masks, never a raw volume, and as few series at a time as keep every worker busy.
"""

import faulthandler
import logging
import os
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
from ray.util import metrics

from covtanet import drawing as overlay
from covtanet import ray_data, storage
from covtanet.archive import manifest
from covtanet.ct.window import WindowConfig
from covtanet.decoding import headers as heads
from covtanet.decoding.child_process import header_reader, refuse_weak_sandbox
from covtanet.decoding.sandbox import Limits, Sandbox
from covtanet.errors import ConfigError, Status
from covtanet.ledger.attempts import count_attempt
from covtanet.ledger.incremental import KnownSeries, known_series
from covtanet.ledger.run import Run, known_runs
from covtanet.ledger.work import (
    FOLDERS_SCHEMA,
    SERIES_PER_GROUP,
    batched,
    finished_keys,
    read_folders,
    read_manifest,
    store_row,
    write_manifest,
    write_rows,
)
from covtanet.screening import stages
from covtanet.screening.stages import ScreeningConfig

logger = logging.getLogger(__name__)

STDERR = 2
FREE_CPUS_TIMEOUT_S = 60.0
PROGRESS_EVERY_S = 10.0
STAGE_SECONDS = [0.1, 0.3, 1, 3, 10, 30, 100]
FOLDERS_PER_SCAN = 16
SERIES_IN_FLIGHT_PER_PREDICTOR = 2
# Prepared series wait for a predictor by the handful, not until the object store is full.
SERIES_WAITING_PER_PREDICTOR, SLICES_PER_SERIES, BYTES_PER_PIXEL = 8, 64, 2
LISTING_SCHEMA = pa.schema([
    pa.field("folder", pa.string(), nullable=False),
    pa.field("objects", pa.list_(manifest.OBJECT_TYPE), nullable=False),
])  # fmt: skip
SCAN_SCHEMA = manifest.MANIFEST_SCHEMA.append(pa.field("is_ignored", pa.bool_(), nullable=False))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run would do, and whether the cluster can."""

    num_series: int
    num_bytes: int
    num_finished: int
    num_cpus: int
    num_gpus: int
    num_decoders: int
    num_predictors: int


def make_manifest(run: Run, config: ScreeningConfig) -> None:
    """List the archive, read the headers on the cluster and freeze the manifest, unless it exists.

    Raises:
        ConfigError: if the archive is empty, or this machine cannot shut the sandbox.
    """
    refuse_weak_sandbox(config.decode_limits)
    if storage.exists(run.work_uri("manifest.parquet")):
        return
    ray_data.configure(preserve_order=True)  # so that a limit means the same series each time
    known = _what_is_known(run) if run.since_last else Before()
    with tempfile.TemporaryDirectory() as folder:
        listing, folders = Path(folder) / "listing.parquet", Path(folder) / "folders.parquet"
        skips = known if config.group_by == "folder" else replace(known, folders={})
        num_folders, num_new = _list(run, listing, folders, skips)
        if not num_folders:
            raise ConfigError(
                "nothing lies under the archive, expected a folder or prefix with objects"
            )
        listing_uri = run.work_uri("drivers", uuid.uuid4().hex, "listing.parquet")
        storage.upload(listing, listing_uri)
        series, ignored = Path(folder) / "series.parquet", Path(folder) / "ignored.parquet"
        found = _scan(run, config, listing_uri) if num_new else iter(())
        counts, keys_by_folder = _split_scan(
            found, series, ignored, run.limit if config.group_by == "folder" else 0
        )
        counts.update(each.series_uid for key, each in known.series.items() if each.series_uid)
        arrange = manifest.join_by_uid if config.group_by == "uid" else manifest.flag_repeated
        arranged = (
            {**row, "series_key": run.pseudonym(row["series_key"])}
            for row in arrange(_read(series), counts)
        )
        arranged = (row for row in arranged if not known.settles(row, run))
        if run.limit:
            arranged = (row for row, _ in zip(arranged, range(run.limit), strict=False))
        _note_series(run, folders, keys_by_folder, known)
        write_manifest(run, arranged, ignored, None if run.limit else folders)


@dataclass(frozen=True, kw_only=True)
class Before:
    """What earlier runs of an archive left: each series' newest row, and each folder as the last run listed it."""

    series: dict[str, KnownSeries] = field(default_factory=dict)
    folders: dict[str, tuple[str, list[str]]] = field(default_factory=dict)

    def settles(self, row: dict[str, Any], run: Run) -> bool:
        """Whether a series need not be screened again."""
        known = self.series.get(row["series_key"])
        # Ledgers of older software hold the version as it is, even if they hide identities.
        versions = {row["source_version"], run.pseudonym(row["source_version"])}
        return known is not None and known.is_settled(versions, run.software_version)

    def settles_folder(self, folder: str, version: str, software_version: str) -> bool:
        """Whether a folder is as it was listed, and no series of it waits for another attempt."""
        before, keys = self.folders.get(folder, ("", []))
        found = [self.series.get(key) for key in keys]
        return before == version and all(
            known is not None and known.is_settled({known.source_version}, software_version)
            for known in found
        )


def _what_is_known(run: Run) -> Before:
    """The rows of this archive's committed runs, and the folders of the last of them that listed all.

    Only runs count whose model was asked for by the name that this one asks by: another one's, a challenger's, say
    nothing about what this run has still to screen. Nor do runs with a date in the future.
    """
    all_runs = [known for known in known_runs(run.ledger, run.work_root) if known.is_committed]
    runs = [known for known in all_runs if known.is_of(run) and not known.is_ahead]
    if num_ahead := sum(known.is_ahead for known in all_runs):
        logger.warning("%d runs with a date in the future are left out", num_ahead)
    series = known_series(run.ledger, {known.run_id for known in runs})
    whole = [known.run_id for known in runs if not known.description.get("limit")]
    folders = read_folders(run.work_root, whole[-1]) if whole else {}
    logger.info("%d series are known from %d runs", len(series), len(runs))
    return Before(series=series, folders=folders)


def _list(run: Run, listing: Path, folders: Path, known: Before) -> tuple[int, int]:
    """Write the listing of folders that must be read, and the version of every folder; returns how many of each."""
    num_folders = num_new = 0
    with (
        pq.ParquetWriter(listing, LISTING_SCHEMA, compression="zstd") as to_read,
        pq.ParquetWriter(folders, FOLDERS_SCHEMA, compression="zstd") as all_folders,
    ):
        for group in batched(storage.walk(run.archive), FOLDERS_PER_SCAN):
            versions = [(prefix, storage.version_digest(found)) for prefix, found in group]
            is_new = [not known.settles_folder(*each, run.software_version) for each in versions]
            rows = [
                {
                    "folder": prefix,
                    "objects": [
                        {"path": o.path, "num_bytes": o.num_bytes, "version": o.version}
                        for o in found
                    ],
                }
                for (prefix, found), wanted in zip(group, is_new, strict=True)
                if wanted
            ]
            noted = [
                {"folder": prefix, "version": version, "series_keys": []}
                for prefix, version in versions
            ]
            to_read.write_table(pa.Table.from_pylist(rows, schema=LISTING_SCHEMA))
            all_folders.write_table(pa.Table.from_pylist(noted, schema=FOLDERS_SCHEMA))
            num_folders, num_new = num_folders + len(group), num_new + len(rows)
    return num_folders, num_new


def _note_series(
    run: Run, folders: Path, keys_by_folder: dict[str, list[str]], known: Before
) -> None:
    """Add to each folder the keys of its series: those just found, or those of the run before where it was skipped."""
    table = pq.read_table(folders, schema=FOLDERS_SCHEMA)
    keys = [
        [run.pseudonym(key) for key in keys_by_folder[folder]]
        if folder in keys_by_folder
        else known.folders.get(folder, ("", []))[1]
        for folder in table["folder"].to_pylist()
    ]
    pq.write_table(
        table.set_column(2, FOLDERS_SCHEMA.field(2), pa.array(keys, pa.list_(pa.string()))), folders
    )


def _scan(run: Run, config: ScreeningConfig, listing_uri: str) -> Iterator[dict[str, Any]]:
    """Series and ignored objects of the listing, in its order."""
    filesystem, path = storage.filesystem(listing_uri)
    listing = ray.data.read_parquet(path, filesystem=filesystem).repartition(
        target_num_rows_per_block=FOLDERS_PER_SCAN
    )
    found = listing.map_batches(
        _scan_folders,
        fn_kwargs={"archive": run.archive, "limits": config.decode_limits},
        batch_format="pyarrow",
        batch_size=None,
    )
    for batch in found.iter_batches(batch_format="pyarrow", batch_size=None):
        yield from batch.to_pylist()


def _scan_folders(batch: pa.Table, archive: str, limits: Limits) -> pa.Table:
    rows = []
    identify = partial(heads.read_identities, header_reader(limits))

    def read_head(path: str, num_bytes: int) -> bytes:
        return storage.read_bytes(storage.join(archive, path), num_bytes)

    for folder in batch.to_pylist():
        objects = [storage.ObjectInfo(**item) for item in folder["objects"]]
        series, ignored = manifest.scan_folder(folder["folder"], objects, read_head, identify)
        rows += [{**item.to_row(), "is_ignored": False} for item in series]
        rows += [
            {
                **manifest.Series(
                    source_path=item.path, source_format="other", objects=(item,)
                ).to_row(),
                "is_ignored": True,
            }
            for item in ignored
        ]
    return pa.Table.from_pylist(rows, schema=SCAN_SCHEMA)


def _split_scan(
    found: Iterator[dict[str, Any]], series: Path, ignored: Path, limit: int
) -> tuple[Counter[str], dict[str, list[str]]]:
    """Spool series and ignored objects to two local files.

    Returns how often each series UID stands in what was read, and the keys of the series of each folder.
    """
    counts: Counter[str] = Counter()
    keys_by_folder: dict[str, list[str]] = {}
    num_series = 0
    with (
        pq.ParquetWriter(series, manifest.MANIFEST_SCHEMA) as series_file,
        pq.ParquetWriter(ignored, manifest.IGNORED_SCHEMA) as ignored_file,
    ):
        for group in batched(found, SERIES_PER_GROUP):
            kept = [row for row in group if not row["is_ignored"]]
            counts.update(row["series_uid"] for row in kept if row["series_uid"])
            for row in kept:
                folder = row["source_path"][: row["source_path"].rfind("/") + 1]
                keys_by_folder.setdefault(folder, []).append(row["series_key"])
            num_series += len(kept)
            rest = [
                {"path": row["source_path"], "num_bytes": row["num_bytes"]}
                for row in group
                if row["is_ignored"]
            ]
            series_file.write_table(pa.Table.from_pylist(kept, schema=manifest.MANIFEST_SCHEMA))
            ignored_file.write_table(pa.Table.from_pylist(rest, schema=manifest.IGNORED_SCHEMA))
            if limit and num_series >= limit:
                break
    return counts, keys_by_folder


def _read(path: Path) -> Iterator[dict[str, Any]]:
    for batch in pq.ParquetFile(path).iter_batches(SERIES_PER_GROUP):
        yield from batch.to_pylist()


def plan(run: Run) -> Plan:
    """Count what is to be done and choose the workers among what the cluster has free.

    One predictor per GPU, or one that uses all cores of its node; decoders on the other CPUs.

    Raises:
        ConfigError: where the cluster has no CPU to spare for decoding.
    """
    finished = finished_keys(run)
    num_series = num_bytes = num_finished = 0
    for row in read_manifest(run, ["series_key", "num_bytes"]):
        num_series, num_bytes = num_series + 1, num_bytes + row["num_bytes"]
        num_finished += row["series_key"] in finished
    num_gpus = int(ray.cluster_resources().get("GPU", 0))
    num_predictors = num_gpus or max(1, len([node for node in ray.nodes() if node["Alive"]]))
    num_cpus = _free_cpus(num_predictors + 2)
    if num_cpus < num_predictors + 2:
        raise ConfigError(
            f"the cluster has {num_cpus} of {ray.cluster_resources().get('CPU', 0):g} CPUs free, expected at least "
            f"{num_predictors + 2}: {num_predictors} to predict, 1 to decode and 1 to measure (ray start --num-cpus)"
        )
    return Plan(
        num_series=num_series,
        num_bytes=num_bytes,
        num_finished=num_finished,
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        num_decoders=max(1, min(num_cpus - num_predictors - 1, _num_cores())),
        num_predictors=num_predictors,
    )


def _free_cpus(wanted: int) -> int:
    """CPUs that nobody holds; waits a while for what a driver that died has not given back yet."""
    deadline = time.monotonic() + FREE_CPUS_TIMEOUT_S
    while True:
        free = int(ray.available_resources().get("CPU", 0))
        if (
            free >= wanted
            or time.monotonic() > deadline
            or ray.cluster_resources().get("CPU", 0) < wanted
        ):
            return free
        time.sleep(1)


def _num_cores() -> int:
    """Cores of the cluster, as far as this node tells: more logical CPUs than cores do not decode faster."""
    nodes = len([node for node in ray.nodes() if node["Alive"]])
    return nodes * len(os.sched_getaffinity(0))


class _DecoderActor:
    """Decodes and prepares; a process of its own, so that what decoding takes at its peak is taken by few."""

    def __init__(self, run: Run, window: WindowConfig, config: ScreeningConfig) -> None:
        self.run, self.window, self.config = run, window, config
        self.decoder = Sandbox(window, config.slice_step_mm, config.decode_limits)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        if not count_attempt(self.run, row["series_key"], "decode"):
            return stages.gave_up(row, self.window, self.run.archive)
        with _ended_after(self.config.worker_timeout_s):
            return stages.decode_and_prepare(
                row,
                archive=self.run.archive,
                window=self.window,
                config=self.config,
                decoder=self.decoder,
            )


class _PredictorActor:
    """Loads the model once per actor and answers rows.

    Only here torch is imported: decoding and measuring do without, and their workers start seconds sooner.
    """

    def __init__(self, run: Run, config: ScreeningConfig) -> None:
        from covtanet.inference.predictor import Predictor
        from covtanet.model import checkpoint

        with tempfile.TemporaryDirectory() as folder:
            storage.download_files(run.work_uri("model"), checkpoint.MODEL_FILES, Path(folder))
            model = checkpoint.load_model(Path(folder), run.model_digest)
        self.run, self.config = run, config
        self.predictor = Predictor(
            model,
            engine=config.engine,
            num_threads=len(os.sched_getaffinity(0)),
            max_batch_slices=config.max_batch_slices,
        )

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        if not len(row["slices"]):
            return stages.predict(row, self.predictor)
        if not count_attempt(self.run, row["series_key"], "predict"):
            return stages.without_answer(row)
        with _ended_after(self.config.worker_timeout_s):
            return stages.predict(row, self.predictor)


@contextmanager
def _ended_after(timeout_s: float) -> Iterator[None]:
    """End this worker where a series takes it longer; Ray starts another, and the attempts are counted.

    Its log says in which line it hung, without any value.
    """
    faulthandler.dump_traceback_later(timeout_s, exit=True, file=STDERR)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def _measure_and_store(
    row: dict[str, Any], run: Run, window: WindowConfig, config: ScreeningConfig, results: str
) -> dict[str, Any]:
    if len(row["lesion_levels"]) and not count_attempt(run, row["series_key"], "measure"):
        row = stages.without_answer(row)
    with _ended_after(config.worker_timeout_s):
        return _measure_in_time(row, run, window, config, results)


def _measure_in_time(
    row: dict[str, Any], run: Run, window: WindowConfig, config: ScreeningConfig, results: str
) -> dict[str, Any]:
    measured = stages.measure(row, config)
    if results and measured.masks is not None and measured.involvement is not None:
        folder = storage.join(results, run.run_id, row["series_key"])
        files = overlay.result_files(
            row["slices"], row["chosen"], measured.masks, measured.involvement, window
        )
        for name, data in files:
            storage.write_bytes(storage.join(folder, name), data)
    stored = _stored(run, measured.record)
    _count(stored)
    return {
        "series_key": row["series_key"],
        "status": stored["status"],
        "reason": stored["reason"],
        "started_at": measured.record["started_at"],
    }


def _stored(run: Run, record: dict[str, Any]) -> dict[str, Any]:
    """Store a series' row; a row that does not fit the ledger's schema ends as one that failed, not the run."""
    try:
        return store_row(run, record)
    except (ValueError, TypeError, OverflowError, pa.ArrowException) as error:
        if isinstance(error, OSError):  # of storage
            raise
        return store_row(run, stages.not_storable(record, error))


@cache
def _meters() -> tuple[metrics.Counter, metrics.Histogram, metrics.Counter]:
    """Metrics of this worker, which Ray's agents collect."""
    return (
        metrics.Counter(
            "covtanet_series", "Series of screening jobs that are finished.", ("status", "reason")
        ),
        metrics.Histogram(
            "covtanet_stage_seconds",
            "How long a stage took for a series.",
            STAGE_SECONDS,
            ("stage",),
        ),
        metrics.Counter("covtanet_series_bytes", "Bytes of the series that are finished."),
    )


def _count(record: dict[str, Any]) -> None:
    series, seconds, num_bytes = _meters()
    series.inc(tags={"status": record["status"], "reason": record.get("reason") or ""})
    for stage in ("decode", "predict"):
        if record.get(f"{stage}_s"):
            seconds.observe(record[f"{stage}_s"], {"stage": stage})
    if record["num_bytes"]:
        num_bytes.inc(record["num_bytes"])


def screen(
    run: Run, config: ScreeningConfig, window: WindowConfig, model_folder: Path, results: str = ""
) -> None:
    """Screen every series of the manifest that has no row yet.

    window: the model's preprocessing. results: where to write masks and previews, or empty.
    """
    from covtanet.model.checkpoint import (
        MODEL_FILES,
    )  # torch, which decoding and measuring do without

    ray_data.configure(preserve_order=False)
    todo_uri = run.work_uri("drivers", uuid.uuid4().hex, "todo.parquet")
    finished = finished_keys(run)
    planned = plan(run)
    remaining = planned.num_series - planned.num_finished
    if planned.num_finished:
        logger.info(
            "continuing: %d of %d series are finished", planned.num_finished, planned.num_series
        )
    if not remaining:
        return
    logger.info("screening %d series with %d decoders", remaining, planned.num_decoders)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "todo.parquet"
        todo = (row for row in read_manifest(run) if row["series_key"] not in finished)
        write_rows(path, manifest.MANIFEST_SCHEMA, todo, SERIES_PER_GROUP)
        storage.upload(path, todo_uri)
    for name in MODEL_FILES:  # to where every node can fetch them
        storage.upload(model_folder / name, run.work_uri("model", name))
    _follow(_pipeline(run, config, window, results, todo_uri, planned), remaining)


def _pipeline(
    run: Run,
    config: ScreeningConfig,
    window: WindowConfig,
    results: str,
    todo_uri: str,
    planned: Plan,
) -> ray.data.Dataset:
    waiting_bytes = (
        SERIES_WAITING_PER_PREDICTOR * SLICES_PER_SERIES * window.size_px**2 * BYTES_PER_PIXEL
    )
    ray.data.DataContext.get_current().execution_options.resource_limits = (
        ray.data.ExecutionResources(object_store_memory=waiting_bytes * planned.num_predictors)
    )
    filesystem, path = storage.filesystem(todo_uri)
    series = ray.data.read_parquet(path, filesystem=filesystem).repartition(
        target_num_rows_per_block=1
    )
    return (
        series.map(
            _DecoderActor,
            fn_constructor_kwargs={"run": run, "window": window, "config": config},
            compute=ray.data.ActorPoolStrategy(size=planned.num_decoders),
            num_cpus=1,
        )
        .map(
            _PredictorActor,
            fn_constructor_kwargs={"run": run, "config": config},
            compute=ray.data.ActorPoolStrategy(
                size=planned.num_predictors,
                max_tasks_in_flight_per_actor=SERIES_IN_FLIGHT_PER_PREDICTOR,
            ),
            num_cpus=1,
            num_gpus=1 if planned.num_gpus else 0,
        )
        .map(
            partial(_measure_and_store, run=run, window=window, config=config, results=results),
            compute=ray.data.TaskPoolStrategy(size=max(1, planned.num_predictors)),
            num_cpus=1,
        )
    )


def _follow(rows: ray.data.Dataset, remaining: int) -> None:
    """Run the pipeline, and say how far it is; rates count from when work on the first series began."""
    started, reported = time.time(), 0.0
    for done, row in enumerate(rows.iter_rows(), start=1):
        started = row["started_at"] if done == 1 else min(started, row["started_at"])
        if row["status"] == Status.FAILED:
            key, reason = row["series_key"], row["reason"]
            logger.warning(
                "series %s failed: %s", key, reason, extra={"series_key": key, "reason": reason}
            )
        now = time.time()
        if now - reported >= PROGRESS_EVERY_S or done == remaining:
            rate = done / max(now - started, 1e-3)
            left_s = (remaining - done) / rate
            extra = {"done": done, "remaining": remaining - done, "left_s": round(left_s)}
            logger.info(
                "%d of %d series, %.1f a minute, %.0f s left",
                done,
                remaining,
                rate * 60,
                left_s,
                extra=extra,
            )
            reported = now
    logger.info(
        "%d series in %.1f s since work on the first began", remaining, time.time() - started
    )
