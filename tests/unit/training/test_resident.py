"""Training on slices that lie on the device: draws, batches and a training of two steps."""

import numpy as np
import pytest
import torch

from covtanet.ct.lung_box import SliceBox
from covtanet.data.slice_file import GREY_STEPS, SliceFile
from covtanet.model.losses import CrossEntropyDiceConfig, loss_terms
from covtanet.model.segnet import TASegNet, TASegNetConfig
from covtanet.training.batch_augment import BatchAugmentConfig, BatchAugmenter
from covtanet.training.phase_config import PhaseConfig
from covtanet.training.resident import (
    FARTHEST_NEIGHBOUR,
    Recipe,
    ResidentSlices,
    batch_of,
    train,
)

CPU = torch.device("cpu")
SIZE = 32


def series(count: int, *, is_continuous: bool = True, lungs: int | None = None) -> SliceFile:
    """Return noise with one bright lesion on every slice; lungs on the first ``lungs`` slices."""
    rng = np.random.default_rng(count)
    grey = rng.integers(0, GREY_STEPS // 2, (count, SIZE, SIZE), dtype=np.uint8)
    lesion = np.zeros(grey.shape, bool)
    lesion[:, 8:20, 8:20] = True
    grey[lesion] = GREY_STEPS
    return SliceFile(
        grey=grey,
        lesion=lesion,
        inside=np.ones(grey.shape, bool),
        has_lung=np.arange(count) < (count if lungs is None else lungs),
        box=SliceBox(top=0, left=0, height=SIZE, width=SIZE),
        is_continuous=is_continuous,
    )


def recipe(num_steps: int = 2) -> Recipe:
    phase = PhaseConfig(
        num_epochs=1, batch_size=4, micro_batches=1, learning_rate=1e-2, average_decay=0.5
    )
    return Recipe(phase=phase, num_steps=num_steps, size_px=SIZE, channels=3, seed=3)


def draws(slices: ResidentSlices, count: int) -> torch.Tensor:
    return slices.draw(count, 3, torch.Generator(CPU).manual_seed(1))


def test_neighbours_stay_in_their_series() -> None:
    """Series of 5 and 9 slices: indices 0 to 4 and 5 to 13."""
    rows = draws(ResidentSlices.of([series(5), series(9)], CPU), 500)
    is_first = rows[:, 1] < 5
    assert rows[is_first].max() == 4
    assert rows[~is_first].min() == 5
    assert rows[~is_first].max() == 13
    assert (rows[:, 0] - rows[:, 1]).abs().max() == FARTHEST_NEIGHBOUR


def test_slices_that_are_not_neighbours_repeat_themselves() -> None:
    rows = draws(ResidentSlices.of([series(6, is_continuous=False)], CPU), 200)
    assert torch.equal(rows[:, 0], rows[:, 1])
    assert torch.equal(rows[:, 2], rows[:, 1])


def test_only_slices_with_lung_are_learned() -> None:
    rows = draws(ResidentSlices.of([series(8, lungs=3)], CPU), 200)
    assert rows[:, 1].unique().tolist() == [0, 1, 2]


def test_series_are_drawn_by_the_root_of_their_length() -> None:
    """4 and 16 slices: weights of 4 / 2 and 16 / 4, hence one third and two thirds."""
    weight = ResidentSlices.of([series(4), series(16)], CPU).weight
    assert float(weight[:4].sum() / weight.sum()) == pytest.approx(1 / 3)


def test_seed_and_step_determine_the_batch() -> None:
    slices = ResidentSlices.of([series(9)], CPU)
    augmenter = BatchAugmenter(BatchAugmentConfig(is_on=True), CPU)
    first, mask = batch_of(slices, recipe(), augmenter, 7)
    second, _ = batch_of(slices, recipe(), augmenter, 7)
    next_step, _ = batch_of(slices, recipe(), augmenter, 8)
    assert first.shape == (4, 3, SIZE, SIZE)
    assert mask.shape == (4, 1, SIZE, SIZE)
    assert torch.equal(first, second)
    assert not torch.equal(first, next_step)


def run(num_steps: int, deadline_s: float) -> tuple[TASegNet, list[float], bool, int]:
    torch.manual_seed(0)
    module = TASegNet(TASegNetConfig(in_channels=3, widths=(4, 8), fusion_channels=4))
    trained = train(
        module,
        module,
        ResidentSlices.of([series(9)], CPU),
        recipe(num_steps),
        BatchAugmenter(BatchAugmentConfig(), CPU),
        loss_terms(CrossEntropyDiceConfig()),
        deadline_s,
    )
    return module, trained.losses, trained.was_cut, trained.num_steps


def test_training_is_repeatable_and_reports_its_mean_loss() -> None:
    first, losses, was_cut, num_steps = run(2, float("inf"))
    second, repeated, _, _ = run(2, float("inf"))
    assert (was_cut, num_steps) == (False, 2)
    assert losses == repeated
    assert len(losses) == 1
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])


def test_deadline_in_the_past_cuts_the_training() -> None:
    _, losses, was_cut, num_steps = run(2, 0.0)
    assert (losses, was_cut, num_steps) == ([], True, 0)
