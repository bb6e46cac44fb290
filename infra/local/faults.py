"""make faults: real kills against real jobs, each told as fault, outcome required, outcome seen.

``--suite screening`` screens an archive in an S3 server of its own and kills what takes part. ``--suite training``
trains small phantoms on a Ray of its own, kills a worker, the driver, the tracker, cuts a checkpoint, and compares what
the continued training ends with to that of one that nobody disturbed. ``--suite serve`` disturbs an endpoint.
"""

import argparse
import contextlib
import json
import os
import re
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import faults_serving
import psutil
import torch
from faults_screening import SCREENING, Screening, fill
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file
from services import (
    LOOPBACK,
    Job,
    Service,
    free_ports,
    start_job,
    start_mlflow,
    start_ray,
    start_s3,
    write_private,
)
from slow import SlowDoor

from covtanet.phantoms.sampling import configs
from covtanet.phantoms.training_set import write_mosmed

# Both runs are the same sums in the same order; what differs at most is how a thread pool adds them up.
TOLERANCE = 1e-4
# One worker adds up in another order than two. Phase 2's batch norm, here over the 16 values of one volume's map, makes
# more of that than of anything: features changed by 1e-4 of themselves move its running means by 0.3, losses by 6e-3.
CURVE_TOLERANCE = 0.02
EPOCHS = (4, 6)
PHANTOMS = tuple(configs(15, 31, size_px=64, num_slices=14))
RECIPE = """
[training]
dataset = "mosmed"
size = "small"
num_folds = 3
folds = [0]
validation_share = 0.3
{more}
[training.phase1]
num_epochs = 4
batch_size = 2
learning_rate = 4e-3
decay = {decay}
decay_epochs = 1
[training.phase2]
num_epochs = 6
batch_size = 1
learning_rate = 1e-3
"""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What every scenario shares: where Ray is, the phantoms, a folder, and the undisturbed training."""

    environment: dict[str, str]
    folder: Path
    data: str
    tolerance: float = TOLERANCE

    def training(self, name: str, more: str = "", decay: float = 1.0) -> "Training":
        """A training of its own storage and tracker."""
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        recipe = folder / "recipe.toml"
        recipe.write_text(RECIPE.format(more=more, decay=decay))
        environment = {**self.environment, "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
        stored = folder / "storage"
        return Training(
            environment=environment,
            folder=folder,
            recipe=recipe,
            data=self.data,
            storage=str(stored),
            stored=stored,
        )


@dataclass
class Training:
    """One training command, which may be started again; ``stored`` is where its storage lies on this disk."""

    environment: dict[str, str]
    folder: Path
    recipe: Path
    data: str
    storage: str
    stored: Path

    @property
    def arguments(self) -> list[str]:
        """What the command is called with."""
        return [
            "--config", str(self.recipe), "--data", self.data, "--storage", self.storage,
            "--artifacts", str(self.folder / "artifacts"),
        ]  # fmt: skip

    def start(self) -> Job:
        """Start the command."""
        return start_job(self.environment, "train.py", *self.arguments)

    def run(self, expect: int = 0) -> str:
        """Run the command to its end and return what it printed."""
        job = self.start()
        code = job.finish()
        if code != expect:
            raise AssertionError(f"exit code {code}, expected {expect}:\n{job.output[-4000:]}")
        return job.output

    @property
    def fold(self) -> Path:
        """The fold's folder in storage."""
        (found,) = self.stored.glob("covtanet-*/V7/fold0")
        return found

    def checkpoints(self, phase: int) -> list[Path]:
        """Complete checkpoints of a phase, the newest last."""
        found = self.stored.glob(
            f"covtanet-*/V7/fold0/checkpoints/*phase{phase}/checkpoint_*/state.json"
        )
        return sorted(path.parent for path in found)

    def has_epochs(self, phase: int, count: int) -> Callable[[], bool]:
        """Whether a phase has a checkpoint of this many epochs."""

        def is_there() -> bool:
            try:
                newest = self.checkpoints(phase)[-1:]
                return any(
                    len(json.loads((each / "state.json").read_text())["history"]) >= count
                    for each in newest
                )
            except (OSError, ValueError):  # it is being written, or cleaned up
                return False

        return is_there

    def weights(self, phases: tuple[int, ...]) -> dict[str, torch.Tensor]:
        """The weights of finished phases."""
        files = {
            phase: load_file(self.fold / f"phase{phase}" / "weights.safetensors")
            for phase in phases
        }
        return {
            f"{phase}/{name}": value
            for phase, state in files.items()
            for name, value in state.items()
        }

    def losses(self) -> list[float]:
        """Training loss of every epoch of both phases."""
        texts = [(self.fold / f"phase{phase}" / "phase.json").read_text() for phase in (1, 2)]
        return [epoch["train_loss"] for text in texts for epoch in json.loads(text)["history"]]

    def logged(self) -> dict[str, list[int]]:
        """Epochs logged by each run of the tracker, in order."""
        client = MlflowClient(tracking_uri=self.environment["MLFLOW_TRACKING_URI"])
        ids = [each.experiment_id for each in client.search_experiments()]
        runs = client.search_runs(ids)
        names = [run.info.run_name for run in runs]
        assert len(set(names)) == len(names), f"runs appear twice: {names}"
        return {
            run.info.run_name: sorted(
                metric.step for metric in client.get_metric_history(run.info.run_id, "epoch")
            )
            for run in runs
        }


