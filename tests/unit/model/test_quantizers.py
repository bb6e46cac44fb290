"""The quantization file: what is written comes back, and anything that does not fit is refused."""

import json
import pickle
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from saved_models import small_model

from covtanet import storage
from covtanet.errors import CheckpointError
from covtanet.model.description import EngineDifference
from covtanet.model.model_files import MODEL_FILES, fetch_model, model_files
from covtanet.model.quantizers import Quantizers, load_quantizers, save_quantizers
from covtanet.model.saved_model import SavedModel, load_model, save_model

INT32, FLOAT32 = np.int32, np.float32
QUANTIZERS = Quantizers(
    graph_sha256="a" * 64,
    source=np.array([[0, 0], [3, 0]], INT32),
    levels=np.array([256, 255], INT32),
    # A scalar, and one range for each of three channels.
    shape=np.array([[0, 0, 0, 0, 0, 0], [2, 3, 1, 0, 0, 0]], INT32),
    low=np.array([-1, -2, -3, -4], FLOAT32),
    high=np.array([1, 2, 3, 4], FLOAT32),
    consumer=np.array([[0, 4, 0], [1, 4, 1], [1, 5, 0]], INT32),
    constant=np.array([[7, 2]], INT32),
    value=np.array([0.5, 0.25], FLOAT32),
)
DIFFERENCE = EngineDifference(
    mean_dice=0.75, mean_dice_float32=0.752, mean_involvement_difference=0.001,
    max_involvement_difference=0.002, lesion_volume_ratio=1.01, num_status_changes=0,
    num_volumes=4, num_slices=100, data=("phantoms",),
)  # fmt: skip


def tensors() -> dict[str, Any]:
    values = {item.name: getattr(QUANTIZERS, item.name) for item in fields(QUANTIZERS)}
    del values["graph_sha256"]
    return values


def assert_equal(found: Quantizers | None, expected: Quantizers) -> None:
    assert found is not None
    assert found.graph_sha256 == expected.graph_sha256
    for name in tensors():
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def calibrated_model() -> SavedModel:
    return replace(small_model(), engines={"openvino-int8": DIFFERENCE}, quantizers=QUANTIZERS)


def test_quantizers_come_back_with_their_ranges(tmp_path: Path) -> None:
    save_quantizers(tmp_path / "q", QUANTIZERS)
    found = load_quantizers(tmp_path / "q")
    assert_equal(found, QUANTIZERS)
    (low, high), (lows, _) = found.ranges()
    assert (low.shape, float(low), float(high)) == ((), -1.0, 1.0)
    assert lows.tolist() == [[-2], [-3], [-4]]
    assert [values.tolist() for values in found.values()] == [[0.5, 0.25]]


def changed(name: str, index: Any, value: Any) -> dict[str, Any]:
    tensor = tensors()[name].copy()
    tensor[index] = value
    return {name: tensor}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": np.zeros(1, FLOAT32)}, "has tensors"),
        ({"low": np.zeros(4, np.float64)}, "low is float64"),
        ({"source": np.zeros((2, 3), INT32)}, r"source is int32 \(2, 3\)"),
        ({"levels": np.zeros((2, 1), INT32)}, r"levels is int32 \(2, 1\)"),
        ({"low": np.zeros(3, FLOAT32)}, "sizes do not fit: low"),
        ({"value": np.zeros(3, FLOAT32)}, "sizes do not fit: value"),
        ({"levels": np.full(1, 256, INT32)}, "sizes do not fit: levels"),
        (changed("shape", (1, 0), 6), "sizes do not fit: rank"),
        (changed("shape", (1, 1), -3), "sizes do not fit: dimension"),
        (changed("shape", (1, 1), 1 << 20), "sizes do not fit: dimension"),
        (changed("constant", (0, 1), 0), "sizes do not fit: constant"),
        (changed("low", 1, np.nan), "NaN or infinite low"),
        (changed("high", 1, np.inf), "NaN or infinite high"),
        (changed("value", 1, np.nan), "NaN or infinite value"),
        (changed("low", 2, 7.0), "low above high"),
        (changed("levels", 0, 1), "levels"),
        (changed("levels", 0, 257), "levels"),
        (changed("consumer", (0, 0), 2), "unknown quantizer"),
        (changed("consumer", (0, 1), -1), "negative node"),
        (changed("source", (0, 1), -1), "negative node"),
    ],
)
def test_file_that_does_not_fit_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    save_file(tensors() | change, tmp_path / "q", metadata={"graph_sha256": "a" * 64})
    with pytest.raises(CheckpointError, match=message):
        load_quantizers(tmp_path / "q")


