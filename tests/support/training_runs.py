"""Trainings of phantoms on a real Ray: started, killed, continued, and compared with an undisturbed
one.
"""

import contextlib
import json
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from mlflow.tracking import MlflowClient
from nodes import Node, Nodes, processes
from safetensors.torch import load_file

from covtanet.phantoms.sampling import configs
from infra.local.jobs import Job, start_job

# A continued training sums the same numbers in the same order as an undisturbed one; only a thread
# pool may add them up in another order.
TOLERANCE = 1e-4
# Epochs of phase 1 and of phase 2, as in RECIPE.
EPOCHS = (4, 6)
PHANTOMS = tuple(configs(15, 31, size_px=64, num_slices=14))
RECIPE = """
[training]
dataset = "mosmed"
size = "small"
num_workers = 2
num_folds = 3
folds = [0]
validation_share = 0.3
{more}
[training.phase1]
num_epochs = 4
batch_size = 2
micro_batches = 2
learning_rate = 4e-3
decay = {decay}
decay_epochs = 1
[training.phase2]
num_epochs = 6
batch_size = 1
micro_batches = 2
learning_rate = 1e-3
"""


@dataclass
class TrainingRun:
    """One training command, which may be started again.

    storage: the URI that the command gets; stored: the folder on this disk that holds it. inside: a
    command that runs it, such as ``nsenter`` with its options.
    """

    environment: dict[str, str]
    folder: Path
    recipe: Path
    data: str
    storage: str
    stored: Path
    output: str = ""
    inside: tuple[str, ...] = ()

    @property
    def arguments(self) -> list[str]:
        """The command's arguments."""
        return [
            "--config", str(self.recipe), "--data", self.data, "--storage", self.storage,
            "--artifacts", str(self.folder / "artifacts"),
        ]  # fmt: skip

    def start(self) -> Job:
        """Start the command."""
        return start_job(self.environment, "train.py", *self.arguments, inside=self.inside)

    def run(self, expect: int = 0, timeout_s: float = 500) -> str:
        """Run the command to its end, check its exit code and return its output."""
        job = self.start()
        code = job.finish(timeout_s)
        if code != expect:
            raise AssertionError(f"exit code {code}, expected {expect}:\n{job.output[-4000:]}")
        self.output = job.output
        return job.output

    @property
    def fold(self) -> Path:
        """The fold's folder in storage."""
        (folder,) = self.stored.glob("covtanet-*/V7/fold0")
        return folder

    def checkpoints(self, phase: int) -> list[Path]:
        """Complete checkpoints of a phase, the newest last."""
        states = self.stored.glob(
            f"covtanet-*/V7/fold0/checkpoints/*phase{phase}/checkpoint_*/state.json"
        )
        return sorted(path.parent for path in states)

    def has_epochs(self, phase: int, count: int) -> Callable[[], bool]:
        """Return a condition that holds once the phase's newest checkpoint has ``count`` epochs."""

        def is_there() -> bool:
            checkpoints = self.checkpoints(phase)
            if not checkpoints:
                return False
            try:
                state = json.loads((checkpoints[-1] / "state.json").read_text())
            except (OSError, ValueError):  # it is being written, or was just cleaned up
                return False
            return len(state["history"]) >= count

        return is_there

    def has_finished(self, phase: int) -> Callable[[], bool]:
        """Return a condition that holds once a phase's outcome is in storage."""
        pattern = f"covtanet-*/V7/fold0/phase{phase}/phase.json"
        return lambda: any(self.stored.glob(pattern))

    def weights(self, phases: tuple[int, ...]) -> dict[str, torch.Tensor]:
        """The weights of finished phases, as PHASE/NAME."""
        weights: dict[str, torch.Tensor] = {}
        for phase in phases:
            state = load_file(self.fold / f"phase{phase}" / "weights.safetensors")
            weights |= {f"{phase}/{name}": value for name, value in state.items()}
        return weights

    def losses(self) -> list[float]:
        """Training loss of every epoch of both phases."""
        losses: list[float] = []
        for phase in (1, 2):
            described = json.loads((self.fold / f"phase{phase}" / "phase.json").read_text())
            losses += [epoch["train_loss"] for epoch in described["history"]]
        return losses

    def logged_epochs(self) -> dict[str, list[int]]:
        """Epochs logged by each run of the tracker, in order."""
        client = MlflowClient(tracking_uri=self.environment["MLFLOW_TRACKING_URI"])
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        runs = client.search_runs(experiments)
        names = [run.info.run_name for run in runs]
        assert len(set(names)) == len(names), f"runs appear twice: {names}"
        epochs = {}
        for run in runs:
            history = client.get_metric_history(run.info.run_id, "epoch")
            epochs[run.info.run_name] = sorted(metric.step for metric in history)
        return epochs


