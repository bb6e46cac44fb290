"""Write a run as one HTML file: the night at a glance, and its worst studies with their pictures.

covtanet report --ledger URI [--run RUN_ID] [--results URI]

Without --run the newest committed run. The file is LEDGER/_reports/DATE-RUN_ID.html; it needs no
network and no server. It holds at most 200 studies, the worst first, and those names of studies
that the ledger holds. A picture that cannot be read is left out, and counted at the end. Exit
codes:

0  written
1  storage or this software failed; the same command continues
2  wrong arguments
3  nothing to report
4  written without some pictures that storage did not give

Research use only, not a medical device.
"""

import argparse
from collections.abc import Sequence

from covtanet.report.night_report import make_report
from covtanet.runtime import ExitCode, location, parser, run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command(report, parse(argv))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    options = parser(__doc__, "report")
    options.add_argument("--ledger", required=True, help="folder or s3:// prefix of the ledger")
    options.add_argument("--run", default="", help="run id; default: the newest committed run")
    options.add_argument(
        "--results", default="", help="location of the run's pictures; default: LEDGER/_results"
    )
    return options.parse_args(argv)


def report(arguments: argparse.Namespace) -> int:
    """Write the page and print its URI."""
    ledger = location(arguments.ledger, "--ledger")
    target, outcomes = make_report(ledger, arguments.run, arguments.results)
    print(target)
    return ExitCode.BELOW_BOUND if outcomes["storage"] else ExitCode.DONE
