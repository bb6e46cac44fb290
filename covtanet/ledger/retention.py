"""Removal of files that a ledger needs no more: abandoned work, old listings, old results."""

import logging
from datetime import date

from covtanet import storage
from covtanet.ledger.read import committed_files
from covtanet.ledger.run import KnownRun

logger = logging.getLogger(__name__)

RESULTS = "_results"


def remove_abandoned_work(work_root: str, runs: list[KnownRun], before: date) -> None:
    """Remove the work of runs that began before a day and never were committed.

    Their rows can be made again.
    """
    for run in runs:
        if not run.is_committed and run.begun_on < before:
            storage.delete_folder(storage.join(work_root, run.run_id))
            logger.info(
                "removed the work of run %s, begun on %s and never committed",
                run.run_id,
                run.begun_on,
            )


def remove_old_listings(work_root: str, runs: list[KnownRun]) -> None:
    """Keep the folders of the last whole listing for each archive and name of a model.

    The next incremental run reads these; older ones are of no use.
    """
    whole = [run for run in runs if run.is_committed and not run.description.get("limit")]
    newest = {run.listing_of: run.run_id for run in whole if not run.is_ahead}
    for run in whole:
        if run.run_id not in newest.values():
            storage.delete(storage.join(work_root, run.run_id, "folders.parquet"))


def remove_old_results(ledger: str, before: date) -> None:
    """Remove masks and previews of committed runs with a date before a day."""
    with_results = set(storage.list_names(storage.join(ledger, RESULTS)))
    for uri in committed_files(ledger):
        folder, name = uri.rsplit("/", 2)[-2:]
        run_date = folder.removeprefix("date=")
        run_id = name.removesuffix(".parquet")
        if run_id in with_results and run_date < before.isoformat():
            storage.delete_folder(storage.join(ledger, RESULTS, run_id))
            logger.info("removed masks and previews of run %s of %s", run_id, run_date)
