"""The regular grid of a DICOM series: which positions lie on it, and that the export agrees."""

from collections.abc import Callable
from io import BytesIO

import highdicom.spatial as spatial
import numpy as np
import pydicom
import pytest
from odd_dicom import (
    STEP_MM,
    at_depths,
    changed,
    datasets,
    move,
    pixels,
    read,
    reason_of,
    sets,
    to_bytes,
    turned,
    with_values,
)
from pydicom.dataset import FileDataset

from covtanet.ct.dicom_geometry import off_grid_limit_mm
from covtanet.report.mask_frames import frames_of


def wavering(step_mm: float, share: float, count: int = 40) -> list[float]:
    """Places that waver from side to side by a share of the slice distance."""
    return [index * step_mm + (-1) ** index * share * step_mm for index in range(count)]


SOUND_POSITIONS: dict[str, Callable[[], list[FileDataset]]] = {
    "as they are": datasets,
    "0.6 mm oblique, 1 decimal": lambda: turned((25, 35), 6, 0.6, 1),
    "0.6 mm oblique, 1 decimal, cosines of 3": lambda: turned((25, 35), 3, 0.6, 1),
    "0.66 mm, 1 decimal": lambda: at_depths(np.arange(120) * 0.66, 1),
    "3.33 mm, 1 decimal": lambda: at_depths(np.arange(120) * 3.33, 1),
    "0.625 mm, 1 decimal": lambda: at_depths(-300 + np.arange(120) * 0.625, 1),
    "0.5 mm, 1 decimal": lambda: at_depths(100 + np.arange(60) * 0.5, 1),
    "1.25 mm downwards, 1 decimal": lambda: at_depths(-np.arange(60) * 1.25, 1),
    "5 mm that waver by 0.2 mm": lambda: at_depths(wavering(5.0, 0.04)),
    "1 mm in plane, 1 decimal": lambda: changed(
        lambda index, one: move(one, 0.04 * (-1) ** index, 0.04, 0)
    ),
    "tilt of 0.3 degrees": lambda: changed(
        lambda index, one: move(one, 0, 0.0052 * STEP_MM * index, 0)
    ),
    "3 decimals at 3 degrees": lambda: turned((3, 3), 3),
    "3 decimals at 12 and 7 degrees": lambda: turned((12, -7), 3),
    "3 decimals at 30 degrees": lambda: turned((30, 20), 3),
    "4 decimals": lambda: turned((4, 9), 4),
    "6 decimals": lambda: turned((4, 9), 6),
}


@pytest.mark.parametrize("name", SOUND_POSITIONS)
def test_sound_positions_are_read_and_lie_on_the_grid_of_the_export(name: str) -> None:
    series = SOUND_POSITIONS[name]()
    volume = read(series)
    headers = [pydicom.dcmread(BytesIO(data), stop_before_pixels=True) for data in to_bytes(series)]
    mask = np.random.default_rng(0).random(volume.hu.shape) < 0.5
    # A mask travels as NIfTI, with an affine of float32.
    stored_affine = volume.source.affine.astype(np.float32).astype(np.float64)
    frames = frames_of(headers, volume.source.from_canonical(mask), stored_affine)
    assert int(frames.sum()) == int(mask.sum())
    hu = frames_of(headers, volume.source.from_canonical(volume.hu), stored_affine)
    for frame, dataset in zip(hu, series, strict=True):
        np.testing.assert_array_equal(frame, pixels(dataset).astype(int) - 1024)


def test_plain_series_keeps_its_affine_to_the_last_bit() -> None:
    series = at_depths(-211.3 + np.arange(40) * 0.7)
    depths = [float(dataset.ImagePositionPatient[2]) for dataset in series]
    expected = spatial.create_affine_matrix_from_attributes(
        image_position=series[-1].ImagePositionPatient,  # the normal points to the feet
        image_orientation=series[0].ImageOrientationPatient,
        pixel_spacing=series[0].PixelSpacing,
        spacing_between_slices=(depths[-1] - depths[0]) / (len(depths) - 1),
        index_convention="DR",
        slices_first=True,
    )
    np.testing.assert_array_equal(read(series).source.affine, expected)


def test_affine_of_rounded_positions_is_that_of_the_fitted_grid() -> None:
    volume = read(at_depths(-300 + np.arange(120) * 0.625, 1))
    assert volume.spacing_mm[0] == pytest.approx(0.625, abs=2e-4)
    np.testing.assert_allclose(volume.affine[2, 3], -300, atol=0.03)


@pytest.mark.parametrize("degrees", [(3, 3), (12, -7), (25, 35)])
def test_cosines_of_three_decimals_give_unit_vectors_at_a_right_angle(
    degrees: tuple[float, float],
) -> None:
    volume = read(turned(degrees, 3))
    np.testing.assert_allclose(volume.spacing_mm, (STEP_MM, 5.6, 5.6), atol=1e-3)
    across, down = (volume.source.affine[:3, column] / 5.6 for column in (2, 1))
    np.testing.assert_allclose((across @ across, down @ down, across @ down), (1, 1, 0), atol=1e-12)


def rounded_corner() -> list[FileDataset]:
    """A stack of 3.5 mm with its upper half 0.1 mm to the left: 1.6 degrees if it were a tilt."""
    return changed(
        lambda index, one: move(one, 0.1 * (index > 3), 0, 0), at_depths(np.arange(8) * 0.5)
    )


