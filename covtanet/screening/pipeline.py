"""The screening on Ray Data: decoders, predictors and measuring, one series per row.

What crosses between workers is the network's input and packed masks, never a raw volume, and as few
series at a time as keep every worker busy.
"""

import logging
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import ray
import ray.data
from ray.util import metrics

from covtanet import ray_data, runtime, storage
from covtanet.archive.manifest import MANIFEST_SCHEMA
from covtanet.ct.window import WindowConfig
from covtanet.errors import Status
from covtanet.ledger.attempts import MAX_ATTEMPTS
from covtanet.ledger.finished_rows import FinishedRows, finished_keys
from covtanet.ledger.record import ScreeningRecord
from covtanet.ledger.row_groups import RowGroupWriter
from covtanet.ledger.run import Run
from covtanet.ledger.series_keys import SeriesKeys
from covtanet.ledger.work import unfinished_series
from covtanet.screening.attempt_counter import AttemptCounter
from covtanet.screening.config import ScreeningConfig
from covtanet.screening.node_watch import NodesLostError, NodeWatch
from covtanet.screening.plan import Plan, make_plan
from covtanet.screening.worker_counts import WorkerCounts
from covtanet.screening.workers import Decoder, PredictorWorker, measure_and_keep

logger = logging.getLogger(__name__)

Row = dict[str, Any]
# Series may end several a second: a line for each would fill the log.
PROGRESS_EVERY_S = 10.0
# Bounds of the histogram, two a decade.
STAGE_SECONDS = [0.1, 0.3, 1, 3, 10, 30, 100]
# Choice: for the starts of workers between the attempts of a series, each of less than a minute.
WORKER_STARTS_S = 600.0
# Two, so that the next series is there when one is finished.
SERIES_IN_FLIGHT_PER_PREDICTOR = 2
# Bound of the object store: so many prepared series for every worker that makes or reads them. Ray
# Data reserves three quarters of it for what other stages may put there, and counts a series that
# is being decoded as if it were there; with 8 in all, one of six decoders worked.
SERIES_PER_WORKER = 6
# Blocks of manifest rows, by the bytes of their series in storage.
BLOCK_BYTES = 16 << 20
MAX_SERIES_PER_BLOCK = 64
BLOCKS_PER_DECODER = 16
SLICES_PER_SERIES = 128  # of an adult's lungs at 2.5 mm
# A prepared slice is uint16, its lesion map uint8.
BYTES_PER_PIXEL = 3


def screen(
    run: Run, config: ScreeningConfig, window: WindowConfig, model_folder: Path, results: str = ""
) -> None:
    """Screen every series of the manifest that has no row yet.

    window: the model's preprocessing. results: location for masks and previews; empty for none. If
    nodes are lost and no series moves any more, a new plan takes those that are left.
    """
    while True:
        try:
            _screen_by_plan(run, config, window, model_folder, results)
            return
        except NodesLostError as error:
            logger.warning("nodes were lost and no series moves: planning for the nodes left")
            # Nodes that replace the lost ones later get work.
            config = replace(config, max_nodes=max(config.max_nodes or 0, error.num_nodes))
            # As for a driver that was killed: the end of the plan is no attempt at a series.
            run = replace(run, driver=uuid.uuid4().hex)
            # Workers that wait for rows of the lost nodes end with the connection alone.
            ray.shutdown()
            runtime.connect()


def _screen_by_plan(
    run: Run, config: ScreeningConfig, window: WindowConfig, model_folder: Path, results: str
) -> None:
    """Screen every series that has no row yet on the nodes that there are.

    Raises:
        NodesLostError: the plan stands still.
    """
    # Importing torch takes seconds, which the modules of the other workers do without.
    from covtanet.model.model_files import model_files

    # One slow series must not hold back those behind it; the commit restores the order.
    timeout_s = no_progress_timeout_s(config)
    ray_data.configure(preserve_order=False, no_progress_timeout_s=timeout_s, callbacks=[NodeWatch])
    finished = finished_keys(run)
    plan = make_plan(run, config, finished)
    num_remaining = plan.num_series - plan.num_finished
    if plan.num_finished:
        logger.info("continuing: %d of %d series are finished", plan.num_finished, plan.num_series)
    if not num_remaining:
        return
    logger.info("screening %d series with %d decoders", num_remaining, plan.workers.num_decoders)
    # After the check for remaining series: a run that is finished uploads nothing.
    for name in model_files(model_folder):  # every node fetches them from there
        storage.upload(model_folder / name, run.work_uri("model", name))
    limit_object_store(window.size_px, plan.most_workers)
    screen_with(run, plan, _stages(run, config, window, results, plan), finished)


