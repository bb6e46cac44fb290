"""Engines that run TA-SegNet: eager PyTorch, channels last, compiled PyTorch, OpenVINO.

All give the same probability within 1e-4. Measured at the paper's widths on two CPU cores, OpenVINO
takes a third of eager PyTorch's time (``make bench``), so it is the default without a GPU.
"""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from covtanet.ct.window import INTENSITY_STEPS
from covtanet.errors import ConfigError
from covtanet.model.covtanet import CovTANet

ENGINES = ("eager", "channels_last", "compiled", "openvino")

# Intensity (B, C, H, W) to lesion probability (B, H, W) and pooled fusion vectors (B, C, P, P), all
# float32.
Segment = Callable[[NDArray[np.float32]], tuple[NDArray[np.float32], NDArray[np.float32]]]


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A network that is ready to run, and the name of its engine."""

    name: str
    device: str
    segment: Segment


class _Segmenter(nn.Module):
    """TA-SegNet as it is exported: intensity to probability and pooled fusion vectors."""

    def __init__(self, network: CovTANet) -> None:
        super().__init__()
        self.network = network

    def forward(self, slices: Tensor) -> tuple[Tensor, Tensor]:
        logits, pooled = self.network.segment(slices)
        # (B, 1, H, W) -> (B, H, W)
        return torch.sigmoid(logits.squeeze(1)), pooled


def default_engine() -> str:
    """Return the name of the fastest engine of this machine."""
    return "channels_last" if torch.cuda.is_available() else "openvino"


def build_engine(
    network: CovTANet, size_px: int, name: str = "auto", num_threads: int = 1
) -> Engine:
    """Make a network ready to run, on the GPU if there is one. network: in eval mode, on the CPU.

    Raises:
        ConfigError: the engine is unknown.
    """
    name = default_engine() if name == "auto" else name
    if name not in ENGINES:
        raise ConfigError(f"engine {name}, expected auto or one of {', '.join(ENGINES)}")
    segmenter = _Segmenter(network).eval().requires_grad_(False)
    if name == "openvino":
        return Engine(name=name, device="cpu", segment=_openvino(segmenter, size_px, num_threads))
    torch.set_num_threads(num_threads)
    torch.backends.cudnn.allow_tf32 = False  # its ten bits of mantissa exceed the tolerance
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Engine(name=name, device=device, segment=_torch(segmenter, name, device))


def _torch(segmenter: nn.Module, name: str, device: str) -> Segment:
    layout = torch.contiguous_format if name == "eager" else torch.channels_last
    module: Any = segmenter.to(device=device, memory_format=layout)  # type: ignore[call-overload]
    if name == "compiled":
        module = torch.compile(module, dynamic=False)

    def segment(slices: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        with torch.inference_mode():
            probability, pooled = module(torch.from_numpy(slices).to(device, memory_format=layout))
            return probability.float().cpu().numpy(), pooled.float().cpu().numpy()

    return segment


def _openvino(segmenter: _Segmenter, size_px: int, num_threads: int) -> Segment:
    import openvino

    logging.getLogger("openvino").setLevel(logging.ERROR)
    example = torch.zeros(1, segmenter.network.config.segnet.in_channels, size_px, size_px)
    # Converted within the process in seconds; an export to ONNX takes up to a minute.
    model = openvino.convert_model(segmenter, example_input=example)
    # Any number of slices at a fixed size, since the last chunk of a volume is smaller.
    model.reshape({0: [-1, *example.shape[1:]]})
    # f32 by name: on processors with bfloat16 the plug-in would choose that and leave the
    # tolerance.
    options = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": num_threads,
        # One request at a time, with all threads.
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.Core().compile_model(model, "CPU", options)
    # A compiled model refuses a second thread while it works for the first.
    one_at_a_time = threading.Lock()

    def segment(slices: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        with one_at_a_time:
            result = compiled(slices)
            return np.array(result[0]), np.array(result[1])

    return segment


def to_intensity(levels: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Return the network's input (B, C, H, W) in [0, 1] from stored intensity of that shape."""
    return levels.astype(np.float32) / np.float32(INTENSITY_STEPS)
