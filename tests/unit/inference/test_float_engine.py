"""Engines that map float32 to float32, between stored levels and lesion levels."""

import numpy as np
import pytest
from numpy.typing import NDArray

from covtanet.inference.chunks import SliceChunk
from covtanet.inference.float_engine import FloatEngine
from covtanet.inference.segmenter import FLIPS, NO_FLIPS, Flips


def engine(value: float, flips: Flips = NO_FLIPS) -> FloatEngine:
    """An engine whose network answers one value for the first pixel and 0 for the others."""

    def run(slices: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        probability = np.zeros((len(slices), *slices.shape[2:]), np.float32)
        probability[:, 0, 0] = value
        return probability, np.zeros((len(slices), 1, 1, 1), np.float32)

    return FloatEngine(name="f", device="cpu", run=run, batch_slices=4, flips=flips)


CHUNK = SliceChunk(np.zeros((2, 1, 4, 4), np.uint16), [0])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_or_infinite_probability_is_refused(value: float) -> None:
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        list(engine(value).segment([CHUNK]))


def test_levels_are_steps_of_the_probability() -> None:
    (answer,) = engine(0.5).segment([CHUNK])
    assert answer.lesion_levels[:, 0, 0].tolist() == [127, 127]
    assert answer.lesion_levels.sum() == 2 * 127


def test_flips_are_turned_back_before_their_mean() -> None:
    (answer,) = engine(1.0, FLIPS).segment([CHUNK])
    # Each flip marks another corner, with a quarter of the weight.
    corners = answer.lesion_levels[0][[0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.tolist() == [64, 64, 64, 64]