def difference(one: Training, other: Training, phases: tuple[int, ...]) -> tuple[float, str]:
    """The largest difference of any weight, and whose it is; how many batches one worker saw is no weight."""
    first, second = one.weights(phases), other.weights(phases)
    assert first.keys() == second.keys()
    names = [name for name in first if not name.endswith("num_batches_tracked")]
    return max(
        (float((first[name].double() - second[name].double()).abs().max()), name) for name in names
    )


def check_like(
    training: Training,
    clean: Training,
    tolerance: float = TOLERANCE,
    phases: tuple[int, ...] = (1, 2),
) -> str:
    """Same weights as the undisturbed training, one run per fold and phase, every epoch once; says what was seen."""
    found, name = difference(training, clean, phases)
    assert found <= tolerance, f"{name} differs by {found:g}, expected at most {tolerance:g}"
    return f"weights differ by at most {found:.1g}; {check_logged(training, phases)}"


def check_logged(training: Training, phases: tuple[int, ...] = (1, 2)) -> str:
    """One run per fold and phase, every epoch once."""
    logged = training.logged()
    expected = {f"V7 fold 0 phase {phase}": list(range(EPOCHS[phase - 1])) for phase in phases}
    assert {name: epochs for name, epochs in logged.items() if "phase" in name} == expected, logged
    assert len(logged) == 1 + len(phases), (
        f"{len(logged)} runs, expected a parent and {len(phases)} children"
    )
    return f"{len(logged)} runs, every epoch once"


def kill_worker(setting: Setting) -> None:
    """Kill one of this Ray's training workers as the kernel would."""
    token = setting.environment["RAY_AUTH_TOKEN_PATH"]
    found = []
    for process in psutil.process_iter(["cmdline"]):
        with contextlib.suppress(psutil.Error):
            if "RayTrainWorker" in " ".join(process.info["cmdline"] or ()):
                found += [process] if process.environ().get("RAY_AUTH_TOKEN_PATH") == token else []
    max(found, key=lambda process: process.pid).send_signal(signal.SIGKILL)


def kill_workers_in(setting: Setting, clean: Training, phases: tuple[int, ...], name: str) -> str:
    """A worker killed in each of these phases: Ray restarts the group from the last checkpoint."""
    training = setting.training(name)
    job = training.start()
    for phase in phases:
        job.wait_for(training.has_epochs(phase, 2))
        kill_worker(setting)
        job.wait_for(lambda phase=phase: (training.fold / f"phase{phase}" / "phase.json").exists())  # type: ignore[misc]
    assert job.finish() == 0, job.output[-4000:]
    for phase in phases:
        found = [
            int(epoch)
            for epoch in re.findall(rf"phase {phase} continues after epoch (\d+)", job.output)
        ]
        assert min(found, default=0) >= 2, (
            f"phase {phase} did not continue from its checkpoint: {found}"
        )
    return check_like(training, clean, setting.tolerance)


