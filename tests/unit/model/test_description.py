"""Descriptions of saved models: both format versions give the same typed parts."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from saved_models import rewrite_as_version_1, small_model

from covtanet.ct.window import WindowConfig
from covtanet.errors import CheckpointError
from covtanet.inference.predictor import Predictor, refuse_without_segmentation, window_of
from covtanet.model.covtanet import SIZES, CovTANet, architecture
from covtanet.model.description import BurdenDiagnosis, Capabilities, Preprocessing, Readout
from covtanet.model.saved_model import SavedModel, load_model, save_model
from covtanet.screening.config import ScreeningConfig, for_model


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


def test_readout_is_kept(tmp_path: Path) -> None:
    readout = Readout(lesion_threshold=0.3, burden=BurdenDiagnosis(intercept=-1.5, slope=40.0))
    save_model(tmp_path / "model", replace(small_model(), readout=readout))
    assert load_model(tmp_path / "model").readout == readout


def test_model_without_a_readout_is_read_at_one_half(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_model(folder, small_model())
    description = json.loads((folder / "model.json").read_text())
    del description["readout"]
    (folder / "model.json").write_text(json.dumps(description))
    assert load_model(folder).readout == Readout(lesion_threshold=0.5, burden=None)


def test_unknown_value_of_the_readout_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "model", small_model())
    rewrite(tmp_path / "model", readout={"lesion_threshold": 0.3, "dose": 1})
    with pytest.raises(CheckpointError, match="cannot be read: TypeError"):
        load_model(tmp_path / "model")


def test_neighbours_that_the_network_does_not_read_are_refused() -> None:
    preprocessing = Preprocessing(size_px=128, num_neighbours=1)
    with pytest.raises(CheckpointError, match="reads 1 channels, expected 3"):
        window_of(replace(small_model(), preprocessing=preprocessing))


@pytest.mark.parametrize(
    ("involvement", "expected"), [(0.0, 0.119), (0.02, 0.5), (0.1, 0.9997), (1.0, 1.0)]
)
def test_probability_by_burden_is_logistic(involvement: float, expected: float) -> None:
    burden = BurdenDiagnosis(intercept=-2.0, slope=100.0)
    assert burden.p_infected(involvement) == pytest.approx(expected, abs=5e-4)


def test_values_of_the_model_stand_in_for_nulls() -> None:
    """A site's own values stand, but the distance of slices is that of the training."""
    burden = BurdenDiagnosis(intercept=-2.0, slope=100.0)
    readout = Readout(lesion_threshold=0.3, burden=burden)
    preprocessing = Preprocessing(slice_step_mm=4.0)
    config = for_model(ScreeningConfig(slice_step_mm=1.0), preprocessing, readout)
    assert (config.slice_step_mm, config.lesion_threshold, config.burden) == (4.0, 0.3, burden)
    of_site = ScreeningConfig(lesion_threshold=0.6, burden=replace(burden, intercept=-1.0))
    config = for_model(of_site, Preprocessing(slice_step_mm=None), readout)
    assert (config.lesion_threshold, config.burden) == (0.6, replace(burden, intercept=-1.0))
    assert config.slice_step_mm == of_site.slice_step_mm
