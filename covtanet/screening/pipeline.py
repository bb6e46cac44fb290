"""The screening of a manifest: one plan after the other, until every series has its row."""

import logging
import tempfile
import time
import uuid
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.data

from covtanet import ray_data, runtime, storage
from covtanet.archive.manifest import MANIFEST_SCHEMA
from covtanet.cluster import Turn
from covtanet.ct.window import WindowConfig
from covtanet.errors import AlreadyCommittedError, ConfigError, NodesLostError, Status
from covtanet.ledger.attempts import MAX_ATTEMPTS, AttemptsOfSeries
from covtanet.ledger.finished_rows import FinishedRows, finished_keys
from covtanet.ledger.record import ScreeningRecord
from covtanet.ledger.row_groups import RowGroupWriter
from covtanet.ledger.run import Run, is_committed
from covtanet.ledger.series_keys import SeriesKeys
from covtanet.ledger.work import unfinished_series
from covtanet.screening import metrics
from covtanet.screening.assembly import Stages, assemble, limit_object_store
from covtanet.screening.attempt_counter import AttemptCounter
from covtanet.screening.config import ScreeningConfig
from covtanet.screening.node_watch import NodeWatch
from covtanet.screening.plan import Plan, make_plan
from covtanet.screening.workers import Decoder, PredictorWorker, measure_and_keep

logger = logging.getLogger(__name__)

Row = dict[str, Any]
# Series may end several a second: a line for each would fill the log.
PROGRESS_EVERY_S = 10.0
# Choice: for the starts of workers between the attempts of a series, each of less than a minute.
WORKER_STARTS_S = 600.0


def screen(
    run: Run, config: ScreeningConfig, window: WindowConfig, model_folder: Path, results: str = ""
) -> None:
    """Screen every series of the manifest that has no row yet.

    window: the model's preprocessing. results: location for masks and previews; empty for none. If
    nodes are lost and no series moves any more, a new plan takes those that are left.

    Raises:
        NodesLostError: the nodes that are left have no room for a new plan.
    """
    attempts: AttemptsOfSeries = {}
    plan: Plan | None = None
    num_finished: int | None = None  # before the last plan that came to its end
    while True:
        finished = finished_keys(run)
        if plan is not None and len(finished) == plan.num_series:
            return
        if is_committed(run):  # whose rows are removed
            raise AlreadyCommittedError("another driver of this run committed meanwhile")
        with Turn() as turn:
            plan = _make_next_plan(run, config, finished, plan)
            # The commit tells of series that a whole plan could not finish.
            if plan.num_finished in (plan.num_series, num_finished):
                return
            num_finished = plan.num_finished
            counter = AttemptCounter(run, attempts)
            try:
                _screen_by_plan(
                    run, config, window, model_folder, results, plan, finished, counter, turn
                )
            except NodesLostError as error:
                logger.warning("%s: planning for the nodes left", error)
                # Nodes that replace the lost ones later get work.
                config = replace(config, max_nodes=max(config.max_nodes or 0, plan.num_nodes))
                num_finished = None
                # As for a driver that was killed: the end of the plan is no attempt at a series.
                run = replace(run, driver=uuid.uuid4().hex)
                attempts = counter.on_lost_nodes()
                turn.end()
                # Workers that wait for rows of the lost nodes end with the connection alone.
                ray.shutdown()
                runtime.connect()


def _make_next_plan(
    run: Run, config: ScreeningConfig, finished: SeriesKeys, previous: Plan | None
) -> Plan:
    """Plan the series that are left.

    previous: None at the start of the run, which may still be refused.

    Raises:
        NodesLostError: the nodes that are left have no room for a new plan, or no GPU for one that
            had GPUs.
    """
    # One slow series must not hold back those behind it; the commit sorts the rows.
    timeout_s = no_progress_timeout_s(config)
    ray_data.configure(preserve_order=False, no_progress_timeout_s=timeout_s, callbacks=[NodeWatch])
    try:
        plan = make_plan(run, config, finished)
    except ConfigError as error:
        if previous is None:
            raise
        raise NodesLostError(str(error)) from error
    if previous is not None and previous.num_gpus and not plan.num_gpus:
        raise NodesLostError("no GPU is left")
    if plan.num_finished:
        logger.info("continuing: %d of %d series are finished", plan.num_finished, plan.num_series)
    return plan


