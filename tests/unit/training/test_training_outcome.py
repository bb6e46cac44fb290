"""The learning rate that the optimizer really uses, and the weights that a finished phase keeps."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from training import CONFIG, build, lanes

from covtanet import tracking
from covtanet.data.datasets import DataSource
from covtanet.data.prepared import PreparedVolume
from covtanet.experiments.experiment import Experiment
from covtanet.experiments.fold import assemble_model
from covtanet.experiments.outcomes import Outcome, keep_outcome, read_outcome
from covtanet.model.covtanet import CovTANet
from covtanet.training.checkpoint import load_progress, save_progress
from covtanet.training.config import TrainingConfig
from covtanet.training.feed import Lane, Rows, Sampling
from covtanet.training.loop import Phase, Progress, fit
from covtanet.training.phase_config import PhaseConfig
from covtanet.training.pool import SamplePool
from covtanet.training.ranks import Ranks

DECAYING = PhaseConfig(
    num_epochs=4, batch_size=1, micro_batches=1, learning_rate=1.0, decay=0.5, decay_epochs=1
)  # fmt: skip


class NamedRows(NamedTuple):
    """A micro-batch of nothing but names."""

    names: list[str]


def slope() -> Phase[NamedRows]:
    """A phase whose one weight has the gradient 1 always: Adam moves it by the learning rate."""
    weight = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(weight.weight)

    def sums(batch: NamedRows) -> Tensor:
        return weight.weight.reshape(1)

    return Phase(
        module=weight,
        model=weight,
        batch_of=lambda rows, seed: NamedRows([str(name) for name in rows["name"]]),
        sums=sums,
        loss=lambda total: total.sum(),
        validate=lambda: {},
        score=lambda metrics: -metrics["epoch"],
    )


def two_samples() -> dict[int, Lane]:
    """One lane of two samples: two optimizer steps an epoch."""
    rows: Rows = {"name": np.array(["a", "b"]), "has_lesion": np.array([True, True])}
    return {0: SamplePool(rows, Sampling(batch_size=1)).lane()}


def weights_after_epochs(progress: Progress | None = None) -> tuple[list[float], list[Progress]]:
    reports: list[Progress] = []
    fit(DECAYING, slope(), two_samples(), Ranks(), 0, progress or Progress(), reports.append)
    return [float(each.weights["weight"]) for each in reports], reports


def test_weights_move_by_the_decayed_learning_rate() -> None:
    """Two steps an epoch at 1, 1/2, 1/4 and 1/8: the weight goes to -2, -3, -3.5 and -3.75."""
    weights, reports = weights_after_epochs()
    assert weights == pytest.approx([-2.0, -3.0, -3.5, -3.75], abs=1e-5)
    assert [epoch["learning_rate"] for epoch in reports[-1].history] == [1.0, 0.5, 0.25, 0.125]


def test_resumed_training_goes_on_with_the_decayed_learning_rate(tmp_path: Path) -> None:
    """Continued after two epochs, the third moves the weight by 2 x 1/4, not by 2 x 1."""
    _, reports = weights_after_epochs()
    save_progress(tmp_path, reports[1])
    weights, _ = weights_after_epochs(load_progress(tmp_path))
    assert weights == pytest.approx([-3.5, -3.75], abs=1e-5)


def progress_that_gets_worse(phase: int) -> tuple[Progress, list[Progress]]:
    """A training whose second of four epochs is the best."""
    config = replace(CONFIG, num_epochs=4)
    scores: Iterator[float] = iter([1.0, 3.0, 2.0, 0.0])
    own = build(phase, config, Ranks())
    scored = replace(
        own,
        validate=lambda: {"validation": next(scores)},
        score=lambda metrics: metrics["validation"],
    )
    reports: list[Progress] = []
    return fit(
        config, scored, lanes(phase, config), Ranks(), 0, Progress(), reports.append
    ), reports


def opened(folder: Path) -> Experiment:
    """An experiment of three volumes in three folds, with nothing trained yet."""
    names = ("a", "b", "c")
    volumes = {
        name: PreparedVolume(
            key=name,
            volume_path=name,
            patient=name,
            intensity="hu",
            source_digest=name,
        )
        for name in names
    }
    return Experiment(
        config=TrainingConfig(size="small", num_folds=3, folds=(0, 1, 2)),
        uri=str(folder / "experiment"),
        prepared_uri=str(folder / "prepared"),
        key="key",
        run=tracking.RunAddress(uri="", experiment="e", name="e", key="key"),
        source=DataSource(name="manifest", volumes=(), root=""),
        volumes=volumes,
        folds={name: fold for fold, name in enumerate(names)},
        data_digest="digest",
    )


@pytest.mark.parametrize("phase", [1, 2])
def test_weights_of_the_best_epoch_are_stored_not_those_of_the_last(
    phase: int,
    tmp_path: Path,
) -> None:
    """Through a checkpoint, as the driver gets them from a worker, into storage and back."""
    progress, reports = progress_that_gets_worse(phase)
    (tmp_path / "checkpoint").mkdir()
    save_progress(tmp_path / "checkpoint", progress)
    own = opened(tmp_path)
    kept = keep_outcome(own, 0, phase, load_progress(tmp_path / "checkpoint"))
    stored = read_outcome(own, 0, phase)
    assert stored is not None
    best, last = reports[1].weights, reports[3].weights
    moved = [name for name in best if not torch.equal(best[name], last[name])]
    assert moved, "nothing was learned after the best epoch"
    for outcome in (kept, stored):
        assert outcome.weights.keys() == best.keys()
        assert all(torch.equal(outcome.weights[name], value) for name, value in best.items())
        assert outcome.history[-1]["best_epoch"] == 1.0


def test_saved_model_holds_the_stored_weights_of_both_phases(tmp_path: Path) -> None:
    own = opened(tmp_path)
    trained = CovTANet(own.config.architecture)
    parts = (trained.segnet, trained.classifier)
    outcomes = [Outcome(weights=part.state_dict(), history=[], digest="d") for part in parts]
    torch.manual_seed(1)
    model = assemble_model(own, 0, *outcomes)
    for name, value in trained.state_dict().items():
        assert torch.equal(model.network.state_dict()[name], value), name