def worker_in_phase_1(setting: Setting, clean: Training) -> str:
    """A worker killed while TA-SegNet is trained."""
    return kill_workers_in(setting, clean, (1,), "worker-1")


def worker_in_phase_2(setting: Setting, clean: Training) -> str:
    """A worker killed while the classifier is trained."""
    return kill_workers_in(setting, clean, (2,), "worker-2")


def driver(setting: Setting, clean: Training) -> str:
    """The driver killed in phase 1."""
    training = setting.training("driver")
    job = training.start()
    job.wait_for(training.has_epochs(1, 2))
    job.kill()
    output = training.run()
    assert "phase 1 continues after epoch" in output, "phase 1 started over"
    return check_like(training, clean, setting.tolerance)


def between_phases(setting: Setting, clean: Training) -> str:
    """The driver killed when phase 1 is finished and phase 2 has not begun."""
    training = setting.training("between")
    job = training.start()
    job.wait_for(lambda: any(training.stored.glob("covtanet-*/V7/fold0/phase1/phase.json")))
    job.kill()
    output = training.run()
    assert "phase 1 epoch" not in output, "phase 1 was trained again"
    described = json.loads((training.fold / "phase2" / "phase.json").read_text())
    first = json.loads((training.fold / "phase1" / "phase.json").read_text())
    assert described["phase1_sha256"] == first["sha256"]
    return check_like(training, clean, setting.tolerance)


def kill_and_cut(training: Training) -> None:
    """Start a training, kill its driver in phase 1 and cut its newest checkpoint."""
    job = training.start()
    job.wait_for(training.has_epochs(1, 3))
    job.kill()
    weights = training.checkpoints(1)[-1] / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def cut_checkpoint(setting: Setting, clean: Training) -> str:
    """The newest checkpoint cut: the one before it is taken."""
    training = setting.training("cut")
    kill_and_cut(training)
    output = training.run()
    assert "a checkpoint is left out" in output, "the cut checkpoint was taken"
    assert "phase 1 continues after epoch" in output, "phase 1 started over"
    return check_like(training, clean, setting.tolerance)


def cut_checkpoint_then_worker(setting: Setting, clean: Training) -> str:
    """The same, and as the training goes on, a worker killed: what make test keeps, in phase 1 alone."""
    training = setting.training("cut-worker", more="phases = [1]")
    kill_and_cut(training)
    job = training.start()
    job.says("phase 1 continues after epoch")
    kill_worker(setting)
    num_lines = len(job.lines)
    assert job.finish() == 0, job.output[-4000:]
    assert "a checkpoint is left out" in job.output, "the cut checkpoint was taken"
    assert "phase 1 continues after epoch" in "".join(job.lines[num_lines:]), (
        "the group was not started again"
    )
    return check_like(training, clean, setting.tolerance, phases=(1,))


def not_finite(setting: Setting, clean: Training) -> str:
    """A learning rate that leaps in the second epoch makes the loss no number."""
    training = setting.training("not-finite", decay=1e35)
    output = training.run(expect=4)
    found = re.search(
        r"V7 fold 0 phase 1: (the loss|a gradient) is no number; the batch holds ([0-9a-f]{16})",
        output,
    )
    assert found, "the message names no series"
    for checkpoint in training.checkpoints(1):
        for value in load_file(checkpoint / "weights.safetensors").values():
            assert torch.isfinite(value).all(), "a checkpoint holds a number that is none"
    assert not (training.fold / "phase1" / "phase.json").exists()
    return f"exit code 4, names series {found[2]}; {len(training.checkpoints(1))} checkpoint, finite; no outcome"


