"""What every engine runs and what it answers: TA-SegNet as one function of slices."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from covtanet.inference.chunks import SegmentedChunk, SliceChunk
from covtanet.model.covtanet import CovTANet
from covtanet.model.quantizers import Quantizers

Flips = tuple[tuple[int, ...], ...]
# Flipped axes of slices (.., H, W): no axis, left to right, top to bottom, both.
FLIPS: Flips = ((), (-1,), (-2,), (-2, -1))
NO_FLIPS: Flips = FLIPS[:1]


class Engine(Protocol):
    """A network that is ready to run."""

    @property
    def name(self) -> str:
        """Name of library and precision, as rows of the ledger have it."""
        ...

    @property
    def device(self) -> str:
        """``cpu`` or ``cuda``."""
        ...

    @property
    def batch_slices(self) -> int:
        """Most slices of a chunk."""
        ...

    def segment(self, chunks: Iterable[SliceChunk]) -> Iterator[SegmentedChunk]:
        """Segment chunks in their order; may be called by several threads at once.

        Raises:
            FloatingPointError: the network's output is NaN or infinite.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class EngineInput:
    """A network, and how an engine is to run it."""

    network: CovTANet
    """In eval mode, on the CPU."""
    size_px: int
    """Side of the slices."""
    num_threads: int
    quantizers: Quantizers | None
    """Parameters of the network in 8 bits; null if it has none."""
    is_saved: bool
    """Whether the network belongs to a saved model, so that it is worth keeping compiled."""
    batch_slices: int | None = None
    """Slices that go to the network together; null for the engine's own number."""
    flips: Flips = NO_FLIPS
    """Views whose mean is the probability; the pooled vectors are those of the first."""

    def segmenter(self) -> "Segmenter":
        """Return the network as it is run."""
        return Segmenter(self.network).eval().requires_grad_(False)

    def content_sha256(self) -> str:
        """Return the digest of configuration, weights and quantization: 20 ms for 20 MB."""
        digest = hashlib.sha256(repr(self.network.config).encode())
        for name, tensor in self.network.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        if self.quantizers is not None:
            for value in vars(self.quantizers).values():
                digest.update(value.tobytes() if isinstance(value, np.ndarray) else value.encode())
        return digest.hexdigest()


class Segmenter(nn.Module):
    """TA-SegNet as it is exported: intensity to probability and pooled fusion vectors."""

    def __init__(self, network: CovTANet) -> None:
        super().__init__()
        self.network = network

    def forward(self, slices: Tensor) -> tuple[Tensor, Tensor]:
        """Map slices (B, C, H, W) to probability (B, H, W) and vectors (B, C, P, P)."""
        logits, pooled = self.network.segment(slices)
        # (B, 1, H, W) -> (B, H, W)
        return torch.sigmoid(logits.squeeze(1)), pooled
