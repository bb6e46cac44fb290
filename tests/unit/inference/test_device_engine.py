"""The engine of GPUs on a CPU: the same class, without streams and graphs.

What a GPU alone does, copies beside computing and recorded kernels, is not tested here.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from saved_models import small_model

from covtanet.errors import EngineUnavailableError
from covtanet.inference import device_engine as device_engine_module
from covtanet.inference.chunks import SegmentedChunk, SliceChunk
from covtanet.inference.device_engine import BFLOAT16, DeviceEngine, build
from covtanet.inference.engine import build_engine
from covtanet.inference.predictor import Predictor
from covtanet.inference.segmenter import FLIPS, Engine, EngineInput
from covtanet.model.covtanet import CovTANet

SIZE_PX = 128
SHAPE = (1, SIZE_PX, SIZE_PX)
WITH_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU gives the engine")
# Measured with the contrast of ``contrasting_network``: 1.7 in the mean and 11 at most.
MEAN_LEVELS_APART, MOST_LEVELS_APART = 3.0, 20


def contrasting_network() -> CovTANet:
    """Return a network whose lesion map of noise has low and high probabilities."""
    network = small_model().network
    last: Any = network.segnet.filter[-1]  # type: ignore[index]
    with torch.inference_mode():
        intensity = torch.from_numpy(noise(4).astype(np.float32)) / 65535
        logits, _ = network.segment(intensity)
        last.weight.mul_(2 / logits.std())
        last.bias.add_(-logits.mean()).mul_(2 / logits.std())
    return network


def device_engine(batch_slices: int = 4, network: CovTANet | None = None, **values: Any) -> Any:
    network = network or contrasting_network()
    return DeviceEngine(network, name=BFLOAT16, shape=SHAPE, batch_slices=batch_slices, **values)


def noise(num_slices: int, seed: int = 0) -> np.ndarray:
    """Return slices of blocks of 16 pixels."""
    blocks = np.random.default_rng(seed).integers(0, 65536, (num_slices, 1, 8, 8))
    return blocks.repeat(16, 2).repeat(16, 3).astype(np.uint16)


def test_batch_holds_no_more_than_pytorch_averages_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Seen on an H100: 64 slices of V7 at 512 pixels ended with an internal error of PyTorch."""
    assert device_engine_module.most_slices(160, (1, 512, 512)) == 51
    channels = contrasting_network().config.segnet.fused_channels
    most = 3 * channels * SIZE_PX**2
    monkeypatch.setattr(device_engine_module, "MOST_FUSED_VALUES", most)
    assert device_engine(batch_slices=8).batch_slices == 3
    monkeypatch.setattr(device_engine_module, "MOST_FUSED_VALUES", 1)
    assert device_engine(batch_slices=8).batch_slices == 1


def segment_one(engine: Engine, slices: np.ndarray, diagnosed: list[int]) -> SegmentedChunk:
    (answer,) = engine.segment([SliceChunk(slices, diagnosed)])
    return answer


def assert_near(found: np.ndarray, expected: np.ndarray) -> None:
    apart = np.abs(found.astype(int) - expected.astype(int))
    assert apart.mean() < MEAN_LEVELS_APART
    assert apart.max() <= MOST_LEVELS_APART


@pytest.mark.parametrize("flips", [False, True])
def test_levels_and_vectors_are_near_those_in_float32(flips: bool) -> None:
    exact = build_engine(contrasting_network(), SIZE_PX, "eager", flips=flips)
    views: dict[str, Any] = {"flips": FLIPS} if flips else {}
    found = segment_one(device_engine(**views), noise(4), [0, 2])
    expected = segment_one(exact, noise(4), [0, 2])
    assert (found.engine, expected.engine) == (BFLOAT16, "eager")
    assert found.lesion_levels.dtype == np.uint8
    assert np.ptp(expected.lesion_levels) > 100  # not all one level, which any engine would give
    assert_near(found.lesion_levels, expected.lesion_levels)
    assert found.pooled.dtype == np.float32
    error = np.abs(found.pooled - expected.pooled).mean()
    assert 0 < error < 0.02 * np.abs(expected.pooled).mean()


def test_largest_level_is_intensity_1() -> None:
    """Its 16 bits are those of the signed number -1."""
    slices = np.full((1, *SHAPE), 65535, np.uint16)
    exact = build_engine(contrasting_network(), SIZE_PX, "eager")
    expected = segment_one(exact, slices, [])
    assert_near(segment_one(device_engine(), slices, []).lesion_levels, expected.lesion_levels)


def test_last_batch_is_filled_up_without_effect() -> None:
    engine = device_engine()
    whole = segment_one(engine, noise(4), [0, 1, 2, 3])
    for num_slices in (1, 3):
        part = segment_one(engine, noise(4)[:num_slices], [num_slices - 1])
        np.testing.assert_array_equal(part.lesion_levels, whole.lesion_levels[:num_slices])
        np.testing.assert_array_equal(part.pooled[0], whole.pooled[num_slices - 1])


