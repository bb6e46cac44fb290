"""The training loop without a cluster: lanes, steps, resume, early stop, golden curves."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from repository import ROOT
from torch import nn
from training import CONFIG, NETWORK, build, curve, lane, lanes, slice_rows, train

from covtanet.errors import CheckpointError
from covtanet.model.registry import build_segmenter
from covtanet.training.augment import AugmentConfig, Augmenter
from covtanet.training.checkpoint import load_progress, save_progress
from covtanet.training.config import TrainingConfig
from covtanet.training.feed import Rows, Sampling, assign_lanes
from covtanet.training.loop import Progress, attention_weights, fit
from covtanet.training.phase2 import frozen_features
from covtanet.training.phase_config import PhaseConfig
from covtanet.training.pool import PoolLane, SamplePool
from covtanet.training.ranks import LaneStatistics, Ranks
from covtanet.training.step import backward

GOLDEN = ROOT / "tests" / "golden"


def names(rows: Rows) -> list[str]:
    return [str(name) for name in rows["name"]]


def test_epoch_is_a_permutation_that_follows_from_seed_and_epoch() -> None:
    first = [names(batch) for batch in lane(0, 1, CONFIG).batches(0)]
    assert sorted(name for batch in first for name in batch) == names(slice_rows(12, 0))
    assert [names(batch) for batch in lane(0, 1, CONFIG).batches(0)] == first
    assert [names(batch) for batch in lane(0, 1, CONFIG).batches(1)] != first


def test_order_does_not_depend_on_the_order_of_arrival() -> None:
    rows = slice_rows(12, 0)
    turned = {name: values[::-1] for name, values in rows.items()}
    orders = [
        [names(batch) for batch in SamplePool(each, Sampling(batch_size=2)).lane().batches(4)]
        for each in (rows, turned)
    ]
    assert orders[0] == orders[1]


def test_lesion_free_slices_are_drawn_anew_every_epoch() -> None:
    rows = slice_rows(400, 0)
    own = SamplePool(rows, Sampling(batch_size=1, lesion_free_share=0.5)).lane()
    drawn = [{name for batch in own.batches(epoch) for name in names(batch)} for epoch in range(2)]
    with_lesion = {
        str(name) for name, has in zip(rows["name"], rows["has_lesion"], strict=True) if has
    }
    assert with_lesion < drawn[0]
    assert 30 < len(drawn[0] - with_lesion) < 70  # of 100
    assert drawn[0] != drawn[1]
    assert own.num_batches(0) == len(drawn[0])


def test_a_long_volume_does_not_outweigh_a_short_one() -> None:
    """At most so many slices of each volume, others every epoch, and all of one that
    has no more.
    """
    rows = slice_rows(40, 0)
    rows["name"] = np.array([f"{'long' if index < 30 else 'short'}:{index}" for index in range(40)])
    own = SamplePool(rows, Sampling(batch_size=2, slices_per_volume=12)).lane()
    drawn = [{name for batch in own.batches(epoch) for name in names(batch)} for epoch in range(2)]
    assert [sum(name.startswith("long") for name in each) for each in drawn] == [12, 12]
    assert [sum(name.startswith("short") for name in each) for each in drawn] == [10, 10]
    assert drawn[0] != drawn[1]
    assert own.num_batches(0) == 11


def test_epochs_draw_independently() -> None:
    """Of two epochs' halves of the slices without lesion, a quarter is in both; the ways of drawing
    do not clash.
    """
    rows = slice_rows(4000, 0)
    rows["name"] = np.array([f"v{index % 2}:{index:04}" for index in range(4000)])
    without = {
        name for name, has in zip(rows["name"].tolist(), rows["has_lesion"], strict=True) if not has
    }
    names, has_lesion = rows["name"].tolist(), rows["has_lesion"].tolist()
    halves = [
        Sampling(batch_size=1, lesion_free_share=0.5).drawn(names, has_lesion, epoch)
        for epoch in range(8)
    ]
    for one, two in itertools.combinations(halves, 2):
        assert len(one & two & without) / len(without) == pytest.approx(0.25, abs=0.04)
    few = Sampling(batch_size=1, lesion_free_share=0.5, slices_per_volume=200).drawn(
        names, has_lesion, 0
    )
    assert len(few) == 400
    drawable = len(without) / 2
    expected = drawable / (drawable + 4000 - len(without))
    assert len(few & without) / 400 == pytest.approx(expected, abs=0.06)


def test_lanes_are_level_and_the_same_for_the_same_sizes() -> None:
    sizes = {f"v{index}": 10 + index for index in range(20)}
    lanes = assign_lanes(sizes, 3)
    assert sorted(key for own in lanes for key in own) == sorted(sizes)
    loads = [sum(sizes[key] for key in own) for own in lanes]
    assert max(loads) - min(loads) < max(sizes.values())
    assert assign_lanes(dict(reversed(sizes.items())), 3) == lanes


@pytest.mark.parametrize("phase", [1, 2])
def test_accumulated_gradient_is_that_of_the_added_sums(phase: int) -> None:
    """Two micro-batches one after the other against both graphs held at once."""
    own = build(phase, CONFIG, Ranks())
    own.module.train()
    batches = [own.batch_of(next(lane(number, phase, CONFIG).batches(0)), 0) for number in range(2)]
    statistics = LaneStatistics(own.module, 2, Ranks())
    value = float(backward(own.model, batches, own.sums, own.loss, statistics, [5, 6]).loss)
    found = {
        name: p.grad.clone() for name, p in own.module.named_parameters() if p.grad is not None
    }
    own.module.zero_grad()
    parts = []
    for seed, batch in zip((5, 6), batches, strict=True):
        torch.manual_seed(seed)
        parts.append(own.sums(batch))
    expected = own.loss(parts[0] + parts[1])
    expected.backward()
    assert value == pytest.approx(float(expected.detach()), rel=1e-6)
    for name, parameter in own.module.named_parameters():
        assert parameter.grad is not None, name
        assert torch.allclose(found[name], parameter.grad, rtol=1e-3, atol=1e-6), name


def test_running_statistics_of_lanes_are_averaged() -> None:
    """Each lane moves from the common start by its own batches; validation sees the mean."""
    norm = nn.BatchNorm1d(1, momentum=0.5)
    statistics = LaneStatistics(norm, 2, Ranks())
    for number, value in enumerate((2.0, 6.0)):
        statistics.enter(number)
        norm(torch.full((4, 1), value))
        statistics.leave(number)
    statistics.average()
    assert norm.running_mean is not None
    assert float(norm.running_mean) == pytest.approx((0.5 * 2 + 0.5 * 6) / 2)


def test_variance_of_lanes_holds_the_differences_of_their_means() -> None:
    """N(0, 1) and N(4, 1): E[x^2] = (1 + 17) / 2 = 9, less the square of the mean 2, is 5."""
    norm = nn.BatchNorm1d(2)
    statistics = LaneStatistics(norm, 2, Ranks())
    for number, value in enumerate((0.0, 4.0)):
        statistics.enter(number)
        norm.load_state_dict({"running_mean": torch.full((2,), value)}, strict=False)
        norm.load_state_dict({"running_var": torch.ones(2)}, strict=False)
        statistics.leave(number)
    statistics.average()
    statistics.enter(1)
    assert norm.state_dict()["running_mean"].tolist() == [2.0, 2.0]
    assert norm.state_dict()["running_var"].tolist() == [5.0, 5.0]


@pytest.mark.parametrize("phase", [1, 2])
def test_interrupted_training_ends_with_the_same_weights(phase: int, tmp_path: Path) -> None:
    reports: list[Progress] = []
    whole = train(phase, reports=reports)
    save_progress(tmp_path, reports[0])
    again = train(phase, progress=load_progress(tmp_path))
    assert curve(again) == curve(whole)
    for name, value in whole.weights.items():
        assert torch.equal(again.weights[name], value), name


@pytest.mark.parametrize(
    "name", ["weights.safetensors", "best.safetensors", "optimizer.safetensors", "state.json"]
)
def test_cut_checkpoint_is_refused(name: str, tmp_path: Path) -> None:
    reports: list[Progress] = []
    train(1, replace(CONFIG, num_epochs=1), reports=reports)
    save_progress(tmp_path, reports[0])
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"differs from the digest|cannot be read"):
        load_progress(tmp_path)


def test_training_learns() -> None:
    progress = train(1, replace(CONFIG, num_epochs=7))
    assert progress.history[-1]["train_loss"] < progress.history[0]["train_loss"] - 0.1
    assert progress.history[progress.best_epoch]["val_dice"] > 0.8


def test_best_epoch_counts_and_a_stale_validation_stops() -> None:
    """Scores 1, 3, 2, 2: the second epoch is best, and two epochs later the phase ends."""
    config = replace(CONFIG, num_epochs=9, stop_after_epochs=2)
    own, scores = build(1, config, Ranks()), iter([1.0, 3.0, 2.0, 2.0, 9.0])
    scored = replace(own, validate=lambda: {"val_volume_dice": next(scores)})
    reports: list[Progress] = []
    progress = fit(config, scored, lanes(1, config), Ranks(), 0, Progress(), reports.append)
    assert len(progress.history) == 4
    assert progress.best_epoch == 1
    assert all(
        torch.equal(progress.best[name], value) for name, value in reports[1].weights.items()
    )


def test_without_validation_the_last_epoch_counts() -> None:
    own = replace(build(1, CONFIG, Ranks()), validate=lambda: {"val_volume_dice": math.nan})
    assert (
        fit(CONFIG, own, lanes(1, CONFIG), Ranks(), 0, Progress(), lambda _: None).best_epoch
        == CONFIG.num_epochs - 1
    )


def test_loss_that_is_no_number_stops_and_names_the_series() -> None:
    config = replace(CONFIG, num_epochs=1)
    fed = lanes(2, config)
    bad = fed[1]
    assert isinstance(bad, PoolLane)
    rows = bad.pool.rows
    rows["pooled"][rows["name"] == "volume1-003"] = np.nan
    reports: list[Progress] = []
    with pytest.raises(
        FloatingPointError, match=r"the loss is not finite .* series of the batch: .*volume1-003"
    ):
        fit(config, build(2, config, Ranks()), fed, Ranks(), 0, Progress(), reports.append)
    assert not reports


def test_batch_size_above_a_lane_is_refused() -> None:
    config = replace(CONFIG, batch_size=20)
    with pytest.raises(ValueError, match="fewer samples than batch_size"):
        train(1, config)


def test_learning_rate_decays_as_in_the_paper() -> None:
    """Section III-B: 1e-5, times 0.99 after every 10 epochs."""
    assert [PhaseConfig().rate(epoch) for epoch in (0, 9, 10, 25)] == pytest.approx(
        [1e-5, 1e-5, 0.99e-5, 0.9801e-5]
    )


def test_every_attention_unit_reports_its_alpha() -> None:
    found = attention_weights(build_segmenter(NETWORK.segnet))
    assert sorted(found) == [f"alpha/{part}" for part in (
        "decoder_taus.0", "decoder_taus.1", "encoder_taus.0", "encoder_taus.1", "encoder_taus.2"
    )]  # fmt: skip
    assert set(found.values()) == {0.5}


def test_features_a_few_slices_at_a_time_are_those_of_all_at_once() -> None:
    calls = []

    def segment(slices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(len(slices))
        return slices, slices * 2

    levels = np.random.default_rng(0).integers(0, 65535, (2, 9, 4, 4), dtype=np.uint16)
    found = frozen_features(segment, torch.device("cpu"), PhaseConfig())(levels)
    assert calls == [8, 8, 2]
    assert np.allclose(found[:, :, 0].numpy(), levels / 65535 * 2, atol=1e-3)


def test_augmentation_moves_slice_and_mask_alike_and_follows_from_its_seed() -> None:
    rows = slice_rows(3, 0)
    slices = torch.from_numpy(rows["levels"][1:2].astype(np.float32) / 65535)[:, None]
    mask = torch.from_numpy(rows["lesion"][1:2].astype(np.float32))[:, None]
    augmenter = Augmenter(AugmentConfig(is_on=True, noise=0.0))
    moved, moved_mask = augmenter(slices, mask, seed=4)
    assert torch.equal(augmenter(slices, mask, seed=4)[0], moved)
    assert not torch.equal(augmenter(slices, mask, seed=5)[0], moved)
    assert set(moved_mask.unique().tolist()) <= {0.0, 1.0}
    inside, outside = moved[moved_mask > 0].mean(), moved[moved_mask == 0].mean()
    assert float(inside) > 2 * float(outside)


def test_experiment_key_ignores_what_may_change_between_starts() -> None:
    config = TrainingConfig()
    assert config.key(["a", "b"]) == config.key(["b", "a"])
    assert replace(config, folds=(1,), num_workers=1, network="V1", phases=(1,)).key(
        ["a"]
    ) == config.key(["a"])
    assert replace(config, seed=1).key(["a"]) != config.key(["a"])


def test_workers_must_divide_the_micro_batches() -> None:
    with pytest.raises(
        ValueError, match=r"phase1.micro_batches is 2, expected a multiple of 4 workers"
    ):
        TrainingConfig(num_workers=4, phase1=PhaseConfig(micro_batches=2))


def test_side_of_the_slices_is_the_sizes_own_or_a_multiple_of_32() -> None:
    for size_px in (-32, 100):
        with pytest.raises(ValueError, match=f"size_px is {size_px}, expected a multiple of 32"):
            TrainingConfig(size_px=size_px)
    assert TrainingConfig(size_px=160).window.size_px == 160
    assert TrainingConfig(size="small").window.size_px == 128


@pytest.mark.parametrize("phase", [1, 2])
def test_golden_curve(phase: int) -> None:
    """A change that is not meant to move results shows the same curve; delete the file to write it
    anew.
    """
    path = GOLDEN / f"phase{phase}.json"
    found = curve(train(phase))
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
        pytest.fail(f"{path.name} was not there and is written now")
    for epoch, expected in zip(found, json.loads(path.read_text()), strict=True):
        assert epoch == pytest.approx(expected, rel=2e-3, abs=2e-3)
