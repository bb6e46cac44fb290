"""Prepared volumes cropped to the lungs, as screening crops them."""

from dataclasses import replace

import numpy as np
import pytest

from covtanet.ct import nifti
from covtanet.ct.lung import find_lungs
from covtanet.ct.lung_box import lung_box
from covtanet.ct.window import WindowConfig, mask_to_input, pixel_aspect, to_input
from covtanet.data import prepared
from covtanet.data.labels import LabelledVolume
from covtanet.errors import ConfigError
from covtanet.phantoms.encodings import nifti_grid
from covtanet.phantoms.phantom import Phantom

PHANTOM = LabelledVolume(
    volume_path="v.nii.gz", patient="p", lesion_mask_path="m.nii.gz", lung_mask_path="l.nii.gz"
)
WHOLE = WindowConfig(size_px=64)
BOX = replace(WHOLE, crops_to_lungs=True)


def contents_of(phantom: Phantom) -> dict[str, bytes]:
    arrays = (phantom.hu, phantom.lesion_mask, phantom.lung_mask)
    grid = nifti_grid(phantom)
    names = ("v.nii.gz", "m.nii.gz", "l.nii.gz")
    return {name: nifti.write(array, grid) for name, array in zip(names, arrays, strict=True)}


def prepare(
    phantom: Phantom, window: WindowConfig, volume: LabelledVolume = PHANTOM
) -> tuple[prepared.PreparedVolume, prepared.Samples]:
    description, samples = prepared.prepare(volume, "k", contents_of(phantom), window, 0)
    assert samples is not None, description.reason_detail
    return description, samples


@pytest.mark.parametrize("has_label", [True, False])
def test_slices_in_hu_are_cropped_to_the_lungs_that_screening_finds(
    mild: Phantom, has_label: bool
) -> None:
    """Also if the lungs are labelled: screening has no labels."""
    volume = PHANTOM if has_label else replace(PHANTOM, lung_mask_path=None)
    description, samples = prepare(mild, BOX, volume)
    ct = nifti.read(contents_of(mild)[volume.volume_path])
    aspect = pixel_aspect(ct.spacing_mm)
    box = lung_box(find_lungs(ct).lung_mask, aspect)
    chosen = np.array(description.slices)
    assert np.array_equal(samples.levels, to_input(ct.hu[chosen], BOX, aspect, box))
    assert samples.lesion is not None
    lesion = mask_to_input(mild.lesion_mask[chosen], BOX, aspect, box)
    assert np.array_equal(samples.lesion, lesion)
    assert lesion.sum() > prepare(mild, WHOLE, volume)[1].lesion.sum()  # type: ignore[union-attr]


def grey_of(phantom: Phantom) -> Phantom:
    grey = np.clip((phantom.hu + 1000) / 1400 * 255, 0, 255)
    return replace(phantom, hu=grey.astype(np.int16))


def test_grey_slices_are_cropped_to_the_labelled_lungs(mild: Phantom) -> None:
    volume = replace(PHANTOM, intensity="grey8")
    description, samples = prepare(grey_of(mild), BOX, volume)
    ct = nifti.read_grey8(contents_of(grey_of(mild))[volume.volume_path])
    aspect = pixel_aspect(ct.spacing_mm)
    box = lung_box(mild.lung_mask | mild.lesion_mask, aspect)
    window = replace(BOX, low_hu=0.0, high_hu=255.0)
    expected = to_input(ct.hu[np.array(description.slices)], window, aspect, box)
    assert np.array_equal(samples.levels, expected)


def test_grey_slices_without_labelled_lungs_are_whole(mild: Phantom) -> None:
    volume = replace(PHANTOM, intensity="grey8", lung_mask_path=None)
    cropped = prepare(grey_of(mild), BOX, volume)[1]
    assert np.array_equal(cropped.levels, prepare(grey_of(mild), WHOLE, volume)[1].levels)


def test_volume_without_lungs_is_refused_if_slices_are_cropped(mild: Phantom) -> None:
    """The labels alone would do for whole slices."""
    solid = np.where(mild.lung_mask | mild.lesion_mask, 40, mild.hu)
    soft = replace(mild, hu=solid.astype(np.int16))
    description, samples = prepared.prepare(PHANTOM, "k", contents_of(soft), BOX, 0)
    assert (description.reason, samples) == ("no_lung", None)


def test_key_follows_the_crop_and_not_the_neighbours() -> None:
    windows = (WHOLE, BOX, replace(BOX, num_neighbours=1))
    keys = [prepared.volume_key(PHANTOM, ["v"], window, 2.5) for window in windows]
    assert keys[0] != keys[1]
    assert keys[1] == keys[2]


def test_diagnosis_reads_slices_with_their_neighbours() -> None:
    levels = np.arange(5, dtype=np.uint16)[:, None, None] * np.ones((1, 2, 2), np.uint16)
    samples = prepared.Samples(levels=levels, lesion=None)
    slices = prepared.diagnosis_slices(samples, 3, 1)
    assert slices[:, :, 0, 0].tolist() == [[0, 0, 1], [1, 2, 3], [3, 4, 4]]
    alone = prepared.diagnosis_slices(samples, 3, 1, is_continuous=False)
    assert alone[:, :, 0, 0].tolist() == [[0, 0, 0], [2, 2, 2], [4, 4, 4]]


def test_single_slices_are_described_as_such(mild: Phantom) -> None:
    volume = replace(PHANTOM, slice_order="single")
    assert not prepare(mild, WHOLE, volume)[0].is_continuous
    assert prepare(mild, WHOLE)[0].is_continuous
    with pytest.raises(ConfigError, match="slice_order sorted, expected continuous or single"):
        replace(PHANTOM, slice_order="sorted")
