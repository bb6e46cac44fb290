"""Calibration of a small network on phantoms, by NNCF itself."""

import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from repository import ROOT
from saved_models import small_model

from covtanet.commands.calibrate import parse, run
from covtanet.errors import CheckpointError, ConfigError, EngineUnavailableError
from covtanet.inference import openvino_engine, openvino_runtime
from covtanet.inference.compiled_cache import read_entry
from covtanet.inference.engine import build_engine
from covtanet.inference.openvino_graph import convert, number_nodes
from covtanet.inference.predictor import Predictor
from covtanet.inference.quantize import has_nncf
from covtanet.inference.segmenter import Segmenter
from covtanet.model.description import EngineDifference
from covtanet.model.saved_model import SavedModel, load_model, save_model
from covtanet.phantoms.phantom import PhantomConfig, make_phantom

INT8, BFLOAT16 = "openvino-int8", "openvino-bf16"
SIZE_PX = 128
WITHIN = EngineDifference(
    mean_dice=0.7, mean_dice_float32=0.7, mean_involvement_difference=0.0,
    max_involvement_difference=0.0, lesion_volume_ratio=1.0, num_status_changes=0,
    num_volumes=1, num_slices=1, data=("phantoms",),
)  # fmt: skip
NEEDS_INT8 = pytest.mark.skipif(
    not openvino_runtime.has_int8() or torch.cuda.is_available(),
    reason="the processor has no 8-bit dot products, or a GPU runs the network",
)
pytestmark = pytest.mark.skipif(not has_nncf(), reason="NNCF is not installed")


