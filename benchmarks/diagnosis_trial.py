"""Training and test of the rows of Table IV on slices that lie on one device."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from benchmarks.diagnosis_networks import (
    LESION_SHARE,
    TRIAL_SHARE,
    Choice,
    choices,
    network_config,
    phase_config,
    start_warm,
)
from benchmarks.diagnosis_slices import NUM_FOLDS
from benchmarks.diagnosis_views import MIRRORED, PLAIN, TEST_BATCH, Inputs, Rows, Views
from covtanet.model.covtanet import JointClassifier
from covtanet.model.losses import JointLossConfig, joint, joint_sums
from covtanet.training.feed import seed_of
from covtanet.training.optimizer import WeightAverage, clip_gradients, make_optimizer, set_rate
from covtanet.training.phase_config import PhaseConfig

# Share of the time left that a network plans with; the card is shared.
PLANNED_SHARE = 0.85
# Steps in which cuDNN chooses its kernels, before a step is timed.
WARM_STEPS = 6
# Part of fold 0's training patients on which rates are compared, one in so many.
TRIAL_PARTS = 5


def balanced_loss(grades: NDArray[np.str_]) -> JointLossConfig:
    """Return weights of Eq. 8 that give both classes of each task the same weight.

    The threshold of 0.5 then lies between the classes, not between their frequencies.
    """
    counts = {grade: int((grades == grade).sum()) for grade in ("normal", "mild", "severe")}
    return JointLossConfig(
        infected_weight=counts["normal"] / max(1, counts["mild"] + counts["severe"]),
        severe_weight=counts["mild"] / max(1, counts["severe"]),
    )


@dataclass
class Trial:
    """State of one process: its inputs, its deadline and the file of its results."""

    views: Views
    deadline_s: float
    """Of ``time.perf_counter``."""
    path: Path
    chosen: Mapping[str, str] = field(default_factory=dict)
    """Choices of an earlier run by network; a network without one makes its own."""
    is_infected: Tensor = field(init=False)
    is_severe: Tensor = field(init=False)
    started_s: float = field(init=False)

    def __post_init__(self) -> None:
        self.started_s = time.perf_counter()
        self.slices = self.views.slices
        self.scale = self.views.scale
        self.device = self.views.device
        grades = self.slices.grades
        self.is_infected = torch.from_numpy(grades != "normal").float().to(self.device)
        self.is_severe = torch.from_numpy(grades == "severe").float().to(self.device)

    @property
    def left_s(self) -> float:
        """Seconds until the deadline."""
        return self.deadline_s - time.perf_counter()

    def say(self, text: str) -> None:
        """Print a line."""
        print(f"[{time.perf_counter() - self.started_s:6.1f} s] {text}", flush=True)

    def write(self, values: dict[str, Any]) -> None:
        """Append a line to the file of results."""
        with self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")

    def run(self, name: str, num_left: int) -> None:
        """Train and test one row in all folds. num_left: rows that share the time left."""
        if name == LESION_SHARE:
            self.lesion_share()
            return
        end_s = time.perf_counter() + self.left_s * PLANNED_SHARE / num_left
        inputs = self.views.inputs_of(name)
        num_epochs = self._plan(name, inputs, end_s)
        choice, trials = self._choose(name, inputs, num_epochs)
        self.write({"kind": "choice", "network": name, "auc": trials, "chosen": str(choice)})
        for fold in range(NUM_FOLDS):
            train = np.flatnonzero(self.slices.folds != fold)
            test = np.flatnonzero(self.slices.folds == fold)
            module, described = self.train(name, inputs, train, choice, num_epochs, seed=fold)
            if described["was_cut"]:
                self.say(f"{name} fold {fold}: cut by the deadline, not tested")
                return
            self.write({"kind": "training", "network": name, "fold": fold, **described})
            self._write_rows(name, fold, test, self.predict(module, inputs, test))

    def _plan(self, name: str, inputs: Inputs, end_s: float) -> int:
        """Measure a step and return the number of epochs that fit into the time."""
        rows = np.arange(len(self.slices.names))
        self._time(name, inputs, rows, WARM_STEPS)
        step_s = self._time(name, inputs, rows, self.scale.timed_steps)
        epoch_s = step_s * (1 - 1 / NUM_FOLDS) * len(rows) / self.scale.batch_size
        # Trainings of the folds, and the trials of the choices on a part of one of them.
        num_choices = 0 if name in self.chosen else len(choices(name))
        num_trainings = NUM_FOLDS + num_choices * TRIAL_SHARE * (1 - 1 / TRIAL_PARTS)
        low, high = self.scale.num_epochs
        fitting = int((end_s - time.perf_counter()) / (num_trainings * epoch_s))
        num_epochs = min(high, max(low, fitting))
        self.say(f"{name}: {step_s * 1000:.0f} ms per step, {num_epochs} epochs per training")
        return num_epochs

    def _time(self, name: str, inputs: Inputs, rows: Rows, num_steps: int) -> float:
        started_s = time.perf_counter()
        self._optimize(name, inputs, rows, choices(name)[0], num_steps, seed=0)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - started_s) / num_steps

    def _choose(
        self, name: str, inputs: Inputs, num_epochs: int
    ) -> tuple[Choice, dict[str, float]]:
        """Compare choices on training patients of fold 0; its test part stays unseen.

        The score is the mean AUC of the three pairs.
        """
        if name in self.chosen:
            by_text = {str(choice): choice for choice in choices(name)}
            return by_text[self.chosen[name]], {}
        train = np.flatnonzero(self.slices.folds != 0)
        held = train[np.arange(len(train)) % TRIAL_PARTS == 0]
        rest = np.setdiff1d(train, held)
        trial_epochs = max(1, round(num_epochs * TRIAL_SHARE))
        aucs = {}
        for choice in choices(name):
            module, _ = self.train(name, inputs, rest, choice, trial_epochs, seed=100)
            aucs[choice] = mean_auc(self.slices.grades[held], self.predict(module, inputs, held))
        best = max(aucs, key=lambda choice: aucs[choice])
        by_name = {str(choice): round(auc, 4) for choice, auc in aucs.items()}
        self.say(f"{name}: mean AUC of the pairs, {by_name}")
        return best, by_name

    def train(
        self, name: str, inputs: Inputs, rows: Rows, choice: Choice, num_epochs: int, seed: int
    ) -> tuple[nn.Module, dict[str, Any]]:
        """Return a network that was trained on some slices, and its course."""
        started_s = time.perf_counter()
        num_steps = max(1, num_epochs * (len(rows) // self.scale.batch_size))
        num_steps = min(num_steps, self.scale.max_steps)
        module, done, loss = self._optimize(name, inputs, rows, choice, num_steps, seed)
        described = {
            "choice": asdict(choice),
            "num_epochs": num_epochs,
            "num_steps": done,
            "seconds": round(time.perf_counter() - started_s, 2),
            "last_loss": loss,
            "was_cut": done < num_steps,
            "phase": asdict(phase_config(choice.rate, self.scale, num_steps)),
        }
        self.say(f"{name}: {done} steps in {described['seconds']} s, loss {loss:.3f}")
        return module, described

    def _optimize(
        self, name: str, inputs: Inputs, rows: Rows, choice: Choice, num_steps: int, seed: int
    ) -> tuple[nn.Module, int, float]:
        config = phase_config(choice.rate, self.scale, num_steps)
        torch.manual_seed(seed)
        module = JointClassifier(network_config(name, self.scale, choice))
        if choice.is_warm:
            start_warm(module, self.views.segmenter)
        module.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        module.train()
        optimizer = make_optimizer(config, module, fused=self.device.type == "cuda")
        average = WeightAverage(module, config.average_decay)
        weights = balanced_loss(self.slices.grades[rows])
        batches = _batches(rows, config.batch_size, num_steps, seed)
        done = 0
        loss = torch.zeros(())
        for batch in batches:
            if time.perf_counter() > self.deadline_s:
                break
            set_rate(optimizer, config.rate(config.num_epochs * done / num_steps))
            loss = self._step(module, inputs, batch, seed_of(seed, done), config, weights)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            clip_gradients(config, module.parameters())
            optimizer.step()
            average.update()
            done += 1
        if done:
            module.load_state_dict(average.state(), strict=False)
        last = float(loss.detach())
        if not math.isfinite(last):
            raise FloatingPointError(f"{name}: the loss is NaN or infinite")
        return module, done, last

    def _step(
        self,
        module: nn.Module,
        inputs: Inputs,
        rows: Rows,
        seed: int,
        config: PhaseConfig,
        weights: JointLossConfig,
    ) -> Tensor:
        """Return the joint loss of one batch."""
        index = torch.from_numpy(rows).to(self.device)
        with config.autocast(self.device):
            infected, severe = module(inputs.training(rows, seed))
        truth = (self.is_infected[index], self.is_severe[index])
        return joint(joint_sums(infected, severe, *truth, weights))

    def predict(self, module: nn.Module, inputs: Inputs, rows: Rows) -> NDArray[np.float64]:
        """Return p_infected and p_severe, (N, 2): the mean over a slice and its mirror image."""
        module.eval()
        config = PhaseConfig()
        parts = []
        # Batches have many sizes, and choosing kernels for each takes longer than it saves.
        torch.backends.cudnn.benchmark = False
        for start in range(0, len(rows), TEST_BATCH):
            batch = rows[start : start + TEST_BATCH]
            with torch.no_grad(), config.autocast(self.device):
                views = [module(inputs.testing(batch, view)) for view in (PLAIN, MIRRORED)]
            logits = torch.stack([torch.stack(view, 1).float() for view in views])
            parts.append(torch.sigmoid(logits).mean(0).double().cpu().numpy())
        torch.backends.cudnn.benchmark = True
        return np.concatenate(parts)

    def lesion_share(self) -> None:
        """Test the one feature: lesion over lung in the slice, by the segmenter, in all folds."""
        shares = self.views.shares()
        infected, severe = (
            values.cpu().numpy() > 0 for values in (self.is_infected, self.is_severe)
        )
        for fold in range(NUM_FOLDS):
            train = self.slices.folds != fold
            test = np.flatnonzero(~train)
            columns = []
            for rows, truth in ((train, infected), (train & infected, severe)):
                # Percent, so that the penalty is far too weak to matter.
                model = LogisticRegression(C=1e3, class_weight="balanced")
                model.fit(100 * shares[rows, None], truth[rows])
                columns.append(model.predict_proba(100 * shares[test, None])[:, 1])
            self._write_rows(LESION_SHARE, fold, test, np.stack(columns, 1), shares[test])

    def _write_rows(
        self,
        name: str,
        fold: int,
        rows: Rows,
        p: NDArray[np.float64],
        shares: NDArray[np.float64] | None = None,
    ) -> None:
        for index, row in enumerate(rows):
            values = {
                "kind": "row",
                "network": name,
                "fold": fold,
                "study": str(self.slices.names[row]),
                "grade": str(self.slices.grades[row]),
                "p_infected": round(float(p[index, 0]), 6),
                "p_severe": round(float(p[index, 1]), 6),
            }
            if shares is not None:
                values["lesion_share"] = round(float(shares[index]), 6)
            self.write(values)
        auc = mean_auc(self.slices.grades[rows], p)
        self.say(f"{name} fold {fold}: mean AUC of the pairs {auc:.3f}")


def chosen_in(folder: Path) -> dict[str, str]:
    """Return the choices that an earlier run wrote, by network."""
    lines = [
        json.loads(line)
        for path in sorted(folder.glob("rows-*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    return {line["network"]: line["chosen"] for line in lines if line["kind"] == "choice"}


def _batches(rows: Rows, batch_size: int, num_steps: int, seed: int) -> list[Rows]:
    """Return the slices of each step: passes in another order each, without a partial batch."""
    rng = np.random.default_rng(seed)
    batches: list[Rows] = []
    while len(batches) < num_steps:
        order = rng.permutation(rows)
        whole = len(order) // batch_size * batch_size
        batches += list(order[:whole].reshape(-1, batch_size))
    return batches[:num_steps]


def mean_auc(grades: NDArray[np.str_], p: NDArray[np.float64]) -> float:
    """Return the mean AUC of the pairs of Table IV; NaN if a grade is missing."""
    pairs: Sequence[tuple[str, str, int]] = (
        ("normal", "mild", 0),
        ("normal", "severe", 0),
        ("mild", "severe", 1),
    )
    aucs = []
    for negative, positive, column in pairs:
        rows = np.isin(grades, (negative, positive))
        truth = grades[rows] == positive
        if truth.all() or not truth.any():
            return math.nan
        aucs.append(roc_auc_score(truth, p[rows, column]))
    return float(np.mean(aucs))
