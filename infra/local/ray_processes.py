"""Processes of one Ray among all processes of the machine, to signal one of them."""

import contextlib
import signal
from collections.abc import Iterator, Mapping

import psutil


def ray_processes(environment: Mapping[str, str], text: str) -> Iterator[psutil.Process]:
    """Yield processes of this environment's Ray whose command line holds a text."""
    token = environment["RAY_AUTH_TOKEN_PATH"]
    for process in psutil.process_iter(["cmdline"]):
        with contextlib.suppress(psutil.Error):
            if text not in " ".join(process.info["cmdline"] or ()):
                continue
            # A decoder's child has an empty environment, and only root may read that of its parent:
            # Ray's own process above both tells which Ray they belong to.
            family = (process, *process.parents())
            if any(_token_of(member) == token for member in family):
                yield process


def signal_first(
    environment: Mapping[str, str], text: str, sent: signal.Signals = signal.SIGKILL
) -> bool:
    """Signal the first such process; return whether there was one."""
    for process in ray_processes(environment, text):
        with contextlib.suppress(psutil.Error):
            process.send_signal(sent)
            return True
    return False


def _token_of(process: psutil.Process) -> str | None:
    try:
        environment: dict[str, str] = process.environ()
        return environment.get("RAY_AUTH_TOKEN_PATH")
    except psutil.Error:
        return None
