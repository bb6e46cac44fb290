"""Phase 2 on the segmenter of a saved model."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from saved_models import small_model

from covtanet.errors import CheckpointError, ConfigError
from covtanet.experiments.fold import saved_segmenter
from covtanet.model.saved_model import save_model
from covtanet.training.config import TrainingConfig


@pytest.fixture
def config(tmp_path: Path) -> TrainingConfig:
    save_model(tmp_path / "model", small_model())
    return TrainingConfig(
        size="small", phases=(2,), phase1_model=str(tmp_path / "model"), network="V7"
    )


def test_saved_segmenter_gives_its_weights_and_digest(config: TrainingConfig) -> None:
    outcome = saved_segmenter(config)
    expected = small_model().network.segnet.state_dict()
    assert outcome.weights.keys() == expected.keys()
    assert all(torch.equal(outcome.weights[name], expected[name]) for name in expected)
    assert len(outcome.digest) == 64


def test_saved_segmenter_of_another_network_is_refused(config: TrainingConfig) -> None:
    with pytest.raises(ConfigError, match="phase1_model has the segmenter"):
        saved_segmenter(replace(config, fusion_channels=4))


def test_saved_segmenter_of_another_input_is_refused(config: TrainingConfig) -> None:
    with pytest.raises(ConfigError, match="phase1_model reads"):
        saved_segmenter(replace(config, low_hu=-1250.0))


def test_missing_saved_segmenter_is_refused(config: TrainingConfig) -> None:
    with pytest.raises(CheckpointError, match=r"model\.json"):
        saved_segmenter(replace(config, phase1_model=f"{config.phase1_model}-gone"))
