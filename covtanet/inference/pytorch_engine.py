"""Engines of PyTorch: eager, channels last, and compiled; on the GPU if there is one."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from covtanet.inference.float_engine import FloatEngine, RunSlices
from covtanet.inference.segmenter import EngineInput, Segmenter

NAMES = ("eager", "channels_last", "compiled")


def build(name: str, source: EngineInput) -> FloatEngine:
    """Make a network ready to run."""
    torch.set_num_threads(source.num_threads)
    torch.backends.cudnn.allow_tf32 = False  # its ten bits of mantissa exceed the tolerance
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return FloatEngine.of(name, device, _run(source.segmenter(), name, device), source)


def _run(segmenter: Segmenter, name: str, device: str) -> RunSlices:
    layout = torch.contiguous_format if name == "eager" else torch.channels_last
    module: Any = segmenter.to(device=device, memory_format=layout)  # type: ignore[call-overload]
    if name == "compiled":
        module = torch.compile(module, dynamic=False)

    def run(slices: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        with torch.inference_mode():
            probability, pooled = module(torch.from_numpy(slices).to(device, memory_format=layout))
            return probability.float().cpu().numpy(), pooled.float().cpu().numpy()

    return run
