"""Parts of gpu.py that measure the matrix rate and the engines."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu_cases import Case, Effort
from covtanet.inference.chunks import SliceChunk
from covtanet.inference.device_engine import BFLOAT16, DeviceEngine
from covtanet.inference.float_engine import BATCH_SLICES as FLOAT32_BATCH_SLICES
from covtanet.inference.float_engine import FloatEngine, to_intensity
from covtanet.inference.pytorch_engine import build
from covtanet.inference.segmenter import Engine, EngineInput, Segmenter
from covtanet.model.covtanet import CovTANet

Values = dict[str, Any]
WARM_CALLS = 3
# As many diagnosed slices of a series as the paper's network reads, in 128 slices.
DIAGNOSED_EVERY = 4


def seconds_of(
    work: Callable[[], object],
    device: torch.device,
    timed_s: float,
    warm_calls: int = WARM_CALLS,
) -> float:
    """Return the mean seconds of a call; the device is waited for after all calls."""
    for _ in range(warm_calls):
        work()
    single_s = _timed(work, 1, device)
    num_calls = max(1, round(timed_s / max(single_s, 1e-6)))
    return _timed(work, num_calls, device) / num_calls


def _timed(work: Callable[[], object], num_calls: int, device: torch.device) -> float:
    synchronise(device)
    started = time.perf_counter()
    for _ in range(num_calls):
        work()
    synchronise(device)
    return time.perf_counter() - started


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all that was started."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_bytes(device: torch.device) -> int | None:
    """Return the most memory that was reserved so far; null on a CPU."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None


def measure_gemm(effort: Effort, device: torch.device) -> Values:
    """Measure the product of two square matrices in bfloat16."""
    side = effort.matrix
    first, second = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = seconds_of(lambda: first @ second, device, effort.timed_s)
    return {"matrix": side, "seconds": seconds, "flops_per_s": 2 * side**3 / seconds}


def measure_engine(case: Case, engine_name: str, effort: Effort, device: torch.device) -> Values:
    """Measure a network in one engine: alone, with its input on the device, and end to end."""
    torch.manual_seed(0)
    # As ``pytorch_engine`` has it: float32 within the tolerance of screening.
    torch.backends.cudnn.allow_tf32 = False
    network = CovTANet(case.network).eval().requires_grad_(False).to(device)
    slices = _stored_slices(case, effort)
    _add_contrast(network, slices, device)
    flops = flops_of_slice(network, case, device)
    expected = _float32_probability(network, slices[: effort.batch_slices], device)
    engine: FloatEngine | DeviceEngine
    if engine_name == "float32":
        engine = build("channels_last", _source(network, case, effort))
        alone = _float32_alone(engine, network, slices, device)
    else:
        engine = _device_engine(network, case, engine_name, effort)
        alone = _device_alone(engine, slices, device)
    alone_s = seconds_of(alone, device, effort.timed_s) / engine.batch_slices
    end_to_end_s = _end_to_end_s(engine, slices, device, effort)
    return {
        "batch_slices": engine.batch_slices,
        "has_graph": isinstance(engine, DeviceEngine) and engine.has_graph,
        "flops_per_slice": flops,
        "network_slices_per_s": 1 / alone_s,
        "end_to_end_slices_per_s": 1 / end_to_end_s,
        "peak_memory_bytes": peak_memory_bytes(device),
        **_difference(engine, slices, expected),
    }


def _device_engine(network: CovTANet, case: Case, engine_name: str, effort: Effort) -> DeviceEngine:
    return DeviceEngine(
        network,
        name=BFLOAT16,
        shape=case.shape,
        batch_slices=effort.batch_slices,
        has_graph=engine_name != "bf16 eager",
        is_compiled=engine_name == "bf16 compiled",
    )


def _stored_slices(case: Case, effort: Effort) -> NDArray[np.uint16]:
    """Return slices of noise as stored, (S, C, size, size)."""
    generator = np.random.default_rng(0)
    return generator.integers(0, 65536, (effort.num_slices, *case.shape), np.uint16)


