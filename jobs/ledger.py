"""Read a ledger: its current view, the accounting of a run, the difference of two runs.

python jobs/ledger.py LEDGER view [--out FILE]      the newest row of every series, as .parquet or .csv, or counted
python jobs/ledger.py LEDGER runs                   every committed run with its counts
python jobs/ledger.py LEDGER run RUN_ID             one run: how many rows, by status and reason
python jobs/ledger.py LEDGER diff RUN_ID RUN_ID     where two runs differ, series by series

Exit codes: 0 done (diff: no difference), 1 the runs differ, 2 usage, 3 nothing to read. No Ray is needed.
"""

import argparse
import logging
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from cluster import parser, place, start_logging

from covtanet.errors import ConfigError, Status
from covtanet.ledger.accounting import Accounting
from covtanet.ledger.diff import differences
from covtanet.ledger.read import (
    committed_files,
    find_run_file,
    for_spreadsheet,
    newest_rows,
    read_run,
)
from covtanet.report.summary import findings
from covtanet.report.summary import table as summary_table

logger = logging.getLogger("covtanet.ledger")
COUNTED = ["status", "reason", "diagnosis", "severity", "severity_by_involvement"]


def parse() -> argparse.Namespace:
    """Read the command line."""
    options = parser(__doc__)
    options.add_argument("ledger", help="folder or s3:// prefix of the ledger")
    commands = options.add_subparsers(dest="command", required=True)
    newest = commands.add_parser("view", help="the newest row of every series")
    newest.add_argument(
        "--out", type=Path, help="FILE.parquet or FILE.csv; without it the view is counted"
    )
    commands.add_parser("runs", help="every committed run")
    commands.add_parser("run", help="the accounting of a run").add_argument("run_id")
    two = commands.add_parser("diff", help="the difference of two runs")
    two.add_argument("one")
    two.add_argument("other")
    arguments = options.parse_args()
    if (
        arguments.command == "view"
        and arguments.out
        and arguments.out.suffix not in (".parquet", ".csv")
    ):
        options.error("--out is FILE.parquet or FILE.csv")
    return arguments


def main() -> int:
    """Run a command."""
    arguments = parse()
    start_logging()
    try:
        return answer(arguments, place(arguments.ledger, "LEDGER"))
    except ConfigError as error:
        logger.error("%s", error)
        return 3
    except OSError as error:
        logger.error("storage: %s", type(error).__name__)
        return 3


def answer(arguments: argparse.Namespace, ledger: str) -> int:
    """Print what was asked for."""
    if arguments.command == "run":
        print(counted(f"Run {arguments.run_id}", read_run(find_run_file(ledger, arguments.run_id))))
    elif arguments.command == "diff":
        tables = [
            read_run(find_run_file(ledger, run_id)) for run_id in (arguments.one, arguments.other)
        ]
        found = differences(*tables)
        print("\n".join(found) or "no difference")
        return 1 if found else 0
    elif not committed_files(ledger):
        raise ConfigError("no run is committed in this ledger")
    elif arguments.command == "runs":
        for uri in committed_files(ledger):
            date, name = uri.rsplit("/", 2)[-2:]
            counts = Counter(read_run(uri, ["status"])["status"].to_pylist())
            parts = ", ".join(f"{counts[status]} {status}" for status in Status)
            print(
                f"{date.removeprefix('date=')}  {name.removesuffix('.parquet')}  {counts.total()} series: {parts}"
            )
    elif arguments.out:
        write(newest_rows(ledger), arguments.out)
    else:
        print(counted("Current view", newest_rows(ledger, COUNTED)))
    return 0


def counted(title: str, table: pa.Table) -> str:
    """Rows of a ledger by status, refusals by reason, and what was found."""
    counts = Accounting()
    for row in table.select(COUNTED).to_pylist():
        counts.add(row)
    lines: list[tuple[str, object]] = [("series", counts.series), ("screened", counts.screened)]
    for status, number, reasons in (
        ("rejected", counts.rejected.total(), counts.rejected),
        ("failed", counts.failed, counts.failures),
    ):
        lines += [
            (status, number),
            *((f"  {reason}", count) for reason, count in sorted(reasons.items())),
        ]
    return summary_table(title, [*lines, *findings(counts)])


def write(table: pa.Table, path: Path) -> None:
    """Write the view."""
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        pa_csv.write_csv(for_spreadsheet(table), path)


if __name__ == "__main__":
    sys.exit(main())