def test_missing_tensor_is_refused(tmp_path: Path) -> None:
    values = tensors()
    del values["low"]
    save_file(values, tmp_path / "q")
    with pytest.raises(CheckpointError, match="has tensors"):
        load_quantizers(tmp_path / "q")


def test_saved_model_keeps_quantization_and_differences(tmp_path: Path) -> None:
    digest = save_model(tmp_path / "model", calibrated_model())
    found = load_model(tmp_path / "model", digest)
    assert found.engines == {"openvino-int8": DIFFERENCE}
    assert_equal(found.quantizers, QUANTIZERS)
    travelled = pickle.loads(pickle.dumps(found))
    assert (travelled.engines, travelled.digest) == (found.engines, digest)
    assert_equal(travelled.quantizers, QUANTIZERS)


def test_model_without_calibration_has_two_files_and_its_old_description(tmp_path: Path) -> None:
    save_model(tmp_path / "model", small_model())
    assert set(model_files(tmp_path / "model")) == {"model.json", "weights.safetensors"}
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "model.json", "weights.safetensors",
    ]  # fmt: skip
    description = json.loads((tmp_path / "model" / "model.json").read_text())
    assert not {"engines", "quantization_sha256"} & set(description)
    model = load_model(tmp_path / "model")
    assert (model.engines, model.quantizers) == ({}, None)


@pytest.mark.parametrize("damage", ["changed", "missing", "too large"])
def test_tampered_quantization_is_refused(tmp_path: Path, damage: str) -> None:
    save_model(tmp_path / "model", calibrated_model())
    path = tmp_path / "model" / "quantization.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    message = "the quantization differs from the digest"
    if damage == "missing":
        path.unlink()
        message = "quantization.safetensors is missing"
    if damage == "too large":
        with path.open("r+b") as file:
            file.truncate(MODEL_FILES[path.name] + 1)  # sparse
        message = r"quantization\.safetensors has \d+ bytes, expected at most"
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path / "model")


def test_quantization_that_the_description_does_not_name_is_not_read(tmp_path: Path) -> None:
    save_model(tmp_path / "model", small_model())
    (tmp_path / "model" / "quantization.safetensors").write_bytes(b"of another model")
    assert load_model(tmp_path / "model").quantizers is None


@pytest.mark.parametrize("is_calibrated", [True, False])
def test_fetch_copies_the_files_that_the_description_names(
    tmp_path: Path, is_calibrated: bool
) -> None:
    model = calibrated_model() if is_calibrated else small_model()
    save_model(tmp_path / "model", model)
    target = tmp_path / "copy"
    asked: list[str] = []

    def fetch(sizes: Any) -> None:
        asked.extend(sizes)
        storage.download_files(str(tmp_path / "model"), sizes, target)

    fetch_model(target, fetch)
    expected = {"model.json", "weights.safetensors"}
    expected |= {"quantization.safetensors"} if is_calibrated else set()
    # A file that the model lacks is not asked for: S3 may answer 403 instead of 404.
    assert set(asked) == {path.name for path in target.iterdir()} == expected
    assert (load_model(target).quantizers is None) is not is_calibrated


def test_description_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"model\.json cannot be read"):
        model_files(tmp_path)
