"""Phase 1 with the settings beyond the paper's: loss, augmentation, average, stem, final bias."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from training import CONFIG, NETWORK, curve, lane, lanes, slice_rows

from covtanet.model.losses import CrossEntropyDiceConfig, FocalTverskyConfig
from covtanet.model.registry import build_segmenter
from covtanet.model.segnet import TASegNet, TASegNetConfig
from covtanet.training import worker
from covtanet.training.batch_augment import BatchAugmentConfig, BatchAugmenter
from covtanet.training.checkpoint import load_progress, save_progress
from covtanet.training.config import TrainingConfig
from covtanet.training.loop import Progress, fit
from covtanet.training.phase1 import phase1
from covtanet.training.phase_data import PhaseData
from covtanet.training.ranks import Ranks

CPU = torch.device("cpu")
RECIPE = replace(
    CONFIG,
    optimizer="adamw",
    weight_decay=1e-2,
    schedule="cosine",
    warmup_share=0.2,
    clip_norm=1.0,
    average_decay=0.8,
)


def train_recipe(progress: Progress, reports: list[Progress]) -> Progress:
    """Train the tests' network on two lanes, from ``progress``."""
    torch.manual_seed(0)
    module = build_segmenter(NETWORK.segnet)
    # As a worker has it: checkpoints must not depend on the layout.
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    augment = BatchAugmenter(BatchAugmentConfig(is_on=True), CPU).whole
    loss = CrossEntropyDiceConfig()
    phase = phase1(module, module, RECIPE, loss, [lane(100, 1, RECIPE)], Ranks(), augment)
    return fit(RECIPE, phase, lanes(1, RECIPE), Ranks(), 0, progress, reports.append)


def test_training_with_average_continues_from_a_checkpoint_with_the_same_curve(
    tmp_path: Path,
) -> None:
    reports: list[Progress] = []
    whole = train_recipe(Progress(), reports)
    save_progress(tmp_path, reports[0])
    resumed = train_recipe(load_progress(tmp_path), [])
    assert curve(resumed) == curve(whole)
    for name, value in whole.best.items():
        assert torch.equal(resumed.best[name], value)


def test_training_with_average_validates_other_weights_than_it_continues_from() -> None:
    reports: list[Progress] = []
    whole = train_recipe(Progress(), reports)
    best = reports[whole.best_epoch]
    assert not torch.equal(best.best["filter.3.weight"], best.weights["filter.3.weight"])
    torch.manual_seed(0)
    initial = build_segmenter(NETWORK.segnet).state_dict()
    assert not torch.equal(best.best["filter.3.weight"], initial["filter.3.weight"])
    assert np.isfinite([epoch["train_loss"] for epoch in whole.history]).all()


def test_augmentation_of_whole_slices_is_repeatable() -> None:
    rows = slice_rows(3, 0)
    slices = torch.from_numpy(rows["levels"].astype(np.float32) / 65535)[:, None]
    mask = torch.from_numpy(rows["lesion"].astype(np.float32))[:, None]
    augment = BatchAugmenter(BatchAugmentConfig(is_on=True), CPU).whole
    changed, changed_mask = augment(slices, mask, 4)
    assert changed.shape == slices.shape
    assert changed_mask.shape == mask.shape
    assert torch.equal(augment(slices, mask, 4)[0], changed)


def test_defaults_are_the_papers() -> None:
    config = TrainingConfig(network="V8")
    segnet = config.architecture.segnet
    assert isinstance(segnet, TASegNetConfig)
    assert segnet.stem_channels == 0
    assert config.phase1_loss == FocalTverskyConfig()
    assert not config.batch_augment.is_on
    assert config.phase1.optimizer == "adam"
    assert config.phase1.final_bias is None


def test_segmentation_loss_selects_its_configuration() -> None:
    chosen = CrossEntropyDiceConfig(smooth=3.0)
    config = TrainingConfig(segmentation_loss="cross_entropy_dice", cross_entropy_dice=chosen)
    assert config.phase1_loss == chosen


def test_stem_is_that_of_v8_only() -> None:
    for network, channels in (("V8", 16), ("V7", 0)):
        segnet = TrainingConfig(network=network, stem_channels=16).architecture.segnet
        assert isinstance(segnet, TASegNetConfig)
        assert segnet.stem_channels == channels


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"segmentation_loss": "dice"}, "segmentation_loss is dice, expected one of focal_tversky"),
        ({"stem_channels": -1}, "stem_channels is -1, expected at least 0"),
    ],
)
def test_impossible_setting_of_a_training_is_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**settings)


def test_two_augmentations_at_once_are_refused() -> None:
    with pytest.raises(ValueError, match="augment and batch_augment are both on"):
        TrainingConfig(
            augment=replace(TrainingConfig().augment, is_on=True),
            batch_augment=BatchAugmentConfig(is_on=True),
        )


def test_worker_sets_the_final_bias_of_phase_1() -> None:
    config = TrainingConfig(size="tiny", network="V1", phases=(1,))
    config = replace(config, phase1=replace(config.phase1, final_bias=-2.0))
    data = PhaseData(train=(), validation=())
    job = worker.WorkerJob(config=config, phase=1, data=data, num_at_once=1, checkpoints_uri="")
    module = worker._build_module(job)
    assert isinstance(module, TASegNet)
    layer = module.filter[-1]
    assert isinstance(layer, nn.Conv2d)
    assert layer.bias is not None
    assert layer.bias.tolist() == [-2.0]


def test_worker_augments_by_the_configuration_that_is_on() -> None:
    config = TrainingConfig()
    assert worker._augment(config, CPU) is None
    config = replace(config, batch_augment=BatchAugmentConfig(is_on=True))
    augment = worker._augment(config, CPU)
    assert augment is not None
    assert getattr(augment, "__self__", None).__class__ is BatchAugmenter