def write_volumes(folder: Path, num_volumes: int) -> list[str]:
    """Write labelled phantoms; return the options that name them."""
    images, masks = folder / "images", folder / "masks"
    images.mkdir()
    masks.mkdir()
    for index in range(num_volumes):
        phantom = make_phantom(
            PhantomConfig(
                seed=index, involvement=0.15, size_px=96, num_slices=12, pixel_mm=3.7, slice_mm=20
            )
        )
        # Phantoms are (z, y, x) to LPS, NIfTI is (x, y, z) to RAS.
        for target, values in (
            (images / f"p{index}-hu.nii.gz", phantom.hu),
            (masks / f"p{index}-hu_mask.nii.gz", phantom.lesion_mask.astype(np.uint8)),
        ):
            affine = np.diag([-3.7, -3.7, 20.0, 1.0])
            nib.save(nib.Nifti1Image(values.transpose(2, 1, 0), affine), target)
    return ["--images", str(images), "--masks", str(masks)]


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small untrained model that was calibrated on two of three phantoms."""
    folder = tmp_path_factory.mktemp("calibration")
    save_model(folder / "model", small_model())
    arguments = ["--model", str(folder / "model"), "--out", str(folder / "out")]
    arguments += [*write_volumes(folder, 3), "--name", "phantoms", "--num-slices", "12"]
    # 4 if the untrained network leaves the bounds, which is no fault of the command.
    assert run(parse([*arguments, "--engine", INT8, "--every", "2"])) in (0, 4)
    return folder / "out"


def slices() -> Any:
    return np.random.default_rng(0).random((4, 1, SIZE_PX, SIZE_PX), dtype=np.float32)


def engine_of(model: SavedModel, name: str) -> Any:
    return build_engine(
        model.network,
        SIZE_PX,
        name,
        differences=model.engines,
        quantizers=model.quantizers,
        is_saved=bool(model.digest),
    )


@NEEDS_INT8
def test_calibrated_model_runs_in_8_bits_near_float32(calibrated: Path) -> None:
    model = load_model(calibrated)
    probability, pooled = engine_of(model, INT8).run(slices())
    expected, vectors = engine_of(model, "openvino").run(slices())
    difference = np.abs(probability - expected)
    assert 0 < difference.max() < 0.2
    assert difference.mean() < 0.02
    assert np.abs(pooled - vectors).mean() < 0.05 * np.abs(vectors).mean() + 0.02
    if openvino_runtime.has_bfloat16():
        rounded, _ = engine_of(model, BFLOAT16).run(slices())
        assert 0 < np.abs(rounded - expected).max() < 0.05


@NEEDS_INT8
def test_model_says_what_was_measured_and_how(calibrated: Path) -> None:
    description = json.loads((calibrated / "model.json").read_text())
    measured = description["engines"][INT8]
    assert measured["data"] == ["phantoms"]
    # p0 and p2 gave the ranges.
    assert measured["num_volumes"] == 1
    assert measured["num_slices"] > 0
    assert description["provenance"]["calibration"] == {
        "data": ["phantoms"], "num_slices": 12, "num_volumes": 2,
    }  # fmt: skip
    weights = (calibrated.parent / "model" / "weights.safetensors").read_bytes()
    assert (calibrated / "weights.safetensors").read_bytes() == weights


@NEEDS_INT8
def test_auto_takes_8_bits_within_the_bounds_only(calibrated: Path) -> None:
    model = load_model(calibrated)
    within = replace(model, engines={INT8: WITHIN})
    outside = replace(model, engines={INT8: replace(WITHIN, mean_dice=0.6)})
    assert Predictor(within).engine.name == INT8
    assert Predictor(outside).engine.name == "openvino"
    assert Predictor(outside, engine=INT8).engine.name == INT8


@NEEDS_INT8
def test_graph_of_another_version_is_left_out_with_one_warning(
    calibrated: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load_model(calibrated)
    assert model.quantizers is not None
    quantizers = replace(model.quantizers, graph_sha256="0" * 64)
    changed = replace(model, quantizers=quantizers, engines={INT8: WITHIN}, digest="")
    with caplog.at_level(logging.WARNING):
        assert engine_of(changed, "auto").name == "openvino"
    (record,) = caplog.records
    assert "is not the calibrated one" in record.message
    with pytest.raises(EngineUnavailableError, match="is not the calibrated one"):
        engine_of(changed, INT8)


@NEEDS_INT8
def test_quantizer_of_a_node_that_is_not_there_is_refused(calibrated: Path) -> None:
    model = load_model(calibrated)
    assert model.quantizers is not None
    source = model.quantizers.source.copy()
    source[0, 0] = 1 << 20
    changed = replace(model, quantizers=replace(model.quantizers, source=source), digest="")
    with pytest.raises(ConfigError, match="does not fit the graph: IndexError"):
        engine_of(changed, INT8)


def test_tampered_quantization_is_refused(calibrated: Path, tmp_path: Path) -> None:
    for path in calibrated.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    data = bytearray((tmp_path / "quantization.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "quantization.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="the quantization differs from the digest"):
        load_model(tmp_path)


def test_two_conversions_have_equal_numbers_of_nodes() -> None:
    segmenter = Segmenter(small_model().network).eval().requires_grad_(False)
    first, second = (convert(segmenter, SIZE_PX) for _ in range(2))
    assert number_nodes(first) == number_nodes(second)
    names = [
        [node.get_friendly_name() for node in graph.get_ordered_ops()] for graph in (first, second)
    ]
    assert names[0] == names[1]
    other = Segmenter(small_model().network).eval().requires_grad_(False)
    assert number_nodes(convert(other, 2 * SIZE_PX)) != number_nodes(first)


def test_float32_of_a_calibrated_model_is_that_of_the_model(calibrated: Path) -> None:
    one = engine_of(load_model(calibrated), "openvino").run(slices())
    other = engine_of(small_model(), "eager").run(slices())
    for found, expected in zip(one, other, strict=True):
        assert np.abs(found - expected).max() < 1e-4


@pytest.mark.skipif(not openvino_runtime.has_bfloat16(), reason="no bfloat16 instructions")
def test_bfloat16_is_measured_without_nncf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nncf", None)
    save_model(tmp_path / "model", small_model())
    arguments = ["--model", str(tmp_path / "model"), "--out", str(tmp_path / "out")]
    assert run(parse([*arguments, *write_volumes(tmp_path, 2)])) in (0, 4)
    model = load_model(tmp_path / "out")
    assert list(model.engines) == [BFLOAT16]
    assert model.quantizers is None
    arguments[3] = str(tmp_path / "other")
    again = [*arguments, "--images", str(tmp_path / "images"), "--masks", str(tmp_path / "masks")]
    with pytest.raises(ConfigError, match="NNCF is missing"):
        run(parse([*again, "--engine", INT8]))


def test_compiled_network_comes_from_the_cache_and_survives_damage(
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("COVTANET_CACHE", str(tmp_path / "cache"))
    model = load_model(model_folder)
    expected, _ = engine_of(model, "openvino").run(slices())
    (entry,) = (tmp_path / "cache").iterdir()
    content = entry.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(openvino_engine, "convert", None)  # a call would fail
        found, _ = engine_of(model, "openvino").run(slices())
    assert np.array_equal(found, expected)
    entry.write_bytes(content[:-1])
    again, _ = engine_of(model, "openvino").run(slices())
    assert np.array_equal(again, expected)
    assert "damaged" in caplog.text
    # Written again.
    assert read_entry(tmp_path / "cache", entry.name) is not None


CODE = """
import sys
from covtanet.inference.engine import build_engine
from covtanet.inference.openvino_runtime import import_openvino
from covtanet.model.covtanet import SIZES, CovTANet
network = CovTANet(SIZES["tiny"]).eval().requires_grad_(False)
assert build_engine(network, 64, "openvino").name == "openvino"
assert "nncf" not in sys.modules
assert not any(name.startswith("openvino_telemetry.") for name in sys.modules)
"""
QUANTIZE = """
from covtanet.inference.quantize import import_nncf
import_nncf()
assert not any(name.startswith("openvino_telemetry.") for name in sys.modules)
"""


@pytest.mark.parametrize("code", [CODE, CODE + QUANTIZE], ids=["screening", "calibration"])
def test_no_telemetry_is_loaded_or_written(tmp_path: Path, code: str) -> None:
    """Of OpenVINO and NNCF, which report their use and keep an id in the home folder otherwise."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] in ([], [".cache"])
