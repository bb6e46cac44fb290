"""Read a ledger: its current view, the counts of a run, the difference of two runs. Needs no Ray.

covtanet ledger LEDGER view [--out FILE]   newest row of every series: counts, .parquet or .csv
covtanet ledger LEDGER runs                every committed run with its counts
covtanet ledger LEDGER run RUN_ID          one run: rows by status and reason
covtanet ledger LEDGER diff RUN_ID RUN_ID  values that differ, series by series
covtanet ledger LEDGER diff --flips [--with LEDGER] [RUN_ID [RUN_ID]] [--out FILE.html]
    diagnoses and severities that flipped, shifts and agreement, as of champion and challenger;
    without run ids the newest run of each ledger

Exit codes: 0 done (diff: no difference), 1 storage or this software failed, 2 wrong arguments,
3 nothing to read, 4 the runs differ (with --flips: some series could not be compared).

Research use only, not a medical device.
"""

import argparse
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from covtanet.errors import ConfigError, Status, error_location
from covtanet.ledger.accounting import ACCOUNTED_COLUMNS, Accounting
from covtanet.ledger.diff import differences
from covtanet.ledger.read import (
    committed_files,
    find_run_file,
    for_spreadsheet,
    read_run,
)
from covtanet.ledger.schema import LEDGER_SCHEMA
from covtanet.ledger.view import iter_newest_rows
from covtanet.report.summary import findings
from covtanet.report.summary import table as summary_table
from covtanet.runtime import ExitCode, location, parser, run_command

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command(answer, parse(argv))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    options = parser(__doc__, "ledger")
    options.add_argument("ledger", help="folder or s3:// prefix of the ledger")
    commands = options.add_subparsers(dest="command", required=True)
    view = commands.add_parser("view", help="the newest row of every series")
    view.add_argument("--out", type=Path, help="FILE.parquet or FILE.csv; without it, counts")
    commands.add_parser("runs", help="every committed run")
    commands.add_parser("run", help="the counts of a run").add_argument("run_id")
    diff = commands.add_parser("diff", help="the difference of two runs")
    diff.add_argument("before", nargs="?", default="", help="run id; default: the newest run")
    diff.add_argument("after", nargs="?", default="", help="run id; default: the newest run")
    diff.add_argument("--with", dest="other", help="ledger of the second run; default: the same")
    diff.add_argument("--flips", action="store_true", help="compare diagnoses instead of values")
    diff.add_argument("--out", type=Path, help="with --flips: an HTML file")
    arguments = options.parse_args(argv)
    check_arguments(options, arguments)
    return arguments


def check_arguments(options: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """End with a usage error if the arguments do not fit together."""
    if arguments.command == "view":
        if arguments.out and arguments.out.suffix not in (".parquet", ".csv"):
            options.error("--out is FILE.parquet or FILE.csv")
    elif arguments.command == "diff":
        has_both = arguments.before and arguments.after
        if not arguments.other and not has_both:
            options.error("diff needs two run ids, or --with LEDGER")


def answer(arguments: argparse.Namespace) -> int:
    """Print the answer of a subcommand."""
    ledger = location(arguments.ledger, "LEDGER")
    if arguments.command == "run":
        table = read_run(find_run_file(ledger, arguments.run_id), ACCOUNTED_COLUMNS)
        print(counts_of(f"Run {arguments.run_id}", [table]))
        return ExitCode.DONE
    if arguments.command == "diff":
        other = location(arguments.other, "--with") if arguments.other else ledger
        before = newest_or(ledger, arguments.before)
        after = newest_or(other, arguments.after)
        return flips(before, after, arguments.out) if arguments.flips else diff(before, after)
    if not committed_files(ledger):
        raise ConfigError("no run is committed in this ledger")
    if arguments.command == "runs":
        print("\n".join(line_of(uri) for uri in committed_files(ledger)))
    elif arguments.out:
        write(iter_newest_rows(ledger), arguments.out)
    else:
        print(counts_of("Current view", iter_newest_rows(ledger, ACCOUNTED_COLUMNS)))
    return ExitCode.DONE


def newest_or(ledger: str, run_id: str) -> pa.Table:
    """Return the rows of a run, or of the newest run of a ledger.

    Raises:
        ConfigError: there is none.
    """
    committed = committed_files(ledger)
    if not committed:
        raise ConfigError("no run is committed in this ledger")
    return read_run(find_run_file(ledger, run_id) if run_id else committed[-1])


def diff(before: pa.Table, after: pa.Table) -> int:
    """Print every value that differs."""
    lines = differences(before, after)
    print("\n".join(lines) or "no difference")
    return ExitCode.BELOW_BOUND if lines else ExitCode.DONE


def flips(before: pa.Table, after: pa.Table, out: Path | None) -> int:
    """Print the comparison of two models; write it as a page too if asked to."""
    # It imports scikit-learn, which the other subcommands do without.
    from covtanet.report.comparison import compare

    comparison = compare(before, after)
    title = f"{model_of(before)} and {model_of(after)}"
    print(comparison.as_table(title))
    if out:
        out.write_text(comparison.as_html(title))
    for key, error in comparison.failures.items():
        extra = {"series_key": key}
        logger.error("series %s: internal error, %s", key, error_location(error), extra=extra)
    return ExitCode.BELOW_BOUND if comparison.failures else ExitCode.DONE


def model_of(table: pa.Table) -> str:
    """Return name and version of the model of a run."""
    if not table.num_rows:
        return "no model"
    return f"{table['model_name'][0].as_py()} version {table['model_version'][0].as_py()}"


def line_of(uri: str) -> str:
    """Return date, run id and counts of a committed run."""
    date, name = uri.rsplit("/", 2)[-2:]
    counts = Counter(read_run(uri, ["status"])["status"].to_pylist())
    by_status = ", ".join(f"{counts[status]} {status}" for status in Status)
    run_id = name.removesuffix(".parquet")
    return f"{date.removeprefix('date=')}  {run_id}  {counts.total()} series: {by_status}"


def counts_of(title: str, tables: Iterable[pa.Table]) -> str:
    """Return rows by status, reasons by number, and findings, as a table."""
    counts = Accounting()
    for table in tables:
        counts.add(table)
    lines: list[tuple[str, object]] = [("series", counts.series), ("screened", counts.screened)]
    for status, number, reasons in (
        (Status.REJECTED, counts.rejected.total(), counts.rejected),
        (Status.FAILED, counts.failed, counts.failures),
    ):
        lines.append((status, number))
        lines += [(f"  {reason}", count) for reason, count in sorted(reasons.items())]
    return summary_table(title, [*lines, *findings(counts)])


def write(tables: Iterable[pa.Table], path: Path) -> None:
    """Write the view as Parquet or CSV, table by table."""
    if path.suffix == ".parquet":
        with pq.ParquetWriter(path, LEDGER_SCHEMA, compression="zstd") as parquet:
            for table in tables:
                parquet.write_table(table.cast(LEDGER_SCHEMA))
        return
    schema = for_spreadsheet(LEDGER_SCHEMA.empty_table()).schema
    with pa_csv.CSVWriter(path, schema) as csv:
        for table in tables:
            csv.write_table(for_spreadsheet(table))