def tracker(setting: Setting, clean: Training) -> str:
    """MLflow's server killed half-way: the training ends, and started again publishes what the server missed."""
    training = setting.training("tracker", more="phases = [1]")
    (port,) = free_ports(1)
    server = start_mlflow(training.folder, port)
    training.environment = {**training.environment, **server.environment}
    try:
        job = training.start()
        job.wait_for(training.has_epochs(1, 2))
        os.killpg(server.process.pid, signal.SIGKILL)
        server.process.wait()
        assert job.finish(600) == 5, job.output[-4000:]
        server = start_mlflow(training.folder, port)
        output = training.run()
        assert "phase 1 epoch" not in output, "phase 1 was trained again"
        assert "trained " in output, output[-2000:]
        return check_like(training, clean, setting.tolerance, phases=(1,))
    finally:
        server.stop()


def bad_volume(setting: Setting, clean: Training) -> str:
    """A volume that is none: refused by name of its reason, never trained around in silence."""
    training = setting.training("bad-volume")
    data = training.folder / "data"
    write_mosmed(str(data), PHANTOMS, 2)
    (data / "studies/CT-0/study_0999.nii.gz").write_bytes(b"no volume")
    training.data = str(data)
    output = training.run(expect=3)
    assert "1 of 16 volumes are refused, see data_report.parquet" in output, output[-2000:]
    return "exit code 3; 1 of 16 volumes refused, in the data report"


def fewer_workers(setting: Setting, clean: Training) -> str:
    """The driver killed, then one worker instead of two: the same global batch."""
    training = setting.training("fewer")
    job = training.start()
    job.wait_for(training.has_epochs(1, 2))
    job.kill()
    training.recipe.write_text(
        training.recipe.read_text().replace("num_folds", "num_workers = 1\nnum_folds")
    )
    training.run()
    found = max(abs(a - b) for a, b in zip(training.losses(), clean.losses(), strict=True))
    assert found <= CURVE_TOLERANCE, (
        f"losses differ by {found:g}, expected at most {CURVE_TOLERANCE:g}"
    )
    return f"losses differ by at most {found:.1g}; {check_logged(training)}"


Scenario = Callable[[Setting, Training], str]
TRAINING: dict[str, tuple[Scenario, str]] = {
    "worker killed in phase 1": (worker_in_phase_1, "same weights; no epoch twice"),
    "worker killed in phase 2": (worker_in_phase_2, "same weights; no epoch twice"),
    "driver killed, started again": (driver, "goes on; same weights; runs continued"),
    "killed between the phases": (between_phases, "phase 2 from the frozen phase 1, by digest"),
    "newest checkpoint cut": (cut_checkpoint, "the one before is taken; same weights"),
    "two workers, then one": (
        fewer_workers,
        f"same global batch; every epoch's loss within {CURVE_TOLERANCE:g}",
    ),
    "loss is no number": (not_finite, "stops, names the series, saves nothing of it"),
    "MLflow server killed half-way": (tracker, "training ends, exit code tells; published later"),
    "a volume that is none": (bad_volume, "refused in the data report, not left out silently"),
}
SUITES = ("training", "screening", "serve")


def make_setting(environment: dict[str, str], folder: Path) -> Setting:
    """Phantoms in MosMedData's layout, twelve of them, for all scenarios."""
    write_mosmed(str(folder / "data"), PHANTOMS, 2)
    return Setting(environment=environment, folder=folder, data=str(folder / "data"))


Ready = dict[str, tuple[Callable[[], str], str]]


def ready_training(environment: dict[str, str], folder: Path) -> Ready:
    """The training scenarios, each ready to run, after the undisturbed training that they are compared with."""
    setting = make_setting(environment, folder)
    clean = setting.training("clean")
    clean.run()
    return {
        fault: (partial(scenario, setting, clean), required)
        for fault, (scenario, required) in TRAINING.items()
    }


def ready_screening(screening: Screening) -> Ready:
    """The screening scenarios, each ready to run, after the undisturbed run that they are compared with."""
    fill(screening)
    screening.run("clean")
    screening.clean = screening.table("clean")
    return {
        fault: (partial(scenario, screening), required)
        for fault, (scenario, required) in SCREENING.items()
    }


