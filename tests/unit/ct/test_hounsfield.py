"""Stored values to HU in 16 bits, against the plain formula."""

import numpy as np
import pytest
from numpy.typing import DTypeLike

from covtanet.ct.hounsfield import rescale

STORED: dict[DTypeLike, tuple[int, ...]] = {
    np.uint8: (0, 1, 128, 255),
    np.int8: (-128, -1, 0, 127),
    np.uint16: (0, 1, 4095, 32767, 32768, 65535),
    np.int16: (-32768, -2000, 0, 32767),
    ">i2": (-32768, -2000, 0, 32767),
    ">u2": (0, 255, 256, 32768),
    np.int32: (-70000, -1, 0, 70000),
    np.uint32: (0, 65536, 4_000_000_000),
}


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("slope", [1.0, 2.0, -1.0, 10.0, 70000.0])
@pytest.mark.parametrize("intercept", [0.0, -1024.0, -32768.0, -70000.0, 40000.0])
def test_whole_hu_equal_the_formula_and_are_int16_if_they_fit(
    dtype: DTypeLike, slope: float, intercept: float
) -> None:
    for value in STORED[dtype]:
        expected = value * int(slope) + int(intercept)
        hu = rescale(np.full((1, 2), value, dtype), slope, intercept)
        fits = -32768 <= expected <= 32767
        assert hu.dtype == (np.int16 if fits else np.float32)
        if fits:
            assert hu.tolist() == [[expected, expected]]
