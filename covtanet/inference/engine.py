"""The choice of the engine that runs TA-SegNet.

Float32 engines give the same probability within 1e-4: eager PyTorch, channels last, compiled, and
OpenVINO, which takes a third of eager PyTorch's time on two CPU cores at the paper's widths
(``make bench``). Engines below float32 change the answer. ``auto`` takes one only if its difference
was measured for this model (``covtanet calibrate``) and is within the bounds of
``EngineDifference``; else it is as if it did not exist.
"""

import logging
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from covtanet.ct.window import INTENSITY_STEPS
from covtanet.errors import ConfigError, EngineUnavailableError
from covtanet.inference import openvino_engine, pytorch_engine
from covtanet.inference.segmenter import Engine, EngineInput
from covtanet.model.covtanet import CovTANet
from covtanet.model.description import EngineDifference
from covtanet.model.quantizers import Quantizers

logger = logging.getLogger(__name__)

ENGINES = (*pytorch_engine.NAMES, *openvino_engine.NAMES)
# Fastest first. CPU time per slice of the shipped V8 at 256 px on two cores with avx512_vnni and
# avx512_bf16: 8 bits 0.52 and bfloat16 0.69 of float32's (benchmarks/engines_2cpu_202611.md).
BELOW_FLOAT32 = (openvino_engine.INT8, openvino_engine.BFLOAT16)


def default_engine() -> str:
    """Return the name of the fastest engine in float32 on this machine."""
    return "channels_last" if torch.cuda.is_available() else openvino_engine.FLOAT32


def choose_engines(differences: Mapping[str, EngineDifference]) -> list[str]:
    """Return the engines that ``auto`` tries, fastest first; the last one is float32.

    differences: of the model's engines, as they were measured.
    """
    if torch.cuda.is_available():
        return [default_engine()]
    allowed = [
        name
        for name in BELOW_FLOAT32
        if name in differences
        and differences[name].is_within_bounds
        and not openvino_engine.missing_instructions(name)
    ]
    return [*allowed, default_engine()]


def build_engine(
    network: CovTANet,
    size_px: int,
    name: str = "auto",
    num_threads: int = 1,
    *,
    differences: Mapping[str, EngineDifference] | None = None,
    quantizers: Quantizers | None = None,
    is_saved: bool = False,
) -> Engine:
    """Make a network ready to run, on the GPU if there is one. network: in eval mode, on the CPU.

    differences, quantizers: of the model that the network belongs to. is_saved: keep it compiled.

    Raises:
        ConfigError: the engine is unknown, or the model or the processor cannot give it.
    """
    source = EngineInput(
        network=network,
        size_px=size_px,
        num_threads=num_threads,
        quantizers=quantizers,
        is_saved=is_saved,
    )
    if name != "auto":
        return _build(name, source)
    *below_float32, float32 = choose_engines(differences or {})
    for candidate in below_float32:
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
    raise ConfigError(f"engine {name}, expected auto or one of {', '.join(ENGINES)}")


def to_intensity(levels: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Return the network's input (B, C, H, W) in [0, 1] from stored intensity of that shape."""
    return levels.astype(np.float32) / np.float32(INTENSITY_STEPS)
