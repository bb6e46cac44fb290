"""Chunks of several volumes that share batches, and their answers."""

import numpy as np
import pytest
from saved_models import small_model

from covtanet.inference.chunks import SegmentedChunk, SliceChunk, join, split
from covtanet.inference.predictor import Predictor


def chunk(first: int, count: int, diagnosed: list[int]) -> SliceChunk:
    """Slices of one pixel that hold their number."""
    values = np.arange(first, first + count, dtype=np.uint16)
    return SliceChunk(values[:, None, None, None], diagnosed)


def answer(batch: SliceChunk) -> SegmentedChunk:
    """Return the slices as levels, and as vectors those that are asked for."""
    vectors = batch.slices[batch.diagnosed].astype(np.float32)
    return SegmentedChunk(batch.slices[:, 0].astype(np.uint8), vectors, "echo")


@pytest.mark.parametrize("batch_slices", [1, 2, 3, 4, 16])
def test_answers_return_to_their_chunks_whatever_the_batch(batch_slices: int) -> None:
    chunks = [chunk(0, 3, [0, 2]), chunk(3, 4, []), chunk(7, 2, [1, 0, 1])]
    batches = join(chunks, batch_slices)
    assert [len(batch.slices) for batch in batches[:-1]] == [batch_slices] * (len(batches) - 1)
    answers = list(split([answer(batch) for batch in batches], chunks))
    assert [found.lesion_levels.ravel().tolist() for found in answers] == [
        [0, 1, 2], [3, 4, 5, 6], [7, 8],
    ]  # fmt: skip
    assert [found.pooled.ravel().tolist() for found in answers] == [[0, 2], [], [8, 7, 8]]
    assert {found.engine for found in answers} == {"echo"}


def test_batches_ask_for_the_diagnosed_vectors_alone() -> None:
    batches = join([chunk(0, 3, [2]), chunk(3, 3, [0])], 4)
    assert [batch.diagnosed for batch in batches] == [[2, 3], []]


def test_segment_together_equals_segment_one_by_one() -> None:
    predictor = Predictor(small_model(), engine="eager", max_batch_slices=2)
    rng = np.random.default_rng(0)
    volumes = [rng.integers(0, 65536, (n, 1, 128, 128)).astype(np.uint16) for n in (1, 2, 2)]
    chunks = [SliceChunk(volume, [len(volume) - 1]) for volume in volumes]
    together = list(predictor.segment_together(chunks))
    for found, expected in zip(together, predictor.segment(chunks), strict=True):
        np.testing.assert_array_equal(found.lesion_levels, expected.lesion_levels)
        np.testing.assert_allclose(found.pooled, expected.pooled, atol=1e-5)
