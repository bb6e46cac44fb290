"""Slices of volumes on their way through the network, some at a time.

Memory does not grow with the volume, and slices of several volumes may share a batch.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class SliceChunk(NamedTuple):
    """Some slices of a volume, so that memory does not grow with the volume."""

    slices: NDArray[np.uint16]
    """Stored intensity, (S, C, size, size); the channels are neighbours in z."""
    diagnosed: list[int]
    """Indices of the slices in this chunk that the diagnosis reads."""


class SegmentedChunk(NamedTuple):
    """The network's output for a chunk of slices."""

    lesion_levels: NDArray[np.uint8]
    """Lesion probability in steps of 1/254, (S, H, W)."""
    pooled: NDArray[np.float32]
    """Pooled fusion vectors of the slices that the diagnosis reads, (D, C, P, P)."""
    engine: str = ""
    """Name of the engine that answered; replicas on different processors may have different
    ones."""


def join(chunks: Sequence[SliceChunk], batch_slices: int) -> list[SliceChunk]:
    """Return the slices of all chunks in batches of ``batch_slices``, the last one smaller."""
    # (S of all chunks, C, size, size)
    slices = np.concatenate([chunk.slices for chunk in chunks])
    is_diagnosed = np.concatenate([_is_diagnosed(chunk) for chunk in chunks])
    return [
        SliceChunk(
            slices[start : start + batch_slices],
            np.flatnonzero(is_diagnosed[start : start + batch_slices]).tolist(),
        )
        for start in range(0, len(slices), batch_slices)
    ]


def split(
    answers: Sequence[SegmentedChunk], chunks: Sequence[SliceChunk]
) -> Iterator[SegmentedChunk]:
    """Return the answers to the batches of ``join`` chunk by chunk."""
    levels, pooled, engines = zip(*answers, strict=True)
    all_levels, all_pooled = np.concatenate(levels), np.concatenate(pooled)
    # A chunk's own answers begin at these slices and vectors.
    first_slice = first_vector = 0
    for chunk in chunks:
        # Vectors come in the order of slices, once each.
        ordered = np.unique(chunk.diagnosed)
        rows = first_vector + np.searchsorted(ordered, chunk.diagnosed)
        end = first_slice + len(chunk.slices)
        yield SegmentedChunk(
            all_levels[first_slice:end], all_pooled[rows.astype(np.intp)], engines[0]
        )
        first_slice = end
        first_vector += len(ordered)


def _is_diagnosed(chunk: SliceChunk) -> NDArray[np.bool_]:
    is_diagnosed = np.zeros(len(chunk.slices), bool)
    is_diagnosed[chunk.diagnosed] = True
    return is_diagnosed
