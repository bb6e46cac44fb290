"""Engines that map float32 intensity to float32 probability: stored levels in, lesion levels out.

The functions of ``pytorch_engine`` and ``openvino_engine`` know neither steps nor flips; both are
added here, on the CPU.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from covtanet.ct.window import INTENSITY_STEPS
from covtanet.inference.chunks import SegmentedChunk, SliceChunk
from covtanet.inference.quantization import PROBABILITY_STEPS
from covtanet.inference.segmenter import EngineInput, Flips

# Intensity (B, C, H, W) to lesion probability (B, H, W) and pooled fusion vectors (B, C, P, P), all
# float32.
RunSlices = Callable[[NDArray[np.float32]], tuple[NDArray[np.float32], NDArray[np.float32]]]
# More slices at a time need more memory and are not faster on CPUs.
BATCH_SLICES = 16


@dataclass(frozen=True, kw_only=True)
class FloatEngine:
    """A network that is ready to run in float32 at its ends; see ``segmenter.Engine``."""

    name: str
    device: str
    run: RunSlices
    batch_slices: int
    flips: Flips

    @classmethod
    def of(cls, name: str, device: str, run: RunSlices, source: EngineInput) -> "FloatEngine":
        """Return the engine that runs the network by a function."""
        return cls(
            name=name,
            device=device,
            run=run,
            batch_slices=source.batch_slices or BATCH_SLICES,
            flips=source.flips,
        )

    def segment(self, chunks: Iterable[SliceChunk]) -> Iterator[SegmentedChunk]:
        """Segment chunks one by one.

        Raises:
            FloatingPointError: the network's output is NaN or infinite.
        """
        for slices, diagnosed in chunks:
            probability, pooled = self._run_flips(to_intensity(slices))
            # Checked before rounding: a cast of NaN to uint8 gives an arbitrary number.
            if not np.isfinite(probability).all():
                raise FloatingPointError("the network's output is NaN or infinite")
            levels = np.rint(probability * PROBABILITY_STEPS).astype(np.uint8)
            yield SegmentedChunk(levels, pooled[diagnosed], self.name)

    def _run_flips(
        self, intensity: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the mean probability over the flips, and the pooled vectors of the first."""
        probability, pooled = self.run(intensity)
        for axes in self.flips[1:]:
            flipped, _ = self.run(np.ascontiguousarray(np.flip(intensity, axes)))
            # Flipped back, so that the maps lie upon each other.
            probability = probability + np.flip(flipped, axes)
        return probability / np.float32(len(self.flips)), pooled


def to_intensity(levels: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Return the network's input (B, C, H, W) in [0, 1] from stored intensity of that shape."""
    return levels.astype(np.float32) / np.float32(INTENSITY_STEPS)
