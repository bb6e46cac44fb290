"""Callback of Ray Train that logs every epoch to MLflow.

It lives in the train controller, so that workers may restart.
"""

import json
import time
from typing import Any

import ray.train

from covtanet import tracking
from covtanet.training.checkpoint import STATE

# A store that does not answer is left alone for so long: the workers wait for every attempt.
SILENT_S = 300.0


class MetricsToMlflow(ray.train.UserCallback):  # type: ignore[misc]
    """Logs a phase's epochs.

    An epoch that cannot be logged now is logged with a later one, or when the phase ends:
    checkpoints hold the whole history.
    """

    def __init__(self, run: tracking.RunAddress, label: str) -> None:
        self.run = run
        self.label = label
        self.silent_until = 0.0

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
    ) -> None:
        """Log the checkpoint's history, which is reduced over ranks; no error ends a training."""
        with tracking.tolerated("an epoch's metrics"):
            # The checkpoint, not the report: it also has the epochs that could not be logged.
            with checkpoint.filesystem.open_input_stream(f"{checkpoint.path}/{STATE}") as file:
                history = json.loads(file.read())["history"]
            # Of the process that Ray starts for the controller, this is the log.
            print(f"{self.label} epoch {len(history)}: {_shown(history[-1])}", flush=True)  # noqa: T201
            if time.monotonic() < self.silent_until:
                return
            # Set before the attempt and cleared after it, so that it stays if the attempt fails.
            self.silent_until = time.monotonic() + SILENT_S
            tracking.log_history(tracking.open_run(self.run), history, self.run.uri)
            self.silent_until = 0.0


def _shown(metrics: dict[str, float]) -> str:
    names = [name for name in metrics if name.startswith(("train_", "val_"))]
    return ", ".join(f"{name} {metrics[name]:.4g}" for name in names)
