"""Damaged and odd NIfTI files."""

import nibabel as nib
import numpy as np
import pytest
from encoded_ct import as_nifti

from covtanet.ct import nifti
from covtanet.ct.gzip_stream import compress
from covtanet.ct.hounsfield import check_hu
from covtanet.errors import StudyError
from covtanet.phantoms.phantom import Phantom


def damaged_nifti(mild: Phantom, kind: str) -> bytes:
    plain = as_nifti(mild)
    gz = compress(plain)
    wrong_checksum = bytearray(gz)
    wrong_checksum[-6] ^= 0xFF
    header = bytearray(plain)
    header[252:256] = bytes(4)  # qform_code, sform_code
    small = Phantom(
        hu=mild.hu[:6],
        affine=mild.affine,
        lesion_mask=mild.lesion_mask[:6],
        lung_mask=mild.lung_mask[:6],
    )
    shown = np.clip((mild.hu.astype(float) + 1000) / 1400 * 255, 0, 255)
    huge = bytearray(plain)
    huge[42:48] = np.array([32767, 32767, 32767], "<i2").tobytes()
    return {
        "unreadable": b"not a NIfTI file" * 50,
        "truncated": gz[: len(gz) // 2],
        "undecodable": bytes(wrong_checksum),
        "missing_position": bytes(header),
        "too_few_slices": as_nifti(small),
        "not_hu": as_nifti(
            Phantom(
                hu=shown.astype(np.int16),
                affine=mild.affine,
                lesion_mask=mild.hu > 0,
                lung_mask=mild.hu > 0,
            ),
            dtype=np.uint8,
        ),
        "too_large": bytes(huge),
    }[kind]


@pytest.mark.parametrize(
    "reason",
    [
        "unreadable",
        "truncated",
        "undecodable",
        "missing_position",
        "too_few_slices",
        "not_hu",
        "too_large",
    ],
)
def test_damaged_nifti_is_refused_for_its_reason(mild: Phantom, reason: str) -> None:
    with pytest.raises(StudyError) as error:
        nifti.read(damaged_nifti(mild, reason))
    assert error.value.reason == reason


def test_slope_and_intercept_are_applied(mild: Phantom) -> None:
    image = nib.Nifti1Image.from_bytes(as_nifti(mild))
    stored = nib.Nifti1Image((np.asarray(image.dataobj) + 1024) // 2, image.affine)
    stored.header.set_slope_inter(2.0, -1024.0)
    volume = nifti.read(stored.to_bytes())
    assert np.abs(volume.hu.astype(int) - mild.hu).max() <= 1


def test_gzip_of_several_members_is_read_and_nan_is_not_hu(mild: Phantom) -> None:
    plain = as_nifti(mild)
    half = len(plain) // 2
    both = compress(plain[:half]) + compress(plain[half:])
    np.testing.assert_array_equal(nifti.read(both).hu, mild.hu)
    hu = mild.hu.astype(np.float32)
    hu[13, 5, 5] = np.nan
    with pytest.raises(StudyError, match="NaN or infinite") as error:
        check_hu(hu)
    assert error.value.reason == "not_hu"
