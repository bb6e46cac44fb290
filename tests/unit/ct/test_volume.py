"""Canonical axes of volumes, and the way back to their source."""

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from encoded_ct import as_nifti

from covtanet.ct import dicom, lung, nifti
from covtanet.ct.volume import canonical_volume
from covtanet.errors import StudyError
from covtanet.phantoms.phantom import Phantom


@pytest.mark.parametrize("axes", ["LPS", "RAS", "SPL", "PSR", "AIR"])
def test_every_axis_order_gives_the_same_volume(mild: Phantom, axes: str) -> None:
    volume = nifti.read(as_nifti(mild, axes))
    np.testing.assert_array_equal(volume.hu, mild.hu)
    np.testing.assert_allclose(volume.affine, mild.affine, atol=1e-4)


@pytest.mark.parametrize("axes", ["LPS", "PSR", "SPL", "AIR", "SRA"])
def test_masks_go_back_to_the_axis_order_of_their_source(mild: Phantom, axes: str) -> None:
    source = as_nifti(mild, axes)
    volume = nifti.read(source)
    written = nib.Nifti1Image.from_bytes(gzip.decompress(nifti.write(volume.hu, volume.source)))
    original = nib.Nifti1Image.from_bytes(source)
    np.testing.assert_array_equal(np.asarray(written.dataobj), np.asarray(original.dataobj))
    np.testing.assert_allclose(written.affine, original.affine, atol=1e-4)


def test_sheared_affine_is_gantry_tilt(mild: Phantom) -> None:
    affine = mild.affine.copy()
    affine[1, 0] = 0.3 * affine[2, 0]
    with pytest.raises(StudyError, match="degrees off their normal") as error:
        canonical_volume(mild.hu, affine)
    assert error.value.reason == "gantry_tilt"


def test_real_series_are_read_if_they_exist() -> None:
    from repository import REAL_DATA

    if not (REAL_DATA / "dicom").exists():
        pytest.skip("the real CT is not on this machine")
    folder: Path = REAL_DATA / "dicom" / "lungfcp-01-0001"
    volume = dicom.read_series([path.read_bytes() for path in folder.iterdir()])
    assert volume.hu.shape == (10, 512, 512)
    assert volume.spacing_mm == pytest.approx((1.0, 0.759765625, 0.759765625))
    assert lung.find_lungs(volume).is_partial
