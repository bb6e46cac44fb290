"""The header and the stored voxels of a NIfTI-1 or -2 file, plain or gzipped.

The header is compared with the bytes before anything is allocated.
"""

import logging
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from covtanet.ct import limits
from covtanet.ct.gzip_stream import GZIP_MAGIC, MAX_INFLATION, inflate
from covtanet.errors import Reason, StudyError

HEADER_BYTES, EXTENSION_BYTES = 544, 4
SINGLE_FILE_MAGIC = (b"n+1", b"n+2\0\r\n\x1a\n", b"n+2")
# nibabel repairs findings of this level and above: units, codes, lengths below 0. A header that
# needs such a repair is refused. A missing qfac has a lower level, and is common.
REPAIRED_LEVEL = 30
SILENT = logging.getLogger("covtanet.ct.nifti.silent")
SILENT.disabled = True


def read_header(data: bytes) -> Any:
    """Return the header of a file as nibabel's Nifti1Header or Nifti2Header.

    Raises:
        StudyError: ``unreadable``, or ``truncated`` or ``undecodable`` for a damaged gzip stream.
    """
    if data[:2] == GZIP_MAGIC:
        return _parse_header(inflate(data, HEADER_BYTES, to_end=False))
    return _parse_header(data[:HEADER_BYTES])


def read_stored(data: bytes) -> tuple[NDArray[Any], Any]:
    """Return the voxels as stored, before slope and intercept, and the header.

    The array is 3-D, in the file's axis order.

    Raises:
        StudyError: ``unreadable``, ``not_ct``, ``truncated``, ``undecodable`` or ``too_large``.
    """
    is_gzip = data[:2] == GZIP_MAGIC
    header = read_header(data)
    shape = _shape(header)
    dtype = _voxel_dtype(header, shape)
    start = _data_offset(header)
    num_voxels = shape[0] * shape[1] * shape[2]
    if num_voxels > limits.MAX_VOXELS or start > limits.MAX_VOXELS or start < 0:
        raise StudyError(
            Reason.TOO_LARGE,
            f"{num_voxels} voxels from byte {start}, expected at most {limits.MAX_VOXELS}",
        )
    check_num_bytes(num_voxels, dtype)
    end = start + num_voxels * dtype.itemsize
    if is_gzip and end > MAX_INFLATION * len(data):
        raise StudyError(
            Reason.TRUNCATED, f"{len(data)} compressed bytes, the header asks for {end}"
        )
    if max(shape) > limits.MAX_SLICES:
        raise StudyError(
            Reason.TOO_LARGE,
            f"{max(shape)} voxels along an axis, expected at most {limits.MAX_SLICES}",
        )
    plain = inflate(data, end, to_end=True) if is_gzip else data
    if len(plain) < end:
        raise StudyError(Reason.TRUNCATED, f"{len(plain)} bytes, the header asks for {end}")
    return np.frombuffer(plain, dtype, num_voxels, start).reshape(shape, order="F"), header


def check_num_bytes(num_voxels: int, dtype: np.dtype[Any]) -> None:
    """Refuse a volume that takes more bytes than a volume may.

    Raises:
        StudyError: ``too_large``.
    """
    limit = limits.MAX_BYTES // dtype.itemsize
    if num_voxels > limit:
        raise StudyError(
            Reason.TOO_LARGE,
            f"{num_voxels} voxels of {dtype.itemsize} bytes, expected at most {limit}",
        )


def slope_and_intercept(header: Any) -> tuple[float, float] | None:
    """Return slope and intercept; None if one is NaN or infinite.

    A header that sets neither means 1 and 0.
    """
    if np.isinf(float(header["scl_slope"])) or np.isinf(float(header["scl_inter"])):
        return None
    try:
        slope, intercept = header.get_slope_inter()
    except HeaderDataError:
        return None
    # nibabel gives neither if the slope is 0 or NaN.
    return (1.0, 0.0) if slope is None else (float(slope), float(intercept))


def _shape(header: Any) -> tuple[int, ...]:
    """Return the three dimensions; further ones must have one element."""
    shape = tuple(int(n) for n in header.get_data_shape())
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3:
        raise StudyError(Reason.NOT_CT, f"{len(shape)} dimensions, expected 3")
    return shape


def _voxel_dtype(header: Any, shape: tuple[int, ...]) -> np.dtype[Any]:
    dtype: np.dtype[Any] = header.get_data_dtype()
    if dtype.kind not in "iuf":
        raise StudyError(
            Reason.NOT_CT, "voxels are colours or complex numbers, expected one real number each"
        )
    if min(shape) < 1:
        raise StudyError(
            Reason.TRUNCATED,
            f"the header says {shape} voxels, expected at least one along each axis",
        )
    return dtype


def _data_offset(header: Any) -> int:
    """Return the byte at which the voxels begin."""
    try:
        start = int(header.get_data_offset())
    except (ValueError, OverflowError) as error:
        raise StudyError(
            Reason.UNREADABLE, "the header's offset of the voxels is NaN or infinite"
        ) from error
    if 0 <= start < header.template_dtype.itemsize + EXTENSION_BYTES:
        raise StudyError(Reason.UNREADABLE, f"the voxels begin at byte {start}, within the header")
    return start


def _parse_header(head: bytes | bytearray) -> Any:
    for kind in (nib.Nifti1Header, nib.Nifti2Header):
        size = kind.template_dtype.itemsize
        if len(head) < size or not kind.may_contain_header(head[:size]):
            continue
        try:
            return _checked_header(kind(head[:size], check=False))
        except (HeaderDataError, ValueError, KeyError, OverflowError) as error:
            raise StudyError(Reason.UNREADABLE, "the NIfTI header contradicts itself") from error
    raise StudyError(Reason.UNREADABLE, "the file does not begin with a NIfTI header")


def _checked_header(header: Any) -> Any:
    """Return a header that nibabel would not repair, of a single file."""
    # nibabel asks for an offset that is a multiple of 16, which is a convention of SPM. The offset
    # is hidden from this check and compared with the bytes later.
    start = header["vox_offset"].copy()
    header["vox_offset"] = 0
    header.check_fix(logger=SILENT, error_level=REPAIRED_LEVEL)
    header["vox_offset"] = start
    if header["magic"].item() not in SINGLE_FILE_MAGIC:
        raise StudyError(Reason.UNREADABLE, "the header of a pair of files, expected a single file")
    return header
