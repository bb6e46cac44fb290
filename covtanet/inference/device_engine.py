"""Engines below float32 on a GPU: batches of one shape, copied while others are computed.

``cuda-bf16``  products in bfloat16
``cuda-fp16``  products in float16, on GPUs without bfloat16

Stored levels (uint16) go to the device and lesion levels (uint8) come back, with the vectors of
those slices alone that the diagnosis reads. Every batch is filled up to the same shape: its kernels
are recorded once as a CUDA graph, and the answer for a slice does not depend on how full its batch
is. ``DeviceEngine`` runs on a CPU too, without streams and graphs, which tests do; by name both
engines need a GPU.
"""

import copy
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from covtanet.errors import EngineUnavailableError
from covtanet.inference.chunks import SegmentedChunk, SliceChunk
from covtanet.inference.device_streams import Streams, capture
from covtanet.inference.levels_network import Answer, LevelsNetwork
from covtanet.inference.segmenter import NO_FLIPS, EngineInput, Flips
from covtanet.model.covtanet import CovTANet

logger = logging.getLogger(__name__)

BFLOAT16, FLOAT16 = "cuda-bf16", "cuda-fp16"
NAMES = (BFLOAT16, FLOAT16)
PRECISIONS = {BFLOAT16: torch.bfloat16, FLOAT16: torch.float16}
# Choice: many small layers of one slice leave a GPU idle. Not tuned.
BATCH_SLICES = 64
# PyTorch counts the values that it averages into vectors in 32 bits on a GPU, and ends with an
# internal error beyond: 51 slices of V7 at the paper's widths (benchmarks/gpu.md).
MOST_FUSED_VALUES = 2**31 - 1
# Batches that are under way before the first of them is waited for: one is computed while the next
# one is copied.
BATCHES_UNDER_WAY = 2


def missing_device(name: str) -> str:
    """Return what an engine lacks on this machine; empty if nothing."""
    if not torch.cuda.is_available():
        return "no GPU"
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if name == BFLOAT16 and not has_bfloat16:
        return "the GPU has no bfloat16 instructions"
    if name == FLOAT16 and has_bfloat16:
        return f"the GPU has bfloat16, whose range is wider: {BFLOAT16}"
    return ""


def build(name: str, source: EngineInput) -> "DeviceEngine":
    """Make a network ready to run.

    Raises:
        EngineUnavailableError: no GPU, or it has no such instructions.
    """
    missing = missing_device(name)
    if missing:
        raise EngineUnavailableError(f"engine {name}: {missing}")
    return DeviceEngine(
        # The diagnosis runs there too, in float32.
        source.network.to("cuda"),
        name=name,
        shape=(source.network.config.segnet.in_channels, source.size_px, source.size_px),
        batch_slices=source.batch_slices or BATCH_SLICES,
        flips=source.flips,
    )


