"""Which engine ``auto`` takes, and why an engine that is asked for by name is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_models import small_model

from covtanet.errors import ConfigError, EngineUnavailableError
from covtanet.inference import engine as engines
from covtanet.inference import openvino_runtime
from covtanet.inference.engine import build_engine, choose_engines, within_bounds
from covtanet.model.description import EngineDifference

INT8, BFLOAT16 = "openvino-int8", "openvino-bf16"
GOOD = EngineDifference(
    mean_dice=0.750, mean_dice_float32=0.754, mean_involvement_difference=0.004,
    max_involvement_difference=0.01, lesion_volume_ratio=1.02, num_status_changes=0,
    num_volumes=4, num_slices=100, data=("phantoms",),
)  # fmt: skip
WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs PyTorch")


@pytest.mark.parametrize(
    ("values", "is_within"),
    [
        ({}, True),
        ({"mean_dice": 0.9}, True),  # a rise is no fault
        ({"mean_dice": 0.748}, False),
        ({"mean_dice": None}, False),
        ({"mean_dice": float("nan")}, False),
        ({"mean_involvement_difference": 0.006}, False),
        ({"mean_involvement_difference": None}, False),
        ({"mean_involvement_difference": float("nan")}, False),
        ({"num_status_changes": 1}, False),
        ({"lesion_volume_ratio": None, "max_involvement_difference": None}, True),
    ],
)
def test_bounds_of_an_engine(values: dict[str, Any], is_within: bool) -> None:
    assert replace(GOOD, **values).is_within_bounds is is_within


@pytest.fixture
def cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Set the flags that the system lists."""

    def set_flags(flags: str) -> None:
        path = tmp_path / "cpuinfo"
        path.write_text(f"processor : 0\nflags\t\t: {flags}\nbugs : none\n")
        monkeypatch.setattr(openvino_runtime, "CPU_INFO", path)
        openvino_runtime.cpu_flags.cache_clear()

    yield set_flags
    openvino_runtime.cpu_flags.cache_clear()


@WITHOUT_GPU
def test_auto_tries_measured_engines_within_bounds_fastest_first(cpu: Any) -> None:
    cpu("avx2 avx512_vnni")
    bad = replace(GOOD, num_status_changes=1)
    assert choose_engines({}) == ["openvino"]
    assert choose_engines({INT8: GOOD}) == [INT8, "openvino"]
    assert choose_engines({INT8: bad}) == ["openvino"]
    if openvino_runtime.has_bfloat16():
        assert choose_engines({BFLOAT16: GOOD, INT8: GOOD}) == [INT8, BFLOAT16, "openvino"]
        assert choose_engines({BFLOAT16: GOOD, INT8: bad}) == [BFLOAT16, "openvino"]
    # An engine that another version measured and this one does not know.
    assert choose_engines({"openvino-int4": GOOD}) == ["openvino"]


def test_engine_of_a_gpu_is_taken_unasked_only_if_measured_within_the_bounds() -> None:
    names = engines.BELOW_FLOAT32_ON_GPU
    assert names == ("cuda-bf16", "cuda-fp16")
    assert within_bounds(names, {INT8: GOOD}) == []
    assert within_bounds(names, {"cuda-bf16": GOOD, INT8: GOOD}) == ["cuda-bf16"]
    assert within_bounds(names, {"cuda-bf16": replace(GOOD, mean_dice=0.7)}) == []


@WITHOUT_GPU
def test_processor_never_takes_an_engine_of_a_gpu(cpu: Any) -> None:
    cpu("avx2")
    assert choose_engines({"cuda-bf16": GOOD}) == ["openvino"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_takes_its_measured_engine() -> None:
    name = engines.below_float32()[0]
    assert choose_engines({}) == ["channels_last"]
    assert choose_engines({name: GOOD, INT8: GOOD}) == [name, "channels_last"]
    assert build_engine(small_model().network, 128, differences={name: GOOD}).name == name


@WITHOUT_GPU
def test_processor_without_dot_products_has_no_8_bits(cpu: Any) -> None:
    cpu("avx2 avx512f")
    assert choose_engines({INT8: GOOD}) == ["openvino"]
    with pytest.raises(EngineUnavailableError, match="no 8-bit dot products"):
        build_engine(small_model().network, 128, INT8)


def test_unknown_instructions_count_as_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpu: Any
) -> None:
    monkeypatch.setattr(openvino_runtime, "CPU_INFO", tmp_path / "missing")
    openvino_runtime.cpu_flags.cache_clear()
    assert not openvino_runtime.has_int8()


def test_8_bits_without_quantization_is_refused_by_name(cpu: Any) -> None:
    cpu("avx_vnni")
    with pytest.raises(ConfigError, match="the model has no quantization; covtanet calibrate"):
        build_engine(small_model().network, 128, INT8)


def test_unknown_engine_is_refused() -> None:
    with pytest.raises(ConfigError, match="engine tensorrt, expected auto or one of eager"):
        build_engine(small_model().network, 128, "tensorrt")


@WITHOUT_GPU
def test_auto_leaves_out_an_engine_that_cannot_be_built_with_one_warning(
    cpu: Any, caplog: pytest.LogCaptureFixture
) -> None:
    cpu("avx512_vnni")
    # Measured, but the quantization is not there.
    found = engines.build_engine(small_model().network, 128, differences={INT8: GOOD})
    assert found.name == "openvino"
    (record,) = caplog.records
    assert record.message.startswith(f"engine {INT8} is left out:")