def test_sideways_step_within_the_limit_is_rounding_not_tilt() -> None:
    assert reason_of(rounded_corner()) == ""


@pytest.mark.parametrize(
    ("voxel_mm", "limit_mm"), [(0.2, 0.06), (0.625, 0.1), (5.0, 0.5), (18.0, 1.0)]
)
def test_off_grid_limit_is_a_tenth_between_floor_and_maximum(
    voxel_mm: float, limit_mm: float
) -> None:
    assert off_grid_limit_mm(voxel_mm) == pytest.approx(limit_mm)


def one_moved(x: float, y: float, z: float, number: int = 7) -> list[FileDataset]:
    return changed(
        lambda index, one: move(one, x, y, z) if index == number else None,
        at_depths(np.arange(40) * 5.0),
    )


DRIFT = np.cumsum([0.0, *[5.15] * 20, *[4.85] * 20])
BAD_POSITIONS: dict[str, tuple[str, Callable[[], list[FileDataset]]]] = {
    "drift of 3 mm": ("irregular_spacing", lambda: at_depths(DRIFT)),
    "drift of 3 mm downwards": ("irregular_spacing", lambda: at_depths(-DRIFT)),
    "distances that grow": (
        "irregular_spacing",
        lambda: at_depths(np.arange(40) * 5 + np.arange(40) ** 2 * 0.01),
    ),
    "a slice 1.5 mm too high": ("irregular_spacing", lambda: one_moved(0, 0, 1.5)),
    "the last slice 1.5 mm too high": ("irregular_spacing", lambda: one_moved(0, 0, 1.5, 39)),
    "a slice 3 mm to the left": ("irregular_spacing", lambda: one_moved(3, 0, 0)),
    "no distance twice": (
        "irregular_spacing",
        lambda: at_depths(np.cumsum([0, 3, 7, 4, 9, 5, 8, 3.5, 6, 10])),
    ),
    "a slice missing": ("missing_slices", lambda: at_depths(np.delete(np.arange(40) * 5.0, 7))),
    "a slice missing, 1 decimal": (
        "missing_slices",
        lambda: at_depths(np.delete(np.arange(120) * 0.625, 50), 1),
    ),
    "a gap of 200 mm": (
        "missing_slices",
        lambda: at_depths([*range(0, 100, 5), *range(300, 400, 5)]),
    ),
    "every second one missing in one half": (
        "missing_slices",
        lambda: at_depths([*np.arange(0, 20, 2.5), *np.arange(20, 120, 5.0)]),
    ),
    "two at one place": ("duplicate_slice", lambda: at_depths([*np.arange(40) * 5.0, 50.0])),
    "two at nearly one place": (
        "duplicate_slice",
        lambda: at_depths([*np.arange(40) * 5.0, 50.0004]),
    ),
    "two that are 0.02 mm apart": (
        "duplicate_slice",
        lambda: at_depths([*np.arange(40) * 5.0, 50.02]),
    ),
    "all at one place": ("duplicate_slice", lambda: at_depths([5.0] * 12)),
    "tilt of 5 degrees": (
        "gantry_tilt",
        lambda: changed(lambda index, one: move(one, 0, 0.0875 * STEP_MM * index, 0)),
    ),
    "tilt and a slice missing": (
        "gantry_tilt",
        lambda: (
            changed(lambda index, one: move(one, 0, 0.0875 * STEP_MM * index, 0))[:5]
            + changed(lambda index, one: move(one, 0, 0.0875 * STEP_MM * index, 0))[6:]
        ),
    ),
    "cosines of half the length": (
        "missing_position",
        lambda: with_values(ImageOrientationPatient=["0.5", "0", "0", "0", "0.5", "0"]),
    ),
    "cosines of nothing": (
        "missing_position",
        lambda: with_values(ImageOrientationPatient=["0"] * 6),
    ),
    "twice the same direction": (
        "missing_position",
        lambda: with_values(ImageOrientationPatient=["1", "0", "0", "1", "0", "0"]),
    ),
    "pixels of 0.05 mm": (
        "implausible_spacing",
        lambda: with_values(PixelSpacing=["0.05", "0.05"]),
    ),
    "columns of 12 mm": ("implausible_spacing", lambda: with_values(PixelSpacing=["1", "12"])),
    "micrometres": ("implausible_spacing", lambda: with_values(PixelSpacing=["700", "700"])),
    "slices 25 mm apart": ("implausible_spacing", lambda: at_depths(np.arange(12) * 25.0)),
    "slices 0.05 mm apart": ("implausible_spacing", lambda: at_depths(np.arange(40) * 0.05)),
    "slices 0.05 mm apart and one missing": (
        "implausible_spacing",
        lambda: at_depths(np.delete(np.arange(60) * 0.02, 9)),
    ),
}


@pytest.mark.parametrize("name", BAD_POSITIONS)
def test_positions_off_a_grid_are_refused_for_their_reason(name: str) -> None:
    reason, build = BAD_POSITIONS[name]
    assert reason_of(build()) == reason


@pytest.mark.parametrize(("low_mm", "high_mm"), [(0.1, 20.0), (0.12, 19.9)])
def test_voxel_sizes_at_their_limits_are_read(low_mm: float, high_mm: float) -> None:
    assert (
        reason_of(
            changed(sets(PixelSpacing=[f"{low_mm}", "10"]), at_depths(np.arange(12) * high_mm))
        )
        == ""
    )
