"""Prepared volumes of a data set, and their report."""

from dataclasses import replace

import numpy as np
import pytest

from covtanet.ct import nifti
from covtanet.ct.volume import SourceGrid
from covtanet.ct.window import WindowConfig
from covtanet.data import prepared, prepared_file
from covtanet.data.labels import LabelledVolume
from covtanet.phantoms.encodings import nifti_grid
from covtanet.phantoms.phantom import Phantom
from covtanet.report import data_report

WINDOW = WindowConfig(size_px=64)
GRID = SourceGrid(shape=(32, 32, 10), affine=np.diag([-1.0, -1.0, 1.0, 1.0]))


def contents_of(phantom: Phantom, volume: LabelledVolume) -> dict[str, bytes]:
    grid = nifti_grid(phantom)
    found = {volume.volume_path: nifti.write(phantom.hu, grid)}
    if volume.lesion_mask_path:
        found[volume.lesion_mask_path] = nifti.write(phantom.lesion_mask, grid)
    if volume.lung_mask_path:
        found[volume.lung_mask_path] = nifti.write(phantom.lung_mask, grid)
    return found


PHANTOM = LabelledVolume(
    volume_path="v.nii.gz", patient="p", lesion_mask_path="m.nii.gz", lung_mask_path="l.nii.gz"
)


def test_prepared_volume_is_equal_after_parquet(mild: Phantom) -> None:
    found, samples = prepared.prepare(PHANTOM, "k", contents_of(mild, PHANTOM), WINDOW, 0)
    assert samples is not None
    data = prepared_file.to_parquet(found, samples)
    again = prepared_file.read_samples(data)
    assert prepared_file.describe(data) == found
    assert np.array_equal(again.levels, samples.levels)
    assert again.lesion is not None
    assert samples.lesion is not None
    assert np.array_equal(again.lesion, samples.lesion)
    assert found.lesion_px == tuple(again.lesion.sum(axis=(1, 2)))


def test_prepared_volume_of_anisotropic_slices_is_undistorted(mild: Phantom) -> None:
    """Every other row, with voxels twice as long: levels and mask are those of the whole volume."""
    whole, square = prepared.prepare(PHANTOM, "k", contents_of(mild, PHANTOM), WINDOW, 0)
    half = Phantom(
        hu=mild.hu[:, ::2], affine=mild.affine @ np.diag([1.0, 2.0, 1.0, 1.0]),
        lesion_mask=mild.lesion_mask[:, ::2], lung_mask=mild.lung_mask[:, ::2],
    )  # fmt: skip
    found, samples = prepared.prepare(PHANTOM, "k", contents_of(half, PHANTOM), WINDOW, 0)
    assert square is not None
    assert samples is not None
    assert found.slices == whole.slices
    difference = np.abs(samples.levels.astype(int) - square.levels)
    assert np.mean(difference > 0.2 * 65535) < 0.05
    assert samples.lesion is not None
    assert square.lesion is not None
    assert int(samples.lesion.sum()) == pytest.approx(int(square.lesion.sum()), rel=0.2)
    assert np.count_nonzero(samples.lesion & square.lesion) > 0.8 * np.count_nonzero(square.lesion)


def test_severity_follows_from_the_masks_without_a_label(mild: Phantom) -> None:
    """The paper's rule: a tenth of the lung is mild, more than a quarter severe."""
    found, _ = prepared.prepare(PHANTOM, "k", contents_of(mild, PHANTOM), WINDOW, 0)
    assert found.involvement == pytest.approx(mild.involvement)
    assert found.grade == "mild"
    severe = Phantom(
        hu=mild.hu, affine=mild.affine, lesion_mask=mild.lung_mask, lung_mask=mild.lung_mask
    )
    assert (
        prepared.prepare(PHANTOM, "k", contents_of(severe, PHANTOM), WINDOW, 0)[0].grade == "severe"
    )
    none = Phantom(
        hu=mild.hu, affine=mild.affine, lesion_mask=mild.lung_mask & False, lung_mask=mild.lung_mask
    )
    assert (
        prepared.prepare(PHANTOM, "k", contents_of(none, PHANTOM), WINDOW, 0)[0].grade == "normal"
    )


def grey(values: np.ndarray) -> tuple[LabelledVolume, dict[str, bytes]]:
    volume = replace(PHANTOM, lung_mask_path=None, intensity="grey8")
    mask = np.zeros(values.shape, np.uint8)
    mask[4, 10:14, 10:14] = 1
    return volume, {"v.nii.gz": nifti.write(values, GRID), "m.nii.gz": nifti.write(mask, GRID)}


