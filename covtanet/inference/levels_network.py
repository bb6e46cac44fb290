"""TA-SegNet from stored levels to lesion levels in 16-bit numbers, as one function on a device."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from covtanet.ct.window import INTENSITY_STEPS
from covtanet.inference.quantization import PROBABILITY_STEPS
from covtanet.inference.segmenter import Flips
from covtanet.model.covtanet import CovTANet

# Layers that multiply; all others stay in float32, as autocast has it.
MULTIPLYING = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


class Answer(NamedTuple):
    """The network's output for a batch, on the device."""

    levels: Tensor
    """Lesion probability in steps of 1/254, (B, H, W) uint8."""
    is_finite: Tensor
    """Whether all of a slice's probabilities are numbers, (B,) bool."""
    pooled: Tensor
    """Pooled fusion vectors, (B, C, P, P) in the precision of the products."""


class LevelsNetwork(nn.Module):
    """Scaling, TA-SegNet under autocast, flips, the check for NaN and rounding to levels."""

    def __init__(self, network: CovTANet, dtype: torch.dtype, flips: Flips) -> None:
        """Take over a network on its device: its kernels are rounded to ``dtype`` in place.

        dtype: of the products, bfloat16 or float16.
        """
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.dtype = dtype
        self.flips = flips
        for layer in self.network.segnet.modules():
            if isinstance(layer, MULTIPLYING):
                # Once here: autocast would round them again in every batch, to the same numbers.
                layer.to(dtype)

    def forward(self, stored: Tensor) -> Answer:
        """Map the 16 bits of stored intensity, (B, C, H, W) int16, to levels and vectors."""
        # int16 with the bits of uint16, for which torch has few kernels.
        slices = (stored.int() & 0xFFFF).float() / INTENSITY_STEPS
        slices = slices.contiguous(memory_format=torch.channels_last)
        probability, pooled = self._run(slices)
        for axes in self.flips[1:]:
            flipped, _ = self._run(slices.flip(axes))
            # Flipped back, so that the maps lie upon each other.
            probability = probability + flipped.flip(axes)
        probability = probability / len(self.flips)
        # Checked before rounding: a cast of NaN to uint8 gives an arbitrary number.
        is_finite = probability.isfinite().flatten(1).all(1)
        # To the nearest, of two the even one, as numpy's rint.
        levels = (probability * PROBABILITY_STEPS).round().to(torch.uint8)
        return Answer(levels, is_finite, pooled)

    def _run(self, slices: Tensor) -> tuple[Tensor, Tensor]:
        """Map intensity (B, C, H, W) to probability (B, H, W), float32, and pooled vectors."""
        # No cache of rounded kernels: they are rounded, and a CUDA graph could not keep it.
        with torch.autocast(slices.device.type, self.dtype, cache_enabled=False):
            logits, pooled = self.network.segment(slices)
        # In float32: bfloat16 has steps of 1/256 between 0.5 and 1, as wide as those of the levels.
        return torch.sigmoid(logits.squeeze(1).float()), pooled
