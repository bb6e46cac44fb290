"""Differences of engines in a model: of CPUs and of GPUs, measured in calls of their own."""

from dataclasses import replace

import pytest
import torch
from saved_models import small_model

from covtanet.errors import ConfigError
from covtanet.evaluation.engine_difference import EngineResult
from covtanet.experiments.calibration import check_engines, with_differences
from covtanet.inference import openvino_engine

BFLOAT16, ON_GPU = "openvino-bf16", "cuda-bf16"


def result(dice: float) -> list[EngineResult]:
    return [
        EngineResult(dice=dice, involvement=0.1, lesion_px=10, num_slices=5, status=(None,) * 4)
    ]


def test_measure_on_a_gpu_keeps_the_differences_of_cpus_and_replaces_its_own() -> None:
    model = small_model()
    model = with_differences(
        model, [BFLOAT16], {"openvino": result(0.8), BFLOAT16: result(0.7)}, ["a"]
    )
    for dice in (0.6, 0.5):
        results = {"channels_last": result(0.9), ON_GPU: result(dice)}
        model = with_differences(replace(model, digest="old"), [ON_GPU], results, ["b"])
    assert model.digest == ""  # another model until it is saved
    found = {
        name: (difference.mean_dice, difference.mean_dice_float32, difference.data)
        for name, difference in model.engines.items()
    }
    assert found == {BFLOAT16: (0.7, 0.8, ("a",)), ON_GPU: (0.5, 0.9, ("b",))}


def test_measure_on_a_cpu_drops_earlier_engines_of_cpus() -> None:
    """Their 8-bit ranges may be of other slices."""
    results = {"openvino": result(0.8), "openvino-int8": result(0.8)}
    model = with_differences(small_model(), ["openvino-int8"], results, ["a"])
    results = {"openvino": result(0.8), BFLOAT16: result(0.8)}
    assert list(with_differences(model, [BFLOAT16], results, ["a"]).engines) == [BFLOAT16]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU gives the engine")
def test_engine_of_a_gpu_is_not_measured_without_one() -> None:
    with pytest.raises(ConfigError, match="engine cuda-bf16: no GPU"):
        check_engines([ON_GPU])


@pytest.mark.skipif(
    not torch.cuda.is_available() or bool(openvino_engine.missing_instructions(BFLOAT16)),
    reason="needs a GPU and a processor with bfloat16",
)
def test_engines_of_two_devices_are_not_measured_together() -> None:
    with pytest.raises(ConfigError, match="engines of CPUs and of GPUs, expected one kind"):
        check_engines([BFLOAT16, ON_GPU])
