"""Slices of a series as a small file."""

from pathlib import Path

import numpy as np
import pytest

from covtanet.ct.lung_box import SliceBox
from covtanet.ct.window import WindowConfig
from covtanet.data.slice_file import GREY_STEPS, SliceFile, load_slices, save_slices, to_grey

FILL = 25
CONTEXT_PX = 2


def slices_with(box: SliceBox, *, is_continuous: bool = True) -> SliceFile:
    """Return four random slices of 20 x 24 pixels."""
    rng = np.random.default_rng(5)
    shape = (4, 20, 24)
    return SliceFile(
        grey=rng.integers(0, GREY_STEPS + 1, shape, dtype=np.uint8),
        lesion=rng.random(shape) < 0.2,
        inside=rng.random(shape) < 0.6,
        has_lung=np.array([False, True, True, False]),
        box=box,
        is_continuous=is_continuous,
    )


@pytest.mark.parametrize("is_continuous", [True, False])
def test_slices_survive_a_round_trip_inside_the_context(
    tmp_path: Path, is_continuous: bool
) -> None:
    slices = slices_with(SliceBox(top=5, left=6, height=9, width=9), is_continuous=is_continuous)
    save_slices(tmp_path / "series.npz", slices, CONTEXT_PX)
    loaded = load_slices(tmp_path / "series.npz", FILL)
    written = np.zeros((20, 24), bool)
    written[3:16, 4:17] = True
    assert np.array_equal(loaded.grey, np.where(written, slices.grey, FILL))
    assert np.array_equal(loaded.lesion, slices.lesion & written)
    assert np.array_equal(loaded.inside, slices.inside & written)
    assert loaded.has_lung.tolist() == slices.has_lung.tolist()
    assert loaded.box == slices.box
    assert loaded.is_continuous == is_continuous


def test_box_beyond_the_slice_is_written_up_to_the_border(tmp_path: Path) -> None:
    slices = slices_with(SliceBox(top=-4, left=-4, height=32, width=32))
    save_slices(tmp_path / "series.npz", slices, CONTEXT_PX)
    loaded = load_slices(tmp_path / "series.npz", FILL)
    assert np.array_equal(loaded.grey, slices.grey)
    assert loaded.box == slices.box


def test_file_holds_no_pickled_objects(tmp_path: Path) -> None:
    save_slices(tmp_path / "series.npz", slices_with(SliceBox(top=0, left=0, height=8, width=8)), 0)
    with np.load(tmp_path / "series.npz", allow_pickle=False) as arrays:
        assert all(arrays[name].dtype != object for name in arrays)


def test_grey_maps_the_window_to_all_steps() -> None:
    """10 HU are one step of the window of 1500 HU; beyond the window the ends count."""
    window = WindowConfig(low_hu=-1250.0, high_hu=250.0)
    grey = to_grey(np.array([-3000, -1250, -1240, -1000, 250, 900]), window)
    assert grey.tolist() == [0, 0, 1, 25, GREY_STEPS, GREY_STEPS]
