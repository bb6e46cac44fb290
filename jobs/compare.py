"""Compare two runs of one archive, as those of champion and challenger: flips, shifts, agreement.

python jobs/compare.py --before LEDGER --after LEDGER [--before-run RUN_ID] [--after-run RUN_ID] [--out FILE.html]

Without run ids each ledger's newest committed run. Exit codes: 0 done, 2 usage, 3 nothing to compare, 4 done but for
series that met a fault of this software (type and place are in the log), 1 storage or anything else.

Research use only, not a medical device.
"""

import logging
import sys
from pathlib import Path

import pyarrow as pa
from cluster import parser, place, start_logging

from covtanet.errors import ConfigError, error_location
from covtanet.ledger.read import committed_files, find_run_file, read_run
from covtanet.report.comparison import compare

logger = logging.getLogger("covtanet.compare")


def main() -> int:
    """Print the comparison; with --out write it as a page too."""
    options = parser(__doc__)
    for name in ("before", "after"):
        options.add_argument(f"--{name}", required=True, help="folder or s3:// prefix of a ledger")
        options.add_argument(
            f"--{name}-run", default="", help="run id; default: the newest committed run"
        )
    options.add_argument("--out", type=Path, help="an HTML file")
    arguments = options.parse_args()
    start_logging()
    try:
        before = read(place(arguments.before, "--before"), arguments.before_run)
        after = read(place(arguments.after, "--after"), arguments.after_run)
    except ConfigError as error:
        logger.error("%s", error)
        return 3
    except OSError as error:
        logger.error("storage: %s", type(error).__name__)
        return 1
    found = compare(before, after)
    title = f"{model_of(before)} and {model_of(after)}"
    print(found.as_table(title))
    if arguments.out:
        arguments.out.write_text(found.as_html(title))
    for key, error in found.failures.items():
        logger.error(
            "series %s: internal error, %s", key, error_location(error), extra={"series_key": key}
        )
    return 4 if found.failures else 0


def read(ledger: str, run_id: str) -> pa.Table:
    """A committed run.

    Raises:
        ConfigError: where there is none.
    """
    committed = committed_files(ledger)
    if not committed:
        raise ConfigError("no run is committed in this ledger")
    return read_run(find_run_file(ledger, run_id) if run_id else committed[-1])


def model_of(table: pa.Table) -> str:
    """Name and version of the model that answered."""
    if not table.num_rows:
        return "no model"
    return f"{table['model_name'][0].as_py()} version {table['model_version'][0].as_py()}"


if __name__ == "__main__":
    sys.exit(main())