def test_grey_values_map_linearly_and_are_never_windowed_as_hu() -> None:
    values = np.tile(np.linspace(0, 255, 32).astype(np.uint8), (10, 32, 1))
    volume, contents = grey(values)
    found, samples = prepared.prepare(volume, "k", contents, WindowConfig(size_px=32), 0)
    assert samples is not None
    assert np.allclose(samples.levels / 65535, values / 255, atol=1e-4)
    assert (found.intensity, found.involvement) == ("grey8", None)
    assert (
        prepared.prepare(
            replace(volume, intensity="auto"), "k", contents, WindowConfig(size_px=32), 0
        )[0]
        == found
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"intensity": "hu"}, "label_map"),  # 32 different values, none below 0
        ({"lesion_mask_path": None}, "unlabelled"),
    ],
)
def test_volume_of_other_intensity_than_declared_is_refused(
    change: dict[str, str], reason: str
) -> None:
    volume, contents = grey(np.tile(np.linspace(0, 255, 32).astype(np.uint8), (10, 32, 1)))
    found, samples = prepared.prepare(replace(volume, **change), "k", contents, WINDOW, 0)
    assert (found.reason, samples) == (reason, None)
    assert prepared_file.describe(prepared_file.to_parquet(found, samples)) == found


def test_hu_declared_grey_are_refused(mild: Phantom) -> None:
    volume = replace(PHANTOM, intensity="grey8")
    assert (
        prepared.prepare(volume, "k", contents_of(mild, volume), WINDOW, 0)[0].reason == "not_grey8"
    )


def test_grey_values_with_a_line_are_read_as_hu(mild: Phantom) -> None:
    """Lungs are found in them, and the window is applied as to the HU they stand for."""
    grey = np.clip(np.rint((mild.hu + 1250.0) * 255 / 1500), 0, 255).astype(np.int16)
    volume = replace(PHANTOM, lung_mask_path=None, intensity="grey8:-1250:250")
    contents = contents_of(replace(mild, hu=grey), volume)
    window = WindowConfig(low_hu=-1250, high_hu=250, size_px=64)
    description, samples = prepared.prepare(volume, "k", contents, window, 0)
    in_hu = replace(PHANTOM, lung_mask_path=None)
    expected, samples_in_hu = prepared.prepare(in_hu, "k", contents_of(mild, in_hu), window, 0)
    assert description.intensity == "hu"
    assert description.slices == expected.slices
    assert description.involvement == pytest.approx(expected.involvement, rel=0.01)
    assert samples is not None
    assert samples_in_hu is not None
    # Half a grey value is 65535 / 510 steps.
    assert np.allclose(samples.levels.astype(int), samples_in_hu.levels, atol=130)


def test_hu_declared_as_grey_values_with_a_line_are_refused(mild: Phantom) -> None:
    volume = replace(PHANTOM, intensity="grey8:-1250:250")
    description, _ = prepared.prepare(volume, "k", contents_of(mild, volume), WINDOW, 0)
    assert description.reason == "not_grey8"


def test_mask_of_another_shape_is_refused(mild: Phantom) -> None:
    contents = contents_of(mild, PHANTOM)
    contents["m.nii.gz"] = nifti.write(np.zeros((10, 32, 32), np.uint8), GRID)
    found, _ = prepared.prepare(PHANTOM, "k", contents, WINDOW, 0)
    assert found.reason == "mask_mismatch"
    assert "expected (24, 128, 128)" in str(found.reason_detail)


def test_key_changes_with_source_label_and_preprocessing() -> None:
    keys = {
        prepared.volume_key(volume, versions, window, step)
        for volume, versions, window, step in (
            (PHANTOM, ["1"], WINDOW, 0.0),
            (PHANTOM, ["2"], WINDOW, 0.0),
            (replace(PHANTOM, diagnosis="infected"), ["1"], WINDOW, 0.0),
            (PHANTOM, ["1"], WindowConfig(size_px=128), 0.0),
            (PHANTOM, ["1"], WINDOW, 2.5),
        )
    }
    assert len(keys) == 5


def test_data_report_counts_grades_and_reasons_without_identities(mild: Phantom) -> None:
    sound, _ = prepared.prepare(PHANTOM, "k1", contents_of(mild, PHANTOM), WINDOW, 0)
    lost = prepared.refused(
        replace(PHANTOM, patient="Mueller"), "k2", WINDOW, "missing", "not there"
    )
    text = data_report.as_text([sound, lost], ["a trap"])
    assert "volumes" in text
    assert "2 of 2 patients" in text
    assert "missing" in text
    assert "note: a trap" in text
    assert "Mueller" not in text
