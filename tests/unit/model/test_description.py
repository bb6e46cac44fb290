"""Descriptions of saved models: both format versions give the same typed parts."""

import json
from pathlib import Path
from typing import Any

import pytest
from saved_models import rewrite_as_version_1, small_model

from covtanet.ct.window import WindowConfig
from covtanet.errors import CheckpointError
from covtanet.inference.predictor import Predictor, refuse_without_segmentation, window_of
from covtanet.model.covtanet import SIZES, CovTANet, architecture
from covtanet.model.description import Capabilities, Preprocessing
from covtanet.model.saved_model import SavedModel, load_model, save_model


def rewrite(folder: Path, **values: Any) -> None:
    path = folder / "model.json"
    description = json.loads(path.read_text())
    path.write_text(json.dumps({**description, **values}))


def save_version_1(folder: Path, provenance: dict[str, Any], **preprocessing: Any) -> Path:
    """Save a model as version 1 did: capabilities in the provenance, window as an object."""
    save_model(folder, small_model())
    rewrite_as_version_1(folder, preprocessing, provenance)
    return folder


def test_preprocessing_defaults_are_those_of_the_window() -> None:
    window = WindowConfig()
    defaults = Preprocessing()
    assert (defaults.low_hu, defaults.high_hu, defaults.size_px) == (
        window.low_hu,
        window.high_hu,
        window.size_px,
    )


def test_version_1_preprocessing_is_read(tmp_path: Path) -> None:
    window = {"low_hu": -1200.0, "high_hu": 250.0, "size_px": 160}
    folder = save_version_1(
        tmp_path / "model", {}, window=window, slice_step_mm=2.0, intensities=["grey8"]
    )
    model = load_model(folder)
    assert model.preprocessing == Preprocessing(
        low_hu=-1200.0, high_hu=250.0, size_px=160, slice_step_mm=2.0, intensities=("grey8",)
    )
    assert window_of(model) == WindowConfig(low_hu=-1200.0, high_hu=250.0, size_px=160)


def test_version_1_without_step_and_intensities_gets_null_and_hu(tmp_path: Path) -> None:
    model = load_model(save_version_1(tmp_path / "model", {}, window={"size_px": 128}))
    assert model.preprocessing == Preprocessing(
        size_px=128, slice_step_mm=None, intensities=("hu",)
    )


@pytest.mark.parametrize(
    ("provenance", "segments", "diagnoses"),
    [
        ({}, True, True),
        ({"has_diagnosis": False, "has_segmentation": True}, True, False),
        ({"has_segmentation": False}, False, True),
    ],
)
def test_version_1_capabilities_come_from_provenance(
    tmp_path: Path, provenance: dict[str, Any], segments: bool, diagnoses: bool
) -> None:
    model = load_model(save_version_1(tmp_path / "model", provenance, window={"size_px": 128}))
    assert model.capabilities == Capabilities(segments=segments, diagnoses=diagnoses)
    assert Predictor(model, engine="eager").diagnoses is diagnoses


@pytest.mark.parametrize("name", ["V1", "V8", "FCN", "Mini-SegNet", "ResNet-50"])
def test_version_1_network_is_read_as_its_type(tmp_path: Path, name: str) -> None:
    config = architecture(name, SIZES["tiny"], 96)
    model = SavedModel(
        network=CovTANet(config).eval(),
        preprocessing=Preprocessing(size_px=96),
        capabilities=Capabilities(segments=True, diagnoses=True),
    )
    save_model(tmp_path / "model", model)
    assert load_model(tmp_path / "model").network.config == config
    rewrite_as_version_1(tmp_path / "model", {"window": {"size_px": 96}})
    assert load_model(tmp_path / "model").network.config == config


def test_version_2_without_capabilities_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "model", small_model())
    rewrite(tmp_path / "model", capabilities={"segments": True})
    with pytest.raises(CheckpointError, match="cannot be read: TypeError"):
        load_model(tmp_path / "model")


def test_unknown_format_version_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "model", small_model())
    rewrite(tmp_path / "model", format_version=3)
    with pytest.raises(CheckpointError, match="model format 3, expected 1 or 2"):
        load_model(tmp_path / "model")


def test_empty_window_is_refused(tmp_path: Path) -> None:
    folder = save_version_1(tmp_path / "model", {}, window={"low_hu": 400.0, "high_hu": -1000.0})
    with pytest.raises(CheckpointError, match="invalid window of the model: ValueError"):
        window_of(load_model(folder))


def test_model_without_segmentation_may_not_screen(tmp_path: Path) -> None:
    folder = save_version_1(tmp_path / "model", {"has_segmentation": False}, window={})
    with pytest.raises(CheckpointError, match="marks no lesions"):
        refuse_without_segmentation(load_model(folder))
