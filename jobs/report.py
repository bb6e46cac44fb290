"""Write a run as one HTML file: the night at a glance, and its worst studies with their pictures.

python jobs/report.py --ledger URI [--run RUN_ID] [--results URI]

Without --run the newest committed run. The file is LEDGER/_reports/DATE-RUN_ID.html; it needs no network and no
server. It holds at most 200 studies, the worst first, and those names of studies that the ledger holds. A picture that
cannot be read is left out, and counted at the end.

Exit codes: 0 written, 2 usage, 3 nothing to report, 4 written without some pictures that storage did not give,
1 storage refuses us or does not answer, or anything else.

Research use only, not a medical device.
"""

import logging
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from cluster import parser, place, start_logging

from covtanet import storage
from covtanet.errors import ConfigError, Status
from covtanet.ledger.read import committed_files, find_run_file, read_run
from covtanet.report import worklist

logger = logging.getLogger("covtanet.report")
NUM_READ_THREADS = 8


def main() -> int:
    """Write the report."""
    options = parser(__doc__)
    options.add_argument("--ledger", required=True, help="folder or s3:// prefix of the ledger")
    options.add_argument("--run", default="", help="run id; default: the newest committed run")
    options.add_argument(
        "--results", default="", help="where the run wrote pictures; default: LEDGER/_results"
    )
    arguments = options.parse_args()
    start_logging()
    try:
        target, outcomes = make_report(
            place(arguments.ledger, "--ledger"), arguments.run, arguments.results
        )
    except ConfigError as error:
        logger.error("%s", error)
        return 3
    except OSError as error:  # its text may name a study
        logger.error("storage: %s; the same command continues", type(error).__name__)
        return 1
    print(target)
    return 4 if outcomes["storage"] else 0


def write_report(ledger: str, run_id: str, results: str) -> str:
    """Where the report lies; see ``make_report``."""
    return make_report(ledger, run_id, results)[0]


def make_report(ledger: str, run_id: str, results: str) -> tuple[str, Counter[str]]:
    """Write the report; where it lies, and how many studies are shown, without_picture, or lack it by storage.

    Raises:
        ConfigError: there is no such run.
        AccessError: storage refuses us altogether.
    """
    committed = committed_files(ledger)
    if not committed:
        raise ConfigError("this ledger has no committed run")
    uri = find_run_file(ledger, run_id) if run_id else committed[-1]
    table = read_run(uri)
    run_date, name = uri.rsplit("/", 2)[-2:]
    run_id = name.removesuffix(".parquet")
    folder = storage.join(
        storage.absolute(results) if results else storage.join(ledger, "_results"), run_id
    )

    def picture(row: dict[str, object]) -> tuple[str, bytes, str]:
        key = str(row["series_key"])
        try:
            return key, storage.read_bytes(storage.join(folder, key, "preview.png")), "shown"
        except FileNotFoundError:
            return key, b"", "without_picture"
        except storage.AccessError:
            raise
        except OSError as error:
            logger.warning(
                "series %s: no picture, storage: %s",
                key,
                type(error).__name__,
                extra={"series_key": key},
            )
            return key, b"", "storage"

    rows = [row for row in worklist.page(table)["rows"] if row["status"] == Status.SCREENED]
    with ThreadPoolExecutor(NUM_READ_THREADS) as pool:
        found = list(pool.map(picture, rows))
    pictures = {key: png for key, png, _ in found if png}
    outcomes = Counter(outcome for _, _, outcome in found)
    target = storage.join(ledger, "_reports", f"{run_date.removeprefix('date=')}-{run_id}.html")
    storage.write_bytes(target, worklist.report(table, pictures).encode())
    counted = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    logger.info("%d rows; of the studies listed %s", table.num_rows, counted or "none")
    return target, outcomes


if __name__ == "__main__":
    sys.exit(main())
