"""The Ray of all nights, which is started anew once its node has died, as an operator would."""

import os
import secrets
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from benchmarks.measure import ROOT
from infra.local.ray_processes import ray_processes
from infra.local.services import Service, start_ray, write_private

# In the command line of the process that a node of Ray consists of.
RAYLET = "/raylet/raylet "


class Cluster:
    """A Ray of one node. variables: those of its workers and of the jobs."""

    def __init__(self, folder: Path, variables: dict[str, str]) -> None:
        self.folder = folder
        # Jobs and workers import this checkout, also if another one is installed.
        self.variables = {
            **variables,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        }
        self._stack = ExitStack()
        self._service: Service | None = None

    def __enter__(self) -> "Cluster":
        self.ensure_alive()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    @property
    def environment(self) -> dict[str, str]:
        """The environment in which jobs reach the Ray that runs now."""
        assert self._service is not None
        return {**os.environ, **self.variables, **self._service.environment}

    def ensure_alive(self) -> bool:
        """Start a Ray if none is alive; return whether one was started."""
        if self._service is not None and any(ray_processes(self.environment, RAYLET)):
            return False
        self._stack.close()
        # A token of its own: processes of a Ray that ends late are told from those of the new one.
        token = self.folder / f"token-{secrets.token_hex(4)}"
        write_private(token, secrets.token_hex(32))
        short = self._stack.enter_context(
            tempfile.TemporaryDirectory(prefix="cov", ignore_cleanup_errors=True)
        )
        log = self.folder / "ray.log"
        self._service = start_ray(log, self.variables, token, Path(short))
        self._stack.callback(self._service.stop)
        return True
