"""Jobs of this project as processes: started, watched, killed."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from infra.local.services import ROOT


@dataclass
class Job:
    """A job of this project as a process group; a thread collects its output line by line."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as output:
            for line in output:
                self.lines.append(line)

    @property
    def output(self) -> str:
        """Return the output so far."""
        return "".join(self.lines)

    def wait_for(self, is_there: Callable[[], bool], timeout_s: float = 240) -> None:
        """Wait until a condition holds while the job runs.

        Raises:
            RuntimeError: if the job ends or the time is over before that.
        """
        deadline = time.monotonic() + timeout_s
        while not is_there():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"the job did not come this far:\n{self.output[-4000:]}")
            time.sleep(0.1)

    def says(self, text: str, timeout_s: float = 240) -> None:
        """Wait until the job prints a text."""
        self.wait_for(lambda: text in self.output, timeout_s)

    def kill(self) -> None:
        """Kill the job's process group as a crash would."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._reader.join(10)

    def finish(self, timeout_s: float = 500) -> int:
        """Wait for the end and return the exit code."""
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        self._reader.join(10)
        return code


def start_job(
    environment: dict[str, str], script: str, *arguments: str, inside: Sequence[str] = ()
) -> Job:
    """Start a script of ``jobs/`` on the cluster that the environment names.

    inside: a command that runs another, such as ``nsenter`` with its options.
    """
    command = [*inside, sys.executable, str(ROOT / "jobs" / script), *arguments]
    return Job(
        subprocess.Popen(
            command,
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    )
