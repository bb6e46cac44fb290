"""A saved model read without torch: its description, and files that are not those it names."""

import json
from pathlib import Path

import pytest
from saved_models import small_model

from covtanet.errors import CheckpointError
from covtanet.model.model_files import DESCRIPTION, WEIGHTS, describe_model, model_digest
from covtanet.model.saved_model import save_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(tmp_path / "model", small_model())
    return tmp_path / "model"


def test_description_is_that_of_the_model(folder: Path) -> None:
    model = small_model()
    described = describe_model(folder, model_digest(folder))
    assert described.preprocessing == model.preprocessing
    assert described.capabilities == model.capabilities
    assert described.readout == model.readout
    assert described.in_channels == model.network.config.segnet.in_channels


def test_other_digest_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="not the registered model"):
        describe_model(folder, "0" * 64)


def test_other_weights_are_refused(folder: Path) -> None:
    path = folder / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="the weights differ"):
        describe_model(folder, model_digest(folder))


def test_missing_weights_are_refused(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="cannot be read: FileNotFoundError"):
        describe_model(folder, model_digest(folder))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format_version": 99}, "model format 99"),
        ({"preprocessing": {"unknown": 1}}, "cannot be read: TypeError"),
        ({"network": {}}, "cannot be read: KeyError"),
        ({"network": {"segnet": "none"}}, "cannot be read: AttributeError"),
    ],
)
def test_odd_description_is_refused(folder: Path, change: dict[str, object], match: str) -> None:
    path = folder / DESCRIPTION
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=match):
        describe_model(folder, model_digest(folder))