def screen_with(run: Run, plan: Plan, stages: "Stages", finished: SeriesKeys) -> None:
    """Lead the series of the manifest that are not finished through stages; store their rows."""
    filesystem, path = storage.filesystem(_write_remaining(run, finished))
    series = ray.data.read_parquet(path, filesystem=filesystem)
    with FinishedRows(run) as finished_rows:
        num_remaining = plan.num_series - plan.num_finished
        _follow(assemble(series, stages, plan), num_remaining, finished_rows)


def no_progress_timeout_s(config: ScreeningConfig) -> float:
    """Return the seconds after which a screening in which no row moves is ended.

    More than all attempts of a series that hangs: it ends as a row, and not the run.
    """
    return (MAX_ATTEMPTS + 1) * config.worker_timeout_s + WORKER_STARTS_S


def _write_remaining(run: Run, finished: SeriesKeys) -> str:
    """Write the series without a row to storage, for the workers; return the URI."""
    uri = run.work_uri("drivers", uuid.uuid4().hex, "todo.parquet")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "todo.parquet"
        with RowGroupWriter(path, MANIFEST_SCHEMA) as writer:
            for table in unfinished_series(run, finished):
                writer.write(table)
        storage.upload(path, uri)
    return uri


@dataclass(frozen=True, kw_only=True)
class Stages:
    """The work of each stage: two classes whose objects are called with a row, and a function."""

    decoder: type
    decoder_arguments: dict[str, Any]
    predictor: type
    predictor_arguments: dict[str, Any]
    measure: Callable[[Row], Row]


def _stages(
    run: Run, config: ScreeningConfig, window: WindowConfig, results: str, plan: Plan
) -> Stages:
    common: dict[str, Any] = {
        "run": run,
        "config": config,
        "begin_attempt": AttemptCounter(run).begin,
    }
    return Stages(
        decoder=Decoder,
        decoder_arguments={**common, "window": window},
        predictor=PredictorWorker,
        predictor_arguments={
            **common,
            "num_threads": plan.workers.cpus_per_predictor,
            "keeps_slices": bool(results),
        },
        measure=partial(_measure, **common, window=window, results=results),
    )


def assemble(series: ray.data.Dataset, stages: Stages, plan: Plan) -> ray.data.Dataset:
    """Lead rows through the stages, each with workers of its own.

    They fill the nodes that are there. More start after nodes have joined, and none before, since
    no stage gets CPUs that another one holds or needs for its next task.
    """
    workers = plan.workers
    most_workers = plan.most_workers
    return (
        series.repartition(target_num_rows_per_block=series_per_block(plan))
        .map(
            stages.decoder,
            fn_constructor_kwargs=stages.decoder_arguments,
            compute=ray.data.ActorPoolStrategy(
                min_size=workers.num_decoders, max_size=most_workers.num_decoders
            ),
            num_cpus=1,
        )
        .map(
            stages.predictor,
            fn_constructor_kwargs=stages.predictor_arguments,
            compute=ray.data.ActorPoolStrategy(
                min_size=workers.num_predictors,
                max_size=most_workers.num_predictors,
                max_tasks_in_flight_per_actor=SERIES_IN_FLIGHT_PER_PREDICTOR,
            ),
            num_cpus=workers.cpus_per_predictor,
            num_gpus=1 if plan.num_gpus else 0,
        )
        .map(
            stages.measure,
            compute=ray.data.TaskPoolStrategy(size=most_workers.num_measurers),
            num_cpus=1,
        )
    )


