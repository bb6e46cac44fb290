"""Callback of Ray Train that prints every epoch and logs it to MLflow.

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
    """Prints every epoch of a phase, and logs its epochs with each checkpoint.

    Epochs that cannot be logged now are logged with a later checkpoint, or when the phase ends:
    checkpoints hold the whole history.
    """

    def __init__(self, run: tracking.RunAddress, label: str) -> None:
        self.run = run
        self.label = label
        self.silent_until = 0.0

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
    ) -> None:
        """Print the epoch, log the checkpoint's history; no error ends a training.

        metrics: of every rank, with a checkpoint if one was written after this epoch.
        """
        # Of the process that Ray starts for the controller, this is the log.
        print(  # noqa: T201
            f"{self.label} epoch {metrics[0]['num_epochs']}: {metrics[0]['summary']}", flush=True
        )
        if checkpoint is None:
            return
        with tracking.tolerated("an epoch's metrics"):
            # The checkpoint, not the report: it also has the epochs that could not be logged.
            with checkpoint.filesystem.open_input_stream(f"{checkpoint.path}/{STATE}") as file:
                history = json.loads(file.read())["history"]
            if time.monotonic() < self.silent_until:
                return
            # Set before the attempt and cleared after it, so that it stays if the attempt fails.
            self.silent_until = time.monotonic() + SILENT_S
            tracking.log_history(tracking.open_run(self.run), history, self.run.uri)
            self.silent_until = 0.0


def summary(metrics: dict[str, float]) -> str:
    """Return the losses and metrics of an epoch as one line."""
    names = [name for name in metrics if name.startswith(("train_", "val_"))]
    return ", ".join(f"{name} {metrics[name]:.4g}" for name in names)
