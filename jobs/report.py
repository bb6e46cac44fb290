"""Write a run as one HTML file: the night at a glance, and its worst studies with their pictures.

python jobs/report.py --ledger URI [--run RUN_ID] [--results URI]

Without --run the newest committed run. The file is LEDGER/_reports/DATE-RUN_ID.html; it needs no network and no
server. It holds at most 200 studies, the worst first, and those names of studies that the ledger holds.

Research use only, not a medical device.
"""

import logging
import sys
from concurrent.futures import ThreadPoolExecutor

from cluster import parser, place, start_logging

from covtanet import storage
from covtanet.errors import ConfigError
from covtanet.report import worklist
from covtanet.screening import view

logger = logging.getLogger("covtanet.report")
NUM_READ_THREADS = 8


def main() -> int:
    """Write the report; 3 where there is nothing to report."""
    options = parser(__doc__)
    options.add_argument("--ledger", required=True, help="folder or s3:// prefix of the ledger")
    options.add_argument("--run", default="", help="run id; default: the newest committed run")
    options.add_argument("--results", default="", help="where the run wrote pictures; default: LEDGER/_results")
    arguments = options.parse_args()
    start_logging()
    try:
        print(write_report(place(arguments.ledger, "--ledger"), arguments.run, arguments.results))
    except ConfigError as error:
        logger.error("%s", error)
        return 3
    return 0


def write_report(ledger: str, run_id: str, results: str) -> str:
    """Where the report lies.

    Raises:
        ConfigError: where there is no such run.
    """
    committed = view.committed_files(ledger)
    if not committed:
        raise ConfigError("this ledger has no committed run")
    uri = view.file_of(ledger, run_id) if run_id else committed[-1]
    table = view.read(uri)
    run_date, name = uri.rsplit("/", 2)[-2:]
    run_id = name.removesuffix(".parquet")
    folder = storage.join(storage.absolute(results) if results else storage.join(ledger, "_results"), run_id)

    def picture(row: dict[str, object]) -> tuple[str, bytes]:
        key = str(row["series_key"])
        try:
            return key, storage.read_bytes(storage.join(folder, key, "preview.png"))
        except FileNotFoundError:
            return key, b""

    rows = [row for row in worklist.page(table)["rows"] if row["status"] == "screened"]
    with ThreadPoolExecutor(NUM_READ_THREADS) as pool:
        pictures = {key: png for key, png in pool.map(picture, rows) if png}
    target = storage.join(ledger, "_reports", f"{run_date.removeprefix('date=')}-{run_id}.html")
    storage.write_bytes(target, worklist.report(table, pictures).encode())
    logger.info("%d rows, %d pictures", table.num_rows, len(pictures))
    return target


if __name__ == "__main__":
    sys.exit(main())
