"""Lungs that the edge of the image or of the field of view cuts."""

from collections.abc import Callable

import numpy as np
import pytest
from cut_chests import FILLS, Array, beyond, filled, found_in, lung_box, share, with_arms
from wide_chests import chest

# The image edge cuts a lung.

CROPS: dict[str, Callable[[Array, Array], tuple[slice, slice]]] = {
    "a strip of 5 mm on the right": lambda rows, columns: (
        slice(None),
        slice(columns[0] + 2, None),
    ),
    "half of the right lung": lambda rows, columns: (slice(None), slice(columns[0] + 18, None)),
    "half of the left lung": lambda rows, columns: (slice(None), slice(None, columns[1] - 18)),
    "the front": lambda rows, columns: (slice(rows[0] + 8, None), slice(None)),
    "the back": lambda rows, columns: (slice(None, rows[1] - 8), slice(None)),
    "all but a quarter": lambda rows, columns: (
        slice(rows[0] + 25, None),
        slice(columns[0] + 25, None),
    ),
    "all but the middle of one lung": lambda rows, columns: (slice(44, 88), slice(30, 58)),
}


@pytest.mark.parametrize("name", CROPS)
def test_lung_cut_by_the_image_edge_is_partial_and_lung(name: str) -> None:
    rows, columns = CROPS[name](*lung_box(chest()))
    lungs = found_in(chest().hu[:, rows, columns], chest())
    assert lungs.is_partial
    assert share(lungs, chest().lung_mask[:, rows, columns]) == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("columns", [slice(59, None), slice(None, 69)])
def test_image_of_one_lung_is_partial(columns: slice) -> None:
    """The image ends in the mediastinum; the lung that it shows is whole."""
    assert chest().lung_mask[:, :, columns].sum() < 0.6 * chest().lung_mask.sum()
    assert found_in(chest().hu[:, :, columns], chest()).is_partial


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize(
    ("radius_mm", "centre_mm"), [(109, (0, 0)), (90, (0, 75)), (100, (-40, -30))]
)
def test_lung_cut_by_a_round_field_of_view_is_partial(
    fill: int, radius_mm: float, centre_mm: tuple[float, float]
) -> None:
    where = beyond(radius_mm, centre_mm)
    lungs = found_in(filled(where, fill), chest())
    assert lungs.is_partial
    assert share(lungs, chest().lung_mask & ~where) == pytest.approx(1, abs=0.1)


def test_lung_cut_in_a_few_slices_is_partial() -> None:
    """A table that moves sideways: three slices are shifted by 7 cm, and padded with air."""
    hu = chest().hu.copy()
    hu[14:17] = np.pad(hu[14:17], ((0, 0), (0, 0), (0, 25)), constant_values=-1024)[:, :, 25:]
    assert found_in(hu, chest()).is_partial


def test_emphysema_cut_by_the_image_edge_is_partial() -> None:
    """As dark as foam; only that it lies between tissue tells."""
    hu = chest().hu.copy()
    hu[chest().lung_mask & (hu < -700)] -= 80
    lungs = found_in(hu[:, :, 30:], chest())
    assert lungs.is_partial
    assert share(lungs, chest().lung_mask[:, :, 30:]) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("margin_px", [3, 6])
def test_whole_lungs_in_a_field_of_view_from_rib_to_rib_are_not_partial(margin_px: int) -> None:
    rows, columns = lung_box(chest())
    inner = (
        slice(rows[0] - margin_px, rows[1] + margin_px + 1),
        slice(columns[0] - margin_px, columns[1] + margin_px + 1),
    )
    lungs = found_in(chest().hu[:, *inner], chest())
    assert not lungs.is_partial
    assert share(lungs, chest().lung_mask[:, *inner]) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("has_pocket", [False, True])
@pytest.mark.parametrize("cut_px", [0, 8])
def test_arms_at_the_image_edge_do_not_make_lungs_partial(has_pocket: bool, cut_px: int) -> None:
    shown = slice(cut_px, 128 - cut_px)
    lungs = found_in(with_arms(has_pocket=has_pocket)[:, :, shown], chest())
    assert not lungs.is_partial
    assert share(lungs, chest().lung_mask) == pytest.approx(1, abs=0.1)