def most_slices(fused_channels: int, shape: tuple[int, int, int]) -> int:
    """Return the number of slices whose fused maps PyTorch can average.

    shape: of a slice; the maps are taken to be as large, as V7's are.
    """
    return max(1, MOST_FUSED_VALUES // (fused_channels * shape[1] * shape[2]))


class _Started(NamedTuple):
    """A batch under way; its tensors lie on the host and are filled when ``wait`` returns."""

    num_slices: int
    levels: Tensor
    is_finite: Tensor
    pooled: Tensor
    wait: Callable[[], None]


class DeviceEngine:
    """A network in 16-bit numbers that is ready to run on one device; see ``segmenter.Engine``."""

    def __init__(
        self,
        network: CovTANet,
        *,
        name: str,
        shape: tuple[int, int, int],
        batch_slices: int = BATCH_SLICES,
        flips: Flips = NO_FLIPS,
        has_graph: bool = True,
        is_compiled: bool = False,
    ) -> None:
        """Copy a network on its device and run it once.

        shape: of a slice, (C, size, size). has_graph: record the kernels as a CUDA graph.
        is_compiled: by ``torch.compile``, which takes a minute; for comparison.
        """
        self.name = name
        self.torch_device = next(network.parameters()).device
        self.device = self.torch_device.type
        # A copy: other engines of the same model stay in float32.
        self.plain = LevelsNetwork(copy.deepcopy(network), PRECISIONS[name], flips)
        self.run: Callable[[Tensor], Answer] = self.plain
        if is_compiled:
            self.run = torch.compile(self.plain, dynamic=False)
        channels = network.config.segnet.fused_channels
        self.batch_slices = self._largest_batch(
            shape, min(batch_slices, most_slices(channels, shape))
        )
        # After the weights were rounded: the streams wait for that once, here.
        self.streams = Streams(self.torch_device)
        self._lock = threading.Lock()
        self.has_graph = False
        if has_graph and self.device == "cuda":
            example = torch.zeros((self.batch_slices, *shape), dtype=torch.int16)
            single = self.run
            self.run = capture(single, example.to(self.torch_device), self.streams)
            self.has_graph = self.run is not single

    def _largest_batch(self, shape: tuple[int, int, int], batch_slices: int) -> int:
        """Run an empty batch; return its size, halved until it fits the device's memory."""
        while True:
            try:
                with torch.inference_mode():
                    stored = torch.zeros((batch_slices, *shape), dtype=torch.int16)
                    self.run(stored.to(self.torch_device))
                return batch_slices
            except torch.OutOfMemoryError:
                if batch_slices == 1:
                    raise
            batch_slices //= 2
            torch.cuda.empty_cache()
            logger.warning("the GPU's memory is too small, batches of %d slices", batch_slices)

    def segment(self, chunks: Iterable[SliceChunk]) -> Iterator[SegmentedChunk]:
        """Segment chunks of at most ``batch_slices``; one is copied while another is computed.

        Raises:
            FloatingPointError: the network's output is NaN or infinite.
            ValueError: a chunk is larger than a batch.
        """
        under_way = deque[_Started]()
        for chunk in chunks:
            under_way.append(self._start(chunk))
            if len(under_way) == BATCHES_UNDER_WAY:
                yield self._finish(under_way.popleft())
        while under_way:
            yield self._finish(under_way.popleft())

    def _start(self, chunk: SliceChunk) -> _Started:
        """Begin to copy and compute a batch; the host goes on meanwhile."""
        stored = self._filled_up(chunk)
        diagnosed = self._on_host(torch.tensor(chunk.diagnosed, dtype=torch.int64))
        # One caller at a time: a graph has one input and one output. Not held during a wait.
        with self._lock, torch.inference_mode():
            stored, diagnosed = self.streams.load(stored, diagnosed)
            with self.streams.computing():
                answer = self.run(stored)
                # Only these are copied back.
                vectors = answer.pooled.index_select(0, diagnosed).float()
                levels, is_finite = self.streams.own(answer.levels, answer.is_finite)
            (levels, is_finite, vectors), wait = self.streams.store(levels, is_finite, vectors)
        return _Started(len(chunk.slices), levels, is_finite, vectors, wait)

    def _filled_up(self, chunk: SliceChunk) -> Tensor:
        """Return a chunk's slices and zeros up to the size of a batch, int16, page-locked."""
        num_slices = len(chunk.slices)
        if num_slices > self.batch_slices:
            raise ValueError(f"{num_slices} slices, expected at most {self.batch_slices}")
        shape = (self.batch_slices, *chunk.slices.shape[1:])
        is_cuda = self.device == "cuda"
        stored = torch.empty(shape, dtype=torch.int16, pin_memory=is_cuda)
        # The same 16 bits.
        bits = np.ascontiguousarray(chunk.slices, np.uint16).view(np.int16)
        stored[:num_slices] = torch.from_numpy(bits)
        stored[num_slices:] = 0
        return stored

    def _on_host(self, tensor: Tensor) -> Tensor:
        is_copied = self.device == "cuda" and tensor.numel() > 0
        return tensor.pin_memory() if is_copied else tensor

    def _finish(self, started: _Started) -> SegmentedChunk:
        """Wait for a batch and drop what it was filled up with."""
        started.wait()
        if not bool(started.is_finite[: started.num_slices].all()):
            raise FloatingPointError("the network's output is NaN or infinite")
        levels = started.levels[: started.num_slices].numpy()
        return SegmentedChunk(levels, started.pooled.numpy(), self.name)