def _add_contrast(network: CovTANet, slices: NDArray[np.uint16], device: torch.device) -> None:
    """Scale the last layer so that random weights give low and high probabilities of noise."""
    last: Any = network.segnet.filter[-1]  # type: ignore[index]
    with torch.inference_mode():
        intensity = torch.from_numpy(to_intensity(slices[:1])).to(device)
        logits, _ = network.segment(intensity)
        factor = 2 / logits.std()
        last.weight.mul_(factor)
        last.bias.add_(-logits.mean()).mul_(factor)


def flops_of_slice(network: CovTANet, case: Case, device: torch.device) -> float:
    """Return the floating point operations of one slice, two for a product and its sum."""
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        network.segment(torch.zeros((1, *case.shape), device=device))
    return float(counter.get_total_flops())


def _source(network: CovTANet, case: Case, effort: Effort) -> EngineInput:
    return EngineInput(
        network=network,
        size_px=case.size_px,
        num_threads=torch.get_num_threads(),
        quantizers=None,
        is_saved=False,
        # The engine's own number, unless the effort is smaller.
        batch_slices=min(effort.batch_slices, FLOAT32_BATCH_SLICES),
    )


def _float32_probability(
    network: CovTANet, slices: NDArray[np.uint16], device: torch.device
) -> NDArray[np.float32]:
    """Return the probability of some slices in plain float32, one at a time for their memory."""
    maps = []
    with torch.inference_mode():
        for slice_levels in slices:
            intensity = torch.from_numpy(to_intensity(slice_levels[None])).to(device)
            probability, _ = Segmenter(network)(intensity)
            maps.append(probability.cpu().numpy())
    return np.concatenate(maps)


def _float32_alone(
    engine: FloatEngine, network: CovTANet, slices: NDArray[np.uint16], device: torch.device
) -> Callable[[], object]:
    segmenter = Segmenter(network)
    intensity = torch.from_numpy(to_intensity(slices[: engine.batch_slices])).to(device)
    batch = intensity.contiguous(memory_format=torch.channels_last)

    def run() -> object:
        with torch.inference_mode():
            return segmenter(batch)

    return run


def _device_alone(
    engine: DeviceEngine, slices: NDArray[np.uint16], device: torch.device
) -> Callable[[], object]:
    bits = slices[: engine.batch_slices].view(np.int16)
    stored = torch.from_numpy(bits).to(device)
    synchronise(device)

    def run() -> object:
        with torch.inference_mode(), engine.streams.computing():
            return engine.run(stored)

    return run


def _chunks(slices: NDArray[np.uint16], batch_slices: int) -> list[SliceChunk]:
    starts = range(0, len(slices), batch_slices)
    batches = [slices[start : start + batch_slices] for start in starts]
    return [SliceChunk(batch, list(range(0, len(batch), DIAGNOSED_EVERY))) for batch in batches]


def _end_to_end_s(
    engine: Engine, slices: NDArray[np.uint16], device: torch.device, effort: Effort
) -> float:
    """Return the seconds of a slice from uint16 in memory to uint8 in memory."""
    chunks = _chunks(slices, engine.batch_slices)

    def run() -> None:
        for _ in engine.segment(chunks):
            pass

    # Each call is many batches: one warms up.
    return seconds_of(run, device, effort.timed_s, warm_calls=1) / len(slices)


def _difference(
    engine: Engine, slices: NDArray[np.uint16], expected: NDArray[np.float32]
) -> Values:
    """Return the difference of an engine's levels from float32, of random weights and noise."""
    chunks = _chunks(slices[: len(expected)], engine.batch_slices)
    levels = np.concatenate([answer.lesion_levels for answer in engine.segment(chunks)])
    apart = np.abs(levels - 254 * expected)
    return {"mean_levels_apart": float(apart.mean()), "max_levels_apart": float(apart.max())}
