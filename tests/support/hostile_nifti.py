"""Malformed NIfTI files with the reason for their refusal, and odd files that are read."""

import gzip
import struct
from collections.abc import Callable

import nibabel as nib
import numpy as np
from sound_input import Objects, gz, phantom, plain_nifti, slices

from covtanet.phantoms.damage import OTHER_DAMAGE

# Offsets in a NIfTI-1 header.
DIM, DATATYPE, BITPIX, PIXDIM, VOX_OFFSET, SLOPE, INTER, UNITS = 40, 70, 72, 76, 108, 112, 116, 123


QFORM_CODE, SFORM_CODE, QUATERN, SROW, MAGIC = 252, 254, 256, 280, 344


def patched(*changes: tuple[int, str, object], data: bytes | None = None) -> Objects:
    """The sound NIfTI file with fields of its header overwritten."""
    out = bytearray(data or plain_nifti())
    for at, kind, value in changes:
        values = value if isinstance(value, tuple | list) else (value,)
        struct.pack_into(f"<{kind}", out, at, *values)
    return {"a.nii": bytes(out)}


def stored(array: np.ndarray) -> Objects:
    """An array of voxels with the sound file's geometry."""
    image = nib.Nifti1Image.from_bytes(plain_nifti())
    return {"a.nii": nib.Nifti1Image(array, image.affine, dtype=array.dtype).to_bytes()}


def voxels() -> np.ndarray:
    return np.asarray(nib.Nifti1Image.from_bytes(plain_nifti()).dataobj)


def gz_with(at: int, value: int) -> Objects:
    data = bytearray(gz(plain_nifti()))
    data[at] ^= value
    return {"a.nii.gz": bytes(data)}


def qform_flipped() -> Objects:
    """The sform and the qform contradict each other in left and right."""
    image = nib.Nifti1Image.from_bytes(plain_nifti())
    image.set_sform(image.affine, 1)
    image.set_qform(image.affine @ np.diag([-1.0, 1, 1, 1]), 1)
    return {"a.nii": image.to_bytes()}


def sheared() -> Objects:
    image = nib.Nifti1Image.from_bytes(plain_nifti())
    image.set_qform(None, 0)
    affine = image.affine.copy()
    affine[1, 2] = 0.3 * affine[2, 2]
    image.set_sform(affine, 1)
    image.header["pixdim"][1:4] = np.linalg.norm(affine[:3, :3], axis=0)
    return {"a.nii": image.to_bytes()}


def small(depth: int) -> Objects:
    return stored(voxels()[:, :, :depth])


def long_axis() -> Objects:
    return stored(np.full((8, 8, 5000), -700, np.int16))


def padded_gzip_bomb() -> Objects:
    return {"a.nii.gz": gz(plain_nifti()) + gzip.compress(bytes(64 << 20), 9, mtime=0)}


def _lesser() -> np.ndarray:
    return np.clip((voxels().astype(float) + 1000) / 1400 * 255, 0, 255).astype(np.uint8)


