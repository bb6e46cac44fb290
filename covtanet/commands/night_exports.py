"""Exports of nights to a DICOMweb server.

An export is noted before its night is marked, and the note goes when all is sent: what failed or
was killed is tried again by the next start, of that night or a later one, without screening again.
"""

import json
import logging
import sys
from collections.abc import Callable
from datetime import date

from covtanet import storage
from covtanet.ledger.read import find_run_file, read_run
from covtanet.ledger.retention import RESULTS
from covtanet.report.exportable import exportable_rows
from covtanet.runtime import ExitCode

logger = logging.getLogger(__name__)

PENDING = "_nightly_exports"
# A command and its arguments -> its exit code.
RunProcess = Callable[[list[str]], int]


def note_export(ledger: str, night: date, run_id: str) -> None:
    """Note that a committed night is to be exported, if it has series to export."""
    if exportable_rows(read_run(find_run_file(ledger, run_id)).to_pylist(), []):
        content = json.dumps({"night": night.isoformat(), "run_id": run_id})
        storage.write_bytes(uri_of_note(ledger, night), content.encode())


def drop_export(ledger: str, night: date) -> None:
    """Forget the export of a night, if it is still to be done."""
    storage.delete(uri_of_note(ledger, night))


def export_nights(ledger: str, server: str, run_process: RunProcess) -> int:
    """Export every night that is noted; return 0, or the exit code of an export that failed.

    Raises:
        OSError: storage fails.
    """
    worst: int = ExitCode.DONE
    for name in storage.list_names(storage.join(ledger, PENDING)):
        note = json.loads(storage.read_bytes(storage.join(ledger, PENDING, name)))
        code = run_process(export_command(ledger, note["run_id"], server))
        if code == ExitCode.DONE:
            drop_export(ledger, date.fromisoformat(note["night"]))
        else:
            logger.error("the export of the night of %s ended with %d", note["night"], code)
            worst = code
    return worst


def export_command(ledger: str, run_id: str, server: str) -> list[str]:
    """Return the command that exports a run; it ends without taking the alert with it."""
    return [
        sys.executable, "-m", "covtanet", "export", "--ledger", ledger, "--run", run_id,
        "--results", storage.join(ledger, RESULTS), "--to", server,
    ]  # fmt: skip


def uri_of_note(ledger: str, night: date) -> str:
    """Return the URI of the note that a night is to be exported."""
    return storage.join(ledger, PENDING, f"{night.isoformat()}.json")
