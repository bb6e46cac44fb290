"""The choice of the engine that runs TA-SegNet.

Float32 engines give the same probability within 1e-4: eager PyTorch, channels last, compiled, and
OpenVINO, which takes a third of eager PyTorch's time on two CPU cores at the paper's widths
(``make bench``). Engines below float32, on CPUs and on GPUs, change the answer. ``auto`` takes one
only if its difference was measured for this model (``covtanet calibrate``) and is within the bounds
of ``EngineDifference``; else it is as if it did not exist.
"""

import logging
from collections.abc import Mapping, Sequence

import torch

from covtanet.errors import ConfigError, EngineUnavailableError
from covtanet.inference import device_engine, openvino_engine, pytorch_engine
from covtanet.inference.segmenter import FLIPS, NO_FLIPS, Engine, EngineInput
from covtanet.model.covtanet import CovTANet
from covtanet.model.description import EngineDifference
from covtanet.model.quantizers import Quantizers

logger = logging.getLogger(__name__)

ENGINES = (*pytorch_engine.NAMES, *openvino_engine.NAMES, *device_engine.NAMES)
# Fastest first. CPU time per slice of the shipped V8 at 256 px on two cores with avx512_vnni and
# avx512_bf16: 8 bits 0.52 and bfloat16 0.69 of float32's (benchmarks/engines_2cpu_202611.md).
BELOW_FLOAT32 = (openvino_engine.INT8, openvino_engine.BFLOAT16)
# A GPU gives one of them: on an H100 bfloat16 was 2.4 times as fast as float32 (benchmarks/gpu.md).
BELOW_FLOAT32_ON_GPU = device_engine.NAMES
FLOAT32_ON_GPU = "channels_last"


def default_engine() -> str:
    """Return the name of the fastest engine in float32 on this machine."""
    return FLOAT32_ON_GPU if torch.cuda.is_available() else openvino_engine.FLOAT32


def choose_engines(differences: Mapping[str, EngineDifference]) -> list[str]:
    """Return the engines that ``auto`` tries, fastest first; the last one is float32.

    differences: of the model's engines, as they were measured.
    """
    return [*within_bounds(below_float32(), differences), default_engine()]


def within_bounds(names: Sequence[str], differences: Mapping[str, EngineDifference]) -> list[str]:
    """Return the engines that were measured for a model and may replace float32 unasked."""
    return [name for name in names if name in differences and differences[name].is_within_bounds]


def below_float32() -> list[str]:
    """Return the engines below float32 of this machine, fastest first; those of its GPU if any."""
    if torch.cuda.is_available():
        return [name for name in BELOW_FLOAT32_ON_GPU if not device_engine.missing_device(name)]
    return [name for name in BELOW_FLOAT32 if not openvino_engine.missing_instructions(name)]


def missing_on_this_machine(name: str) -> str:
    """Return what an engine lacks on this machine; empty if nothing."""
    if name in device_engine.NAMES:
        return device_engine.missing_device(name)
    return openvino_engine.missing_instructions(name)


def build_engine(
    network: CovTANet,
    size_px: int,
    name: str = "auto",
    num_threads: int = 1,
    *,
    differences: Mapping[str, EngineDifference] | None = None,
    quantizers: Quantizers | None = None,
    is_saved: bool = False,
    batch_slices: int | None = None,
    flips: bool = False,
) -> Engine:
    """Make a network ready to run, on the GPU if there is one. network: in eval mode, on the CPU.

    differences, quantizers: of the model that the network belongs to. is_saved: keep it compiled.
    batch_slices: null for the engine's own number. flips: mean of four flips of every slice.

    Raises:
        ConfigError: the engine is unknown, or the model or the processor cannot give it.
    """
    source = EngineInput(
        network=network,
        size_px=size_px,
        num_threads=num_threads,
        quantizers=quantizers,
        is_saved=is_saved,
        batch_slices=batch_slices,
        flips=FLIPS if flips else NO_FLIPS,
    )
    if name != "auto":
        return _build(name, source)
    *candidates, float32 = choose_engines(differences or {})
    for candidate in candidates:
        try:
            return _build(candidate, source)
        except EngineUnavailableError as error:
            logger.warning("engine %s is left out: %s", candidate, error)
    return _build(float32, source)


def _build(name: str, source: EngineInput) -> Engine:
    if name in openvino_engine.NAMES:
        return openvino_engine.build(name, source)
    if name in pytorch_engine.NAMES:
        return pytorch_engine.build(name, source)
    if name in device_engine.NAMES:
        return device_engine.build(name, source)
    raise ConfigError(f"engine {name}, expected auto or one of {', '.join(ENGINES)}")