NIFTI: dict[str, tuple[str, Callable[[], Objects]]] = {
    "empty file": ("unreadable", lambda: {"a.nii": b""}),
    "text": ("unreadable", lambda: {"a.nii.gz": b"no volume at all\n" * 60}),
    "cut in the header": ("unreadable", lambda: {"a.nii": plain_nifti()[:200]}),
    "cut behind the header": ("truncated", lambda: {"a.nii": plain_nifti()[:352]}),
    "cut in the voxels": ("truncated", lambda: {"a.nii": plain_nifti()[:-100]}),
    "gzip cut in half": ("truncated", lambda: {"a.nii.gz": gz(plain_nifti())[:20000]}),
    "gzip header alone": ("unreadable", lambda: {"a.nii.gz": gz(plain_nifti())[:10]}),
    "wrong gzip checksum": ("undecodable", lambda: gz_with(-6, 0xFF)),
    "wrong gzip length": ("undecodable", lambda: gz_with(-2, 0x01)),
    "one bit of the gzip stream": ("undecodable", lambda: gz_with(30000, 0x10)),
    "a gzip in a gzip": ("unreadable", lambda: {"a.nii.gz": gz(gz(plain_nifti()))}),
    "a bomb behind the volume": ("too_large", padded_gzip_bomb),
    "32767 cubed": (
        "too_large",
        lambda: patched((DIM, "8h", (3, 32767, 32767, 32767, 1, 1, 1, 1))),
    ),
    "more than a gzip can hold": (
        "truncated",
        lambda: {"a.nii.gz": gz(patched((DIM, "4h", (3, 1024, 1024, 400)))["a.nii"][:4000])},
    ),
    "voxels within the header": ("unreadable", lambda: patched((VOX_OFFSET, "f", 0.0))),
    "a negative dimension": ("truncated", lambda: patched((DIM + 2, "h", -64))),
    "a dimension of nothing": ("truncated", lambda: patched((DIM + 2, "h", 0))),
    "200 dimensions": ("unreadable", lambda: patched((DIM, "h", 200))),
    "two dimensions": ("not_ct", lambda: patched((DIM, "h", 2))),
    "five points in time": ("not_ct", lambda: patched((DIM, "5h", (4, 64, 64, 2, 5)))),
    "unknown datatype": ("unreadable", lambda: patched((DATATYPE, "h", 999))),
    "colours": ("not_ct", lambda: patched((DATATYPE, "2h", (128, 24)))),
    "complex numbers": ("not_ct", lambda: patched((DATATYPE, "2h", (32, 64)))),
    "offset is no number": ("unreadable", lambda: patched((VOX_OFFSET, "f", float("nan")))),
    "offset without end": ("unreadable", lambda: patched((VOX_OFFSET, "f", float("inf")))),
    "offset behind the end": ("truncated", lambda: patched((VOX_OFFSET, "f", 1e8))),
    "no orientation": ("missing_position", lambda: patched((QFORM_CODE, "2h", (0, 0)))),
    "an affine of zeros": (
        "missing_position",
        lambda: patched((QFORM_CODE, "2h", (0, 1)), (SROW, "12f", (0.0,) * 12)),
    ),
    "an affine that is no number": (
        "missing_position",
        lambda: patched((QFORM_CODE, "2h", (0, 1)), (SROW, "f", float("nan"))),
    ),
    "an endless affine": (
        "missing_position",
        lambda: patched((QFORM_CODE, "2h", (0, 1)), (SROW, "f", float("inf"))),
    ),
    "a quaternion that is none": (
        "missing_position",
        lambda: patched((QFORM_CODE, "2h", (1, 0)), (QUATERN, "3f", (3.0, 3.0, 3.0))),
    ),
    "a unit that is none": ("missing_position", lambda: patched((UNITS, "B", 6))),
    "a length below nothing": ("unreadable", lambda: patched((PIXDIM + 4, "f", -5.625))),
    "metres": ("missing_position", lambda: patched((UNITS, "B", 1))),
    "left in sform, right in qform": ("orientation_conflict", qform_flipped),
    "voxel size against affine": (
        "orientation_conflict",
        lambda: patched((PIXDIM + 4, "3f", (1.0, 1.0, 1.0)), (QFORM_CODE, "h", 0)),
    ),
    "a sheared affine": ("gantry_tilt", sheared),
    "an endless slope": ("missing_rescale", lambda: patched((SLOPE, "f", float("inf")))),
    "an endless intercept": (
        "missing_rescale",
        lambda: patched((INTER, "f", float("inf")), (SLOPE, "f", 1.0)),
    ),
    "a slope of a million": ("not_hu", lambda: patched((SLOPE, "2f", (1e6, 0.0)))),
    "voxels that are no numbers": (
        "not_hu",
        lambda: stored(np.where(voxels() > 0, np.nan, voxels()).astype("f4")),
    ),
    "8-bit picture": ("not_hu", lambda: stored(_lesser())),
    "nothing but air": ("not_hu", lambda: stored(np.full_like(voxels(), -1000))),
    "a label map": ("label_map", lambda: stored((voxels() > 0).astype(np.int16))),
    "header of a pair": ("unreadable", lambda: patched((MAGIC, "4s", b"ni1\0"))),
    "DICOM named NIfTI": ("unreadable", lambda: {"a.nii": slices()[0]}),
    "5 slices": ("too_few_slices", lambda: small(5)),
    "5000 slices": ("too_large", long_axis),
    "no lung": ("no_lung", lambda: {"a.nii.gz": OTHER_DAMAGE["no_lung"](phantom())[1]}),
}


def nifti2() -> Objects:
    image = nib.Nifti1Image.from_bytes(plain_nifti())
    return {"a.nii": nib.Nifti2Image(voxels(), image.affine).to_bytes()}


def big_endian_nifti() -> Objects:
    header = nib.Nifti1Image.from_bytes(plain_nifti()).header.as_byteswapped(">")
    header["vox_offset"] = 352
    return {"a.nii": header.binaryblock + bytes(4) + voxels().astype(">i2").tobytes(order="F")}


def halves() -> Objects:
    image = nib.Nifti1Image.from_bytes(plain_nifti())
    image = nib.Nifti1Image(((voxels() + 1024) * 2).astype(np.float64), image.affine)
    image.header.set_slope_inter(0.5, -1024.0)
    return {"a.nii": image.to_bytes()}
