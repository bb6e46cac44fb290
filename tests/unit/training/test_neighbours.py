"""Neighbouring slices as channels: within the volume, repeatable, drawn in training alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from training import CONFIG, slice_rows

from covtanet.model.losses import FocalTverskyConfig
from covtanet.model.registry import build_segmenter
from covtanet.model.segnet import TASegNetConfig
from covtanet.training.config import TrainingConfig
from covtanet.training.feed import Rows, Sampling
from covtanet.training.loop import Progress, fit
from covtanet.training.neighbours import FARTHEST_NEIGHBOUR, REPEAT_SHARE, Neighbours
from covtanet.training.phase1 import phase1, slice_batch
from covtanet.training.pool import SamplePool
from covtanet.training.ranks import Ranks

# Rows 0 to 3, 4 to 5 and 6 to 8.
NAMES = [f"{series}:{index:05d}" for series, count in (("a", 4), ("b", 2), ("c", 3)) for index in
         range(count)]  # fmt: skip


def numbered_rows() -> Rows:
    """Return slices whose pixels hold the row's number."""
    count = len(NAMES)
    levels = np.broadcast_to(np.arange(count, dtype=np.uint16)[:, None, None], (count, 4, 4))
    return {
        "name": np.array(NAMES),
        "has_lesion": np.ones(count, bool),
        "levels": levels,
        "lesion": levels.astype(np.uint8) % 2,
    }


def test_adjacent_slices_stay_within_the_volume_and_single_slices_repeat_themselves() -> None:
    neighbours = Neighbours(NAMES, single={"c"})
    assert neighbours.adjacent(np.arange(9)).tolist() == [
        [0, 0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 3],
        [4, 4, 5], [4, 5, 5],
        [6, 6, 6], [7, 7, 7], [8, 8, 8],
    ]  # fmt: skip


def test_drawn_neighbours_are_one_to_three_slices_away_in_either_order() -> None:
    names = [f"long:{index:05d}" for index in range(100)]
    middle = np.full(4000, 50)
    rows = Neighbours(names).draw(middle, np.random.default_rng(0))
    assert (rows[:, 1] == 50).all()
    distance = rows[:, 2] - 50
    assert (50 - rows[:, 0] == distance).all()
    values, counts = np.unique(distance, return_counts=True)
    assert values.tolist() == [*range(-FARTHEST_NEIGHBOUR, FARTHEST_NEIGHBOUR + 1)]
    shares = dict(zip(values.tolist(), (counts / len(middle)).tolist(), strict=True))
    assert shares.pop(0) == pytest.approx(REPEAT_SHARE, abs=0.02)
    share = (1 - REPEAT_SHARE) / (2 * FARTHEST_NEIGHBOUR)
    assert list(shares.values()) == pytest.approx([share] * 6, abs=0.02)


def test_micro_batch_holds_neighbours_of_its_slices_and_the_mask_of_the_middle() -> None:
    pool = SamplePool(numbered_rows(), Sampling(batch_size=3), 1, 1, {"c"})
    batches = list(pool.lane().batches(0))
    again = list(SamplePool(numbered_rows(), Sampling(batch_size=3), 1, 1, {"c"}).lane().batches(0))
    for batch, repeated in zip(batches, again, strict=True):
        levels = batch["levels"]
        assert levels.shape == (3, 3, 4, 4)
        assert np.array_equal(repeated["levels"], levels)
        middle = [NAMES.index(name) for name in batch["name"].tolist()]
        assert levels[:, 1, 0, 0].tolist() == middle
        assert (batch["lesion"][:, 0, 0] == levels[:, 1, 0, 0] % 2).all()
        series = [[NAMES[row][0] for row in rows] for rows in levels[:, :, 0, 0].tolist()]
        assert all(len(set(names)) == 1 for names in series)


def test_epochs_draw_other_neighbours_and_validation_takes_adjacent_slices() -> None:
    rows = numbered_rows()
    rows["name"] = np.array([f"a:{index:05d}" for index in range(len(NAMES))])
    pool = SamplePool(rows, Sampling(batch_size=9), 1, 1)
    drawn = []
    for epoch in range(2):
        (batch,) = pool.lane().batches(epoch)
        drawn.append(batch["levels"][np.argsort(batch["name"]), 0, 0, 0].tolist())
    assert drawn[0] != drawn[1]
    (batch,) = pool.lane().in_order()
    assert batch["levels"][:, 0, 0, 0].tolist() == [0, 0, 1, 2, 3, 4, 5, 6, 7]
    assert batch["levels"][:, 2, 0, 0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 8]


def test_network_of_three_slices_trains_and_validates() -> None:
    config = replace(CONFIG, num_epochs=2, micro_batches=1)
    pool = SamplePool(slice_rows(12, 0), Sampling(batch_size=2), 1, 1)
    torch.manual_seed(0)
    module = build_segmenter(TASegNetConfig(in_channels=3, widths=(4, 8), fusion_channels=4))
    validation = [SamplePool(slice_rows(6, 1), Sampling(batch_size=2), 1, 1).lane()]
    phase = phase1(module, module, config, FocalTverskyConfig(), validation, Ranks())
    progress = fit(config, phase, {0: pool.lane()}, Ranks(), 0, Progress(), lambda _: None)
    assert np.isfinite([epoch["train_loss"] for epoch in progress.history]).all()
    (batch, *_) = validation[0].in_order()
    assert slice_batch(batch, torch.device("cpu")).slices.shape == (2, 3, 32, 32)


def test_window_and_network_follow_the_configuration() -> None:
    config = TrainingConfig(network="V7", crops_to_lungs=True, num_neighbours=1)
    assert config.window.crops_to_lungs
    assert config.window.num_neighbours == 1
    for network, phases in (("V7", (1, 2)), ("Unet++", (1,)), ("VGG-19", (2,))):
        chosen = replace(config, network=network, phases=phases)
        assert chosen.architecture.segnet.in_channels == 3, network
    with pytest.raises(ValueError, match="num_neighbours is 2, expected 0 or 1"):
        TrainingConfig(num_neighbours=2)
    with pytest.raises(ValueError, match=r"lesion_threshold is 1.0, expected 0..1"):
        TrainingConfig(lesion_threshold=1.0)


def test_fusion_channels_replace_those_of_the_size() -> None:
    sizes = []
    for channels in (0, 24):
        segnet = TrainingConfig(size="small", fusion_channels=channels).architecture.segnet
        assert isinstance(segnet, TASegNetConfig)
        sizes.append(segnet.fusion_channels)
    assert sizes == [8, 24]