def _screen_by_plan(
    run: Run,
    config: ScreeningConfig,
    window: WindowConfig,
    model_folder: Path,
    results: str,
    plan: Plan,
    finished: SeriesKeys,
    counter: AttemptCounter,
    turn: Turn,
) -> None:
    """Screen every series that has no row yet on the nodes that there are.

    Raises:
        NodesLostError: the plan stands still.
    """
    # Importing torch takes seconds, which the modules of the other workers do without.
    from covtanet.model.model_files import model_files

    num_decoders = plan.workers.num_decoders
    logger.info("screening %d series with %d decoders", plan.num_remaining, num_decoders)
    # After the check for remaining series: a run that is finished uploads nothing.
    for name in model_files(model_folder):  # every node fetches them from there
        storage.upload(model_folder / name, run.work_uri("model", name))
    limit_object_store(window.size_px, plan.most_workers)
    common = {"run": run, "config": config, "begin_attempt": counter.begin}
    screen_with(run, plan, _stages(common, window, results, plan), finished, turn)


def screen_with(run: Run, plan: Plan, stages: Stages, finished: SeriesKeys, turn: Turn) -> None:
    """Lead the series of the manifest that are not finished through stages; store their rows.

    turn: ends with the first row, when all stages have workers.
    """
    uri = _write_remaining(run, finished)
    with (
        closing(FinishedRows(run)) as finished_rows,
        closing(metrics.Remaining(plan.num_remaining)) as remaining,
    ):
        rows = assemble(uri, stages, plan)
        _follow(rows, plan.num_remaining, finished_rows, remaining, turn)


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
        with closing(RowGroupWriter(path, MANIFEST_SCHEMA)) as writer:
            for table in unfinished_series(run, finished):
                writer.write(table)
        storage.upload(path, uri)
    return uri


def _stages(common: dict[str, Any], window: WindowConfig, results: str, plan: Plan) -> Stages:
    """Return the stages of a screening. common: arguments that all of them take."""
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


def _measure(row: Row, **arguments: Any) -> Row:
    """Finish a series; return the record, of which the driver makes the ledger's row."""
    started = time.monotonic()
    record = measure_and_keep(row, **arguments)
    metrics.observe_stage("measure", time.monotonic() - started)
    return record.to_columns()


def _follow(
    rows: ray.data.Dataset,
    num_series: int,
    finished_rows: FinishedRows,
    remaining: metrics.Remaining,
    turn: Turn,
) -> None:
    """Run the pipeline, store the rows of its series and log its progress.

    Rates count from the start of work on the first series: the start of the workers is left out.
    """
    started_at = time.time()
    reported_at = 0.0
    for num_done, row in enumerate(rows.iter_rows(), start=1):
        finished_rows.add(ScreeningRecord.from_columns(row))
        # Here, since the driver lives as long as the run: the first count of a process has no rate.
        metrics.count_series(row)
        is_first = num_done == 1
        if is_first:
            turn.end()
        # Rows come in any order, so that the earliest start is sought among all of them.
        started_at = row["started_at"] if is_first else min(started_at, row["started_at"])
        remaining.set(num_series - num_done)
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
    # A repeated block may bring series a second time.
    left_s = max(0, num_series - num_done) / rate
    extra = {"done": num_done, "remaining": num_series - num_done, "left_s": round(left_s)}
    logger.info(
        "%d of %d series, %.1f a minute, %.0f s left",
        num_done,
        num_series,
        rate * 60,
        left_s,
        extra=extra,
    )
