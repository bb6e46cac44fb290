"""The choice of slices for key images, by masks alone."""

import numpy as np
import pytest

from covtanet.report.key_slices import MAX_KEY_SLICES, choose_planes


def masks(lesion_px: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Masks (planes, 10, 10) with so many pixels of lesion in each plane, and lung in all."""
    lesion = np.zeros((len(lesion_px), 100), bool)
    for plane, count in zip(lesion, lesion_px, strict=True):
        plane[:count] = True
    lung = np.ones((len(lesion_px), 10, 10), bool)
    return lesion.reshape(-1, 10, 10), lung


def test_planes_with_most_lesion_are_chosen_from_all_of_its_height() -> None:
    lesion_px = [40, 50] * 24
    lesion_px[7] = 90
    chosen = choose_planes(*masks(lesion_px), axis=0).tolist()
    assert len(chosen) == MAX_KEY_SLICES
    assert [plane // 4 for plane in chosen] == list(range(12))
    assert 7 in chosen
    assert all(lesion_px[plane] >= 50 for plane in chosen)


def test_planes_with_hardly_any_lesion_are_left_out() -> None:
    assert choose_planes(*masks([0, 1, 9, 80, 8, 0]), axis=0).tolist() == [2, 3, 4]


def test_single_voxel_of_lesion_is_shown() -> None:
    assert choose_planes(*masks([0, 0, 1, 0]), axis=0).tolist() == [2]


@pytest.mark.parametrize(("count", "expected"), [(41, [8, 16, 24, 32]), (3, [0, 1, 2]), (1, [0])])
def test_series_without_lesion_shows_a_few_planes_of_the_lungs(
    count: int, expected: list[int]
) -> None:
    assert choose_planes(*masks([0] * count), axis=0).tolist() == expected


def test_planes_lie_across_the_axis_of_the_slices() -> None:
    lesion, lung = masks([0, 0, 5, 0])
    for axis in range(3):
        turned = [np.moveaxis(mask, 0, axis) for mask in (lesion, lung)]
        assert choose_planes(turned[0], turned[1], axis).tolist() == [2]
