"""The ``covtanet`` program: one subcommand per job."""

import sys
from collections.abc import Sequence
from importlib import import_module

from covtanet.runtime import ExitCode

COMMANDS = {
    "screen": "screen an archive of chest CT into a ledger",
    "nightly": "screen the new studies of a night, report, alert",
    "ledger": "read a ledger: current view, counts, difference of two runs",
    "report": "write a run as one HTML page",
    "export": "write a run's results as DICOM SEG and SR",
    "train": "train the network in its two phases",
    "evaluate": "evaluate a model, or a training, into the paper's tables",
    "calibrate": "measure a model in bfloat16 and 8 bits, so that screening may use them",
    "promote": "make the challenger the champion if it is no worse",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; its modules are imported only then."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in COMMANDS:
        command = import_module(f"covtanet.commands.{arguments[0]}")
        return int(command.main(arguments[1:]))
    is_help = bool(arguments) and arguments[0] in ("-h", "--help")
    stream = sys.stdout if is_help else sys.stderr
    stream.write(_usage())
    return ExitCode.DONE if is_help else ExitCode.USAGE


def _usage() -> str:
    lines = [f"  {name:<10} {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        ["usage: covtanet COMMAND ...", "", *lines, "", "See covtanet COMMAND --help.", ""]
    )


if __name__ == "__main__":
    sys.exit(main())
