"""A run as one HTML page with the pictures of its worst studies."""

import logging
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from covtanet import storage
from covtanet.errors import ConfigError, Status
from covtanet.ledger.read import committed_files, find_run_file, read_run
from covtanet.report import worklist

logger = logging.getLogger(__name__)

NUM_READ_THREADS = 8


def write_report(ledger: str, run_id: str, results: str) -> str:
    """Write the page and return its URI; see ``make_report``."""
    return make_report(ledger, run_id, results)[0]


def make_report(ledger: str, run_id: str, results: str) -> tuple[str, Counter[str]]:
    """Write ``LEDGER/_reports/DATE-RUN_ID.html``.

    run_id: empty for the newest committed run. results: location of the pictures; empty for
    ``LEDGER/_results``.

    Returns the URI, and the number of studies that are shown, without_picture, or lack their
    picture because storage failed.

    Raises:
        ConfigError: there is no such run.
        AccessError: the store refuses the credentials.
    """
    committed = committed_files(ledger)
    if not committed:
        raise ConfigError("this ledger has no committed run")
    uri = find_run_file(ledger, run_id) if run_id else committed[-1]
    date_folder, name = uri.rsplit("/", 2)[-2:]
    run_id = name.removesuffix(".parquet")
    results_root = storage.absolute(results) if results else storage.join(ledger, "_results")
    table = read_run(uri)
    rows = [row for row in worklist.page(table)["rows"] if row["status"] == Status.SCREENED]
    read = partial(_read_picture, storage.join(results_root, run_id))
    with ThreadPoolExecutor(NUM_READ_THREADS) as pool:
        read_pictures = list(pool.map(read, [str(row["series_key"]) for row in rows]))
    pictures = {key: png for key, png, _ in read_pictures if png}
    outcomes = Counter(outcome for _, _, outcome in read_pictures)
    file_name = f"{date_folder.removeprefix('date=')}-{run_id}.html"
    target = storage.join(ledger, "_reports", file_name)
    storage.write_bytes(target, worklist.report(table, pictures).encode())
    counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    logger.info("%d rows; of the studies listed %s", table.num_rows, counts or "none")
    return target, outcomes


def _read_picture(folder: str, series_key: str) -> tuple[str, bytes, str]:
    """Return series key, picture and outcome."""
    try:
        png = storage.read_bytes(storage.join(folder, series_key, "preview.png"))
    except FileNotFoundError:
        return series_key, b"", "without_picture"
    except storage.AccessError:
        raise
    except OSError as error:
        kind = type(error).__name__
        extra = {"series_key": series_key}
        logger.warning("series %s: no picture, storage: %s", series_key, kind, extra=extra)
        return series_key, b"", "storage"
    return series_key, png, "shown"