def series_per_block(plan: Plan) -> int:
    """Return the number of series that a worker takes at a time.

    A block that is lost or repeated costs all its series: one of usual size. A block costs Ray some
    30 ms, so that many small ones share it. At the end of the run no worker waits long for another.
    """
    num_remaining = plan.num_series - plan.num_finished
    by_end = num_remaining // (BLOCKS_PER_DECODER * plan.workers.num_decoders)
    # A PACS tells no sizes: its series are taken one by one.
    by_size = BLOCK_BYTES * plan.num_series // plan.num_bytes if plan.num_bytes else 1
    return max(1, min(by_end, by_size, MAX_SERIES_PER_BLOCK))


def limit_object_store(size_px: int, workers: WorkerCounts) -> None:
    """Bound the object store, so that memory does not grow with the archive.

    size_px: side of the network's slices.
    """
    series_bytes = SLICES_PER_SERIES * size_px**2 * BYTES_PER_PIXEL
    num_workers = workers.num_decoders + workers.num_predictors
    limits = ray.data.ExecutionResources(
        object_store_memory=SERIES_PER_WORKER * series_bytes * num_workers
    )
    ray.data.DataContext.get_current().execution_options.resource_limits = limits


def _measure(row: Row, **arguments: Any) -> Row:
    """Finish a series; return the record, of which the driver makes the ledger's row."""
    record = measure_and_keep(row, **arguments)
    columns = record.to_columns()
    _count(columns)
    return columns


@cache
def _meters() -> tuple[metrics.Counter, metrics.Histogram, metrics.Counter]:
    """Return the metrics of this worker, which Ray's agents collect."""
    series = metrics.Counter(
        "covtanet_series", "Series of screening jobs that are finished.", ("status", "reason")
    )
    seconds = metrics.Histogram(
        "covtanet_stage_seconds", "How long a stage took for a series.", STAGE_SECONDS, ("stage",)
    )
    num_bytes = metrics.Counter("covtanet_series_bytes", "Bytes of the series that are finished.")
    return series, seconds, num_bytes


def _count(columns: Row) -> None:
    series, seconds, num_bytes = _meters()
    series.inc(tags={"status": columns["status"], "reason": columns["reason"] or ""})
    for stage in ("decode", "predict"):
        if columns[f"{stage}_s"]:
            seconds.observe(columns[f"{stage}_s"], {"stage": stage})
    if columns["num_bytes"]:
        num_bytes.inc(columns["num_bytes"])


def _follow(rows: ray.data.Dataset, num_series: int, finished_rows: FinishedRows) -> None:
    """Run the pipeline, store the rows of its series and log its progress.

    Rates count from the start of work on the first series: the start of the workers is left out.
    """
    started_at = time.time()
    reported_at = 0.0
    for num_done, row in enumerate(rows.iter_rows(), start=1):
        finished_rows.add(ScreeningRecord.from_columns(row))
        is_first = num_done == 1
        # Rows come in any order, so that the earliest start is sought among all of them.
        started_at = row["started_at"] if is_first else min(started_at, row["started_at"])
        if row["status"] == Status.FAILED:
            _warn_of_failure(row["series_key"], row["reason"])
        now = time.time()
        if now - reported_at >= PROGRESS_EVERY_S or num_done == num_series:
            _report(num_done, num_series, now - started_at)
            reported_at = now
    logger.info(
        "%d series in %.1f s since work on the first began", num_series, time.time() - started_at
    )


def _warn_of_failure(series_key: str, reason: str) -> None:
    extra = {"series_key": series_key, "reason": reason}
    logger.warning("series %s failed: %s", series_key, reason, extra=extra)


def _report(num_done: int, num_series: int, elapsed_s: float) -> None:
    rate = num_done / max(elapsed_s, 1e-3)
    left_s = (num_series - num_done) / rate
    extra = {"done": num_done, "remaining": num_series - num_done, "left_s": round(left_s)}
    logger.info(
        "%d of %d series, %.1f a minute, %.0f s left",
        num_done,
        num_series,
        rate * 60,
        left_s,
        extra=extra,
    )
