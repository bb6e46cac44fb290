"""Slices thinner than the step between segmented ones: these stand for the slices nearest to them.

The chest is drawn by hand, so that every expected number can be worked out: two lungs of 40 x 30
pixels of 3 x 3 mm in the slices 10 to 73 of 84. With slices of 1 mm every third is segmented, from
11 to 71: 21 slices. Each stands for itself and its two neighbours, but the last for the four slices
70 to 73.
"""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from stage_rows import manifest_rows

from covtanet.ct import nifti
from covtanet.ct.volume import SourceGrid
from covtanet.ct.window import WindowConfig
from covtanet.inference.predictor import Prediction
from covtanet.screening import stages
from covtanet.screening.config import ScreeningConfig
from covtanet.screening.records import MeasuredSeries, PreparedSeries

SIZE_PX, PIXEL_MM, NUM_SLICES = 128, 3.0, 84
FIRST_LUNG, LAST_LUNG = 10, 73
CONFIG = ScreeningConfig(engine="eager", slice_step_mm=2.5)
# As many pixels as the slices have, so that the network's pixels are the volume's.
WINDOW = WindowConfig(size_px=SIZE_PX)
# 10 x 10 pixels of 9 mm2 within the left lung.
LESION = np.s_[60:70, 30:40]
LESION_MM2 = 900.0
LUNG_MM2 = 2 * 40 * 30 * 9.0
SEGMENTED = list(range(11, 72, 3))


class Marks:
    """A stub that marks the lesion's square in some segmented slices, whatever it is shown."""

    def __init__(self, marked: set[int]) -> None:
        self.marked = marked

    def predict(self, slices: NDArray[np.uint16]) -> Prediction:
        levels = np.zeros(slices.shape, np.uint8)
        for index in self.marked:
            levels[index][LESION] = 254
        return Prediction(lesion_levels=levels, p_infected=0.9, p_severe=0.1)


def chest() -> NDArray[np.int16]:
    """A body of water with two lungs in air, (z, y, x)."""
    hu = np.full((NUM_SLICES, SIZE_PX, SIZE_PX), -1000, np.int16)
    hu[:, 30:100, 15:113] = 40
    for left in (25, 73):
        hu[FIRST_LUNG : LAST_LUNG + 1, 45:85, left : left + 30] = -850
    hu += np.random.default_rng(0).integers(-9, 10, hu.shape, np.int16)
    return hu


def prepared(folder: Path, slice_mm: float) -> PreparedSeries:
    """The chest with slices of a thickness, listed and decoded."""
    affine = np.diag([-PIXEL_MM, -PIXEL_MM, slice_mm, 1.0])
    grid = SourceGrid(shape=(SIZE_PX, SIZE_PX, NUM_SLICES), affine=affine)
    (folder / "chest.nii.gz").write_bytes(nifti.write(chest(), grid))
    (row,) = manifest_rows(folder)
    decoder = stages.in_process(WINDOW, CONFIG)
    return stages.prepare_series(
        row,
        archive=str(folder),
        window=WINDOW,
        config=CONFIG,
        decoder=decoder,
    )


def measured(row: PreparedSeries, marked: set[int]) -> MeasuredSeries:
    """A prepared chest with a lesion in some of its segmented slices."""
    return stages.measure_series(stages.predict_series(row, Marks(marked)), WINDOW, CONFIG)


@pytest.fixture(scope="module")
def chest_of_1_mm(tmp_path_factory: pytest.TempPathFactory) -> PreparedSeries:
    return prepared(tmp_path_factory.mktemp("chest"), 1.0)


def lesion_slices_of(found: MeasuredSeries) -> list[int]:
    assert found.involvement is not None
    return np.flatnonzero(found.involvement.lesion_mask.any(axis=(1, 2))).tolist()


@pytest.mark.parametrize(
    ("marked", "slices"),
    [
        ({0}, [10, 11, 12]),
        ({5}, [25, 26, 27]),
        ({20}, [70, 71, 72, 73]),
        ({5, 6}, [25, 26, 27, 28, 29, 30]),
        (set(range(21)), list(range(10, 74))),
    ],
)
def test_lesion_of_a_segmented_slice_fills_the_slices_nearest_to_it(
    marked: set[int],
    slices: list[int],
    chest_of_1_mm: PreparedSeries,
) -> None:
    found = measured(chest_of_1_mm, marked)
    record = found.record
    assert (record.status, record.num_slices, record.num_slices_segmented) == (
        "screened",
        84,
        21,
    )
    assert record.lesion_slices == len(marked)
    assert lesion_slices_of(found) == slices
    lesion_ml = len(slices) * LESION_MM2 / 1000
    assert record.lesion_volume_ml == pytest.approx(lesion_ml)
    # The lungs' outline may differ by some pixels from the drawn one; the lesion lies within it.
    assert record.lung_volume_ml == pytest.approx(64 * LUNG_MM2 / 1000, rel=0.05)
    assert record.lung_volume_ml is not None
    assert record.involvement == pytest.approx(lesion_ml / record.lung_volume_ml)


def test_segmented_slices_lie_at_least_the_step_apart(chest_of_1_mm: PreparedSeries) -> None:
    """Marked one by one, the slices at 11, 14, ... 71 stand for every slice of the lungs once."""
    assert chest_of_1_mm.chosen.tolist() == SEGMENTED
    extents = [lesion_slices_of(measured(chest_of_1_mm, {index})) for index in range(21)]
    assert [z for extent in extents for z in extent] == list(range(FIRST_LUNG, LAST_LUNG + 1))
    assert all(z in extent for z, extent in zip(SEGMENTED, extents, strict=True))


@pytest.mark.parametrize(
    ("slice_mm", "num_segmented", "marked", "slices"),
    [
        (0.5, 13, 4, [30, 31, 32, 33, 34]),  # every fifth slice from 12: 12, 17, 22, 27, 32
        (
            1.25,
            32,
            4,
            [19, 20],
        ),  # every second from 11; of two that are as near, the lower one counts
        (2.5, 64, 4, [14]),
        (5.0, 64, 4, [14]),
    ],
)
def test_lesion_volume_follows_the_extent_of_a_segmented_slice(
    slice_mm: float,
    num_segmented: int,
    marked: int,
    slices: list[int],
    tmp_path: Path,
) -> None:
    found = measured(prepared(tmp_path, slice_mm), {marked})
    assert found.record.num_slices_segmented == num_segmented
    assert lesion_slices_of(found) == slices
    assert found.record.lesion_volume_ml == pytest.approx(
        len(slices) * slice_mm * LESION_MM2 / 1000,
    )