def ready_serving(serving: faults_serving.Serving) -> Ready:
    """The endpoint's scenarios, each ready to run, after an undisturbed request."""
    faults_serving.fill(serving)
    return {
        fault: (partial(scenario, serving), required)
        for fault, (scenario, required) in faults_serving.SERVING.items()
    }


def run_suite(scenarios: Ready) -> list[tuple[str, str, str, bool]]:
    """All scenarios of a suite: fault, required, seen, whether it is as required."""
    rows = []
    for fault, (scenario, required) in scenarios.items():
        print(f"{fault} ...", flush=True)
        started = time.monotonic()
        try:
            seen, is_good = scenario(), True
        except Exception as error:  # one scenario may not end the others
            seen, is_good = f"{type(error).__name__}: {error}".splitlines()[0], False
            print(error, flush=True)
        print(
            f"  {'as required' if is_good else 'NOT as required'}, {time.monotonic() - started:.0f} s: {seen}",
            flush=True,
        )
        rows.append((fault, required, seen, is_good))
    return rows


def main() -> int:
    """Run a suite on a Ray of its own and print its table."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--suite", choices=(*SUITES, "all"), default="all")
    options.add_argument("--only", default="", help="faults with this text in their name")
    arguments = options.parse_args()
    suites = SUITES if arguments.suite == "all" else (arguments.suite,)
    rows = [row for suite in suites for row in run_alone(suite, arguments.only)]
    print("\n| fault | required | seen | |\n|---|---|---|---|")
    for fault, required, seen, is_good in rows:
        print(
            f"| {fault} | {required} | {seen} | {'as required' if is_good else 'NOT as required'} |"
        )
    num_good = sum(is_good for *_, is_good in rows)
    print(f"\n{num_good} of {len(rows)} faults ended as required")
    return 0 if num_good == len(rows) else 1


def run_alone(suite: str, only: str) -> list[tuple[str, str, str, bool]]:
    """Run a suite on a Ray of its own, and beside an S3 server of its own where it needs one."""
    services: list[Service] = []
    with tempfile.TemporaryDirectory(prefix="cov") as short, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        token = folder / "token"
        write_private(token, secrets.token_hex(32))
        environment = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        screening, serving = None, None
        try:
            if suite == "serve":
                (folder / "s3" / "bucket").mkdir(parents=True)
                s3 = start_s3(folder / "s3", folder / "s3.log")
                services.append(s3)
                door = SlowDoor(urlsplit(s3.environment["AWS_ENDPOINT_URL"]).port or 0)
                os.environ.update(s3.environment)
                serving = faults_serving.Serving(folder=folder, environment={}, door=door)
                environment |= faults_serving.environment_of(folder) | s3.environment
                environment["AWS_ENDPOINT_URL"] = f"http://{LOOPBACK}:{door.port}"
            if suite == "screening":
                screening = Screening(
                    folder=folder,
                    bucket=folder / "s3" / "bucket",
                    s3=start_s3(folder / "s3", folder / "s3.log"),
                )
                assert screening.s3 is not None
                environment |= screening.s3.environment
                os.environ.update(screening.s3.environment)
            ray = start_ray(folder / "ray.log", environment, token, Path(short))
            services.append(ray)
            environment = {**os.environ, **environment, **ray.environment}
            print("undisturbed ...", flush=True)
            if serving is not None:
                serving.environment = environment
                ready = ready_serving(serving)
            elif screening is None:
                ready = ready_training(environment, folder)
            else:
                screening.environment = environment
                ready = ready_screening(screening)
            return run_suite({fault: each for fault, each in ready.items() if only in fault})
        finally:
            if serving is not None:
                faults_serving.shut_down(serving)
            for service in [
                *reversed(services),
                *([screening.s3] if screening and screening.s3 else []),
            ]:
                service.stop()


if __name__ == "__main__":
    sys.exit(main())