@dataclass(frozen=True, kw_only=True)
class TrainingSetup:
    """A Ray, phantoms in MosMedData's layout, and a folder for trainings of them."""

    environment: dict[str, str]
    folder: Path
    data: str

    def training(self, name: str, more: str = "", decay: float = 1.0) -> TrainingRun:
        """Return a training with storage and tracker apart from those of all others."""
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        recipe = folder / "recipe.toml"
        recipe.write_text(RECIPE.format(more=more, decay=decay))
        stored = folder / "storage"
        return TrainingRun(
            environment={
                **self.environment,
                "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
            },
            folder=folder,
            recipe=recipe,
            data=self.data,
            storage=str(stored),
            stored=stored,
        )


def training_of(name: str, nodes: Nodes, more: str = "") -> TrainingRun:
    """Return a training of ``s3://bucket/mosmed`` whose driver runs on the head."""
    setup = TrainingSetup(
        environment=nodes.environment, folder=nodes.folder, data="s3://bucket/mosmed"
    )
    return replace(
        setup.training(name, more),
        environment=nodes.environment,
        storage=f"s3://bucket/{name}",
        stored=nodes.bucket / "bucket" / name,
        inside=nodes.head.inside,
    )


def trains(node: Node) -> bool:
    """Return whether a worker of a training runs on a node."""
    return node.is_alive() and "RayTrainWorker" in processes(node)


def largest_difference(
    left: TrainingRun, right: TrainingRun, phases: tuple[int, ...]
) -> tuple[float, str]:
    """Return the largest difference of any weight, and its name.

    ``num_batches_tracked`` is left out: it counts the batches of one worker.
    """
    left_weights = left.weights(phases)
    right_weights = right.weights(phases)
    assert left_weights.keys() == right_weights.keys()
    differences = []
    for name, value in left_weights.items():
        if not name.endswith("num_batches_tracked"):
            apart = (value.double() - right_weights[name].double()).abs().max()
            differences.append((float(apart), name))
    return max(differences)


def check_same_weights(
    training: TrainingRun, clean: TrainingRun, phases: tuple[int, ...] = (1, 2)
) -> str:
    """Check weights against the undisturbed training's, and the runs logged; return a summary."""
    apart, name = largest_difference(training, clean, phases)
    assert apart <= TOLERANCE, f"{name} differs by {apart:g}, expected at most {TOLERANCE:g}"
    return f"weights differ by at most {apart:.1g}; {check_logged(training, phases)}"


def check_logged(training: TrainingRun, phases: tuple[int, ...] = (1, 2)) -> str:
    """Check that the tracker has one run per fold and phase, with every epoch once."""
    logged = training.logged_epochs()
    children = {name: epochs for name, epochs in logged.items() if "phase" in name}
    expected = {f"V7 fold 0 phase {phase}": list(range(EPOCHS[phase - 1])) for phase in phases}
    assert children == expected, logged
    num_expected = 1 + len(phases)
    assert len(logged) == num_expected, (
        f"{len(logged)} runs, expected a parent and {len(phases)} children"
    )
    return f"{len(logged)} runs, every epoch once"


def kill_worker(setup: TrainingSetup) -> None:
    """Kill the newest training worker of this Ray, as the kernel would."""
    token = setup.environment["RAY_AUTH_TOKEN_PATH"]
    workers = []
    for process in psutil.process_iter(["cmdline"]):
        with contextlib.suppress(psutil.Error):
            command = " ".join(process.info["cmdline"] or ())
            is_worker = "RayTrainWorker" in command
            if is_worker and process.environ().get("RAY_AUTH_TOKEN_PATH") == token:
                workers.append(process)
    max(workers, key=lambda process: process.pid).send_signal(signal.SIGKILL)


def kill_and_cut(training: TrainingRun) -> None:
    """Start a training, kill its driver in phase 1 and cut its newest checkpoint in half."""
    job = training.start()
    job.wait_for(training.has_epochs(1, 3))
    job.kill()
    cut_newest_checkpoint(training)


def cut_newest_checkpoint(training: TrainingRun) -> None:
    """Cut the newest checkpoint of phase 1 in half."""
    weights = training.checkpoints(1)[-1] / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