def test_chunks_come_back_in_order_with_the_diagnosed_vectors_alone() -> None:
    engine = device_engine()
    slices = noise(9)
    chunks = [
        SliceChunk(slices[:4], [3, 1]),
        SliceChunk(slices[4:8], []),
        SliceChunk(slices[8:], [0]),
    ]
    answers = list(engine.segment(chunks))
    assert [len(answer.pooled) for answer in answers] == [2, 0, 1]
    for answer, chunk in zip(answers, chunks, strict=True):
        alone = segment_one(engine, *chunk)
        np.testing.assert_array_equal(answer.lesion_levels, alone.lesion_levels)
        np.testing.assert_array_equal(answer.pooled, alone.pooled)


def test_one_batch_is_under_way_while_an_earlier_one_is_waited_for() -> None:
    read = []

    def chunks() -> Any:
        for index in range(4):
            read.append(index)
            yield SliceChunk(noise(1, index), [])

    answers = device_engine().segment(chunks())
    next(answers)
    assert read == [0, 1]
    next(answers)
    assert read == [0, 1, 2]


def test_nan_in_a_batch_is_refused_and_the_next_batch_answers() -> None:
    network = small_model().network
    engine = device_engine(network=network)
    module = engine.plain.network.segnet.filter[-1]
    with torch.no_grad():
        good = module.bias.clone()
        module.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        segment_one(engine, noise(1), [0])
    with torch.no_grad():
        module.bias.copy_(good)
    assert len(segment_one(engine, noise(1), [0]).lesion_levels) == 1


def test_nan_of_one_slice_is_refused_whatever_its_position() -> None:
    engine = device_engine()
    run = engine.run

    def with_nan(stored: torch.Tensor) -> Any:
        answer = run(stored)
        answer.is_finite[2] = False
        return answer

    engine.run = with_nan
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        segment_one(engine, noise(3), [])
    # A slice that the batch was filled up with is nobody's.
    assert len(segment_one(engine, noise(2), []).lesion_levels) == 2


def test_chunk_above_the_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="5 slices, expected at most 4"):
        list(device_engine().segment([SliceChunk(noise(5), [])]))


def test_network_of_other_engines_stays_in_float32() -> None:
    network = small_model().network
    device_engine(network=network)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


def test_batch_is_halved_until_it_fits(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    from covtanet.inference import levels_network

    forward = levels_network.LevelsNetwork.forward

    def small_memory(self: Any, stored: torch.Tensor) -> Any:
        if len(stored) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, stored)

    monkeypatch.setattr(levels_network.LevelsNetwork, "forward", small_memory)
    assert device_engine(batch_slices=8).batch_slices == 2
    assert "batches of 2 slices" in caplog.text


def test_threads_get_the_answers_to_their_own_slices() -> None:
    engine = device_engine()
    parts = [noise(count, count) for count in (1, 3, 4)]
    expected = [segment_one(engine, part, [0]) for part in parts]
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda part: segment_one(engine, part, [0]), parts * 4)
        for index, answer in enumerate(found):
            same = expected[index % 3]
            np.testing.assert_array_equal(answer.lesion_levels, same.lesion_levels)
            np.testing.assert_array_equal(answer.pooled, same.pooled)


@WITHOUT_GPU
def test_engine_of_gpus_is_refused_by_name_without_one() -> None:
    source = EngineInput(
        network=small_model().network,
        size_px=SIZE_PX,
        num_threads=1,
        quantizers=None,
        is_saved=False,
    )
    with pytest.raises(EngineUnavailableError, match="engine cuda-bf16: no GPU"):
        build(BFLOAT16, source)


def test_predictor_predicts_a_volume_with_it() -> None:
    """Five slices, of which the diagnosis reads all, in batches of four."""
    model = replace(small_model(), network=contrasting_network())
    predictor = Predictor(model, engine="eager")
    slices = noise(5)[:, 0]
    expected = predictor.predict(slices)
    predictor.engine = device_engine(network=model.network)
    found = predictor.predict(slices)
    assert found.engine == BFLOAT16
    assert_near(found.lesion_levels, expected.lesion_levels)
    assert found.p_infected == pytest.approx(expected.p_infected, abs=0.02)


@WITH_GPU
@pytest.mark.parametrize("has_graph", [False, True])
def test_gpu_gives_the_levels_of_a_cpu_in_order(has_graph: bool) -> None:
    """Eleven batches, so that copies and kernels of several are under way at once."""
    on_cpu = device_engine()
    on_gpu = device_engine(network=contrasting_network().to("cuda"), has_graph=has_graph)
    assert on_gpu.has_graph == has_graph
    slices = noise(43)
    chunks = [SliceChunk(slices[start : start + 4], [1]) for start in range(0, 43, 4)]
    for found, expected in zip(on_gpu.segment(chunks), on_cpu.segment(chunks), strict=True):
        assert_near(found.lesion_levels, expected.lesion_levels)
        error = np.abs(found.pooled - expected.pooled).mean()
        assert error < 0.02 * np.abs(expected.pooled).mean()


@WITH_GPU
def test_gpu_refuses_nan_of_a_graph() -> None:
    engine = device_engine(network=contrasting_network().to("cuda"))
    on_cpu = noise(1)
    assert len(segment_one(engine, on_cpu, []).pooled) == 0
    # The recorded kernels read the weights where they lie.
    module = engine.plain.network.segnet.filter[-1]
    with torch.no_grad():
        module.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        segment_one(engine, on_cpu, [0])
