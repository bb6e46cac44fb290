"""NIfTI-1 and -2, plain or gzipped, to a Volume in HU, and masks back to NIfTI.

The RAS frame of NIfTI exists only here. Not covered: images in pairs (.hdr/.img), more than three dimensions.
"""

import logging
from dataclasses import replace
from typing import Any

import nibabel as nib
import numpy as np
from isal import isal_zlib
from isal.igzip_lib import IsalError
from nibabel.orientations import io_orientation
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from covtanet.ct.fill import on_scale, replace_fill
from covtanet.ct.volume import LPS_TO_RAS, SourceGrid, Volume, canonical_volume, check_spacing
from covtanet.errors import QcFlag, Reason, StudyError

GZIP_MAGIC = b"\x1f\x8b"
GZIP_WBITS = 31
PIECE_BYTES = 1 << 20
HEADER_BYTES, EXTENSION_BYTES = 544, 4
# nibabel repairs at this level and above: units, codes, lengths below 0. A missing qfac is below it, and common.
REPAIRED_LEVEL = 30
SILENT = logging.getLogger("covtanet.ct.nifti.silent")
SILENT.disabled = True
SINGLE_FILE_MAGIC = (b"n+1", b"n+2\0\r\n\x1a\n", b"n+2")
# 2048 slices of 512 x 512. The decoder's memory holds such a volume twice (decode_memory_mib), as stored and in HU or
# in HU and with two masks, if a voxel has 16 bits; of wider ones as many fewer.
MAX_VOXELS = 1 << 29
MAX_BYTES = 2 * MAX_VOXELS
MAX_SLICES = 4096
# Deflate cannot do better; a header that asks for more than that of a gzipped file asks for what is not there.
MAX_INFLATION = 1032
SPACING_RTOL, AXIS_TOL = 0.01, 0.02
MIN_SLICES = 8
MAX_LABELS = 64
# Up to here counting every value is ten times as fast as sorting.
MAX_COUNTED = 65535
# Components of 3 decimals are up to 0.0013 over unit length; half a degree is in that.
MAX_QUATERNION_LENGTH = 1.005
MIN_VOLUME_OF_AXES = 1e-6
AIR_BELOW_HU = -500
MIN_AIR_SHARE = 0.01
TISSUE_HU = (-200, 300)
LOWEST_HU, HIGHEST_HU = -10000, 40000


def read(data: bytes) -> Volume:
    """Read one NIfTI file.

    data: the file's bytes. The stream of a gzipped file is read to its end, so that its checksum counts.

    Raises:
        StudyError: ``unreadable``, ``label_map``, ``not_ct``, ``truncated``, ``undecodable``, ``missing_position``,
            ``implausible_spacing``, ``missing_rescale``, ``orientation_conflict``, ``gantry_tilt``, ``not_hu``,
            ``too_few_slices`` or ``too_large``.
    """
    array, header = _stored_array(data)
    del data  # neither the file nor what it stores is needed beside the HU: each may be 1 GiB
    if _is_label_map(array, *(_slope_and_intercept(header) or (1.0, 0.0))):
        raise StudyError(
            Reason.LABEL_MAP,
            f"at most {MAX_LABELS} different values, none below 0: a label map, expected HU",
        )
    affine, flags = _affine(header)
    volume = canonical_volume(_to_hu(array, header), affine)
    del array
    hu, is_padded = replace_fill(volume.hu)
    flags = (*volume.qc_flags, *flags, *((QcFlag.PADDING,) if is_padded else ()))
    volume = replace(volume, hu=hu, qc_flags=flags, has_known_spacing=_has_known_spacing(header))
    check_hu(volume.hu)
    if len(volume.hu) < MIN_SLICES:
        raise StudyError(
            Reason.TOO_FEW_SLICES, f"{len(volume.hu)} axial slices, expected at least {MIN_SLICES}"
        )
    return volume


def read_labels(data: bytes) -> NDArray[np.uint16]:
    """Read a label map or mask as (z, y, x), in the frame of ``read``. Raises StudyError as ``read`` does."""
    array, header = _stored_array(data)
    return canonical_volume(array.astype(np.uint16), _affine(header)[0]).hu


def read_grey8(data: bytes) -> Volume:
    """Read a volume of grey values 0..255, windowed at its source, as if they were HU.

    Raises:
        StudyError: ``not_grey8`` for values outside 0..255, else as ``read``.
    """
    array, header = _stored_array(data)
    values = _to_hu(array, header)
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 255 and high > 1):
        raise StudyError(
            Reason.NOT_GREY8, f"values {low:.0f}..{high:.0f}, expected grey values 0..255"
        )
    volume = canonical_volume(values, _affine(header)[0])
    return replace(volume, has_known_spacing=_has_known_spacing(header))


def has_spacing(data: bytes) -> bool:
    """Whether the header knows its voxel size; 1 x 1 x 1 without a unit is nominal."""
    head = (
        _inflate(data, HEADER_BYTES, to_end=False)
        if data[:2] == GZIP_MAGIC
        else data[:HEADER_BYTES]
    )
    return _has_known_spacing(_header(head))


def write(array: NDArray[Any], grid: SourceGrid) -> bytes:
    """Return a (z, y, x) mask or volume as .nii.gz in the grid of its source, axis order included."""
    stored = grid.from_canonical(array)
    image = nib.Nifti1Image(
        stored.view(np.uint8) if stored.dtype == bool else stored, LPS_TO_RAS @ grid.affine
    )
    image.header.set_xyzt_units("mm")
    return isal_gzip(image.to_bytes())


def isal_gzip(data: bytes) -> bytes:
    """Compress into one gzip member, without a time stamp, so that the same array gives the same bytes."""
    compressor = isal_zlib.compressobj(level=1, wbits=GZIP_WBITS)
    return bytes(compressor.compress(data) + compressor.flush())


def _stored_array(data: bytes) -> tuple[NDArray[Any], nib.Nifti1Header]:
    """The voxels as stored, before slope and intercept, in the file's axis order, and the header."""
    is_gzip = data[:2] == GZIP_MAGIC
    header = _header(_inflate(data, HEADER_BYTES, to_end=False) if is_gzip else data[:HEADER_BYTES])
    shape = tuple(int(n) for n in header.get_data_shape())
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3:
        raise StudyError(Reason.NOT_CT, f"{len(shape)} dimensions, expected 3")
    dtype = header.get_data_dtype()
    if dtype.kind not in "iuf":
        raise StudyError(
            Reason.NOT_CT, "voxels are colours or complex numbers, expected one real number each"
        )
    if min(shape) < 1:
        raise StudyError(
            Reason.TRUNCATED,
            f"the header says {shape} voxels, expected at least one along each axis",
        )
    try:
        start = int(header.get_data_offset())
    except (ValueError, OverflowError) as error:
        raise StudyError(
            Reason.UNREADABLE, "the header's offset of the voxels is no number"
        ) from error
    if 0 <= start < header.template_dtype.itemsize + EXTENSION_BYTES:
        raise StudyError(Reason.UNREADABLE, f"the voxels begin at byte {start}, within the header")
    num_voxels = shape[0] * shape[1] * shape[2]
    if num_voxels > MAX_VOXELS or start > MAX_VOXELS or start < 0:
        raise StudyError(
            Reason.TOO_LARGE,
            f"{num_voxels} voxels from byte {start}, expected at most {MAX_VOXELS}",
        )
    num_bytes = num_voxels * dtype.itemsize
    _check_bytes(num_voxels, dtype)
    if is_gzip and start + num_bytes > MAX_INFLATION * len(data):
        raise StudyError(
            Reason.TRUNCATED,
            f"{len(data)} compressed bytes, the header asks for {start + num_bytes}",
        )
    if max(shape) > MAX_SLICES:
        raise StudyError(
            Reason.TOO_LARGE, f"{max(shape)} voxels along an axis, expected at most {MAX_SLICES}"
        )
    plain = _inflate(data, start + num_bytes, to_end=True) if is_gzip else data
    if len(plain) < start + num_bytes:
        raise StudyError(
            Reason.TRUNCATED, f"{len(plain)} bytes, the header asks for {start + num_bytes}"
        )
    array = np.frombuffer(plain, dtype, num_voxels, start).reshape(shape, order="F")
    return array, header


def _check_bytes(num_voxels: int, dtype: np.dtype[Any]) -> None:
    limit = MAX_BYTES // dtype.itemsize
    if num_voxels > limit:
        raise StudyError(
            Reason.TOO_LARGE,
            f"{num_voxels} voxels of {dtype.itemsize} bytes, expected at most {limit}",
        )


def _header(head: bytes | bytearray) -> Any:
    for kind in (nib.Nifti1Header, nib.Nifti2Header):
        size = kind.template_dtype.itemsize
        if len(head) >= size and kind.may_contain_header(head[:size]):
            try:
                header = kind(head[:size], check=False)
                start = header["vox_offset"].copy()
                header["vox_offset"] = (
                    0  # passes: multiples of 16 are a wish of SPM's, the rest is checked where used
                )
                header.check_fix(
                    logger=SILENT, error_level=REPAIRED_LEVEL
                )  # what would be repaired is refused
                header["vox_offset"] = start
                if header["magic"].item() not in SINGLE_FILE_MAGIC:
                    raise StudyError(
                        Reason.UNREADABLE, "the header of a pair of files, expected a single file"
                    )
                return header
            except (HeaderDataError, ValueError, KeyError, OverflowError) as error:
                raise StudyError(
                    Reason.UNREADABLE, "the NIfTI header contradicts itself"
                ) from error
    raise StudyError(Reason.UNREADABLE, "the file does not begin with a NIfTI header")


def _inflate(data: bytes, num_bytes: int, *, to_end: bool) -> bytearray:
    """Inflate the first ``num_bytes``; with ``to_end`` go on to the end, member after member, keeping nothing of it.

    In pieces, so that no more than the stream and what is kept of it is in memory.
    """
    stream, view, at = isal_zlib.decompressobj(wbits=GZIP_WBITS), memoryview(data), 0
    kept, surplus = bytearray(), 0
    try:
        while to_end or len(kept) < num_bytes:
            if stream.eof:
                at -= len(stream.unused_data)
                if view[at : at + 2] != GZIP_MAGIC:
                    break
                stream = isal_zlib.decompressobj(wbits=GZIP_WBITS)
            pending: bytes | memoryview = stream.unconsumed_tail
            if not pending:
                pending = view[at : at + PIECE_BYTES]
                at += len(pending)
            more = stream.decompress(pending, PIECE_BYTES)
            room = num_bytes - len(kept)
            kept += more[:room]
            surplus += max(0, len(more) - room)
            if to_end and surplus > num_bytes:
                raise StudyError(
                    Reason.TOO_LARGE,
                    "the stream goes on for more than the volume again after its end",
                )
            if not more and not pending and not stream.eof:
                if not to_end:
                    break
                raise StudyError(Reason.TRUNCATED, "the gzip stream ends before its checksum")
    except IsalError as error:  # type: ignore[misc]
        raise StudyError(
            Reason.UNDECODABLE, "the gzip stream is damaged: bad data or checksum"
        ) from error
    return kept


def _affine(header: Any) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    """Index -> LPS mm from the header, and flags; only declared orientations count.

    Where sform and qform both stand and turn the patient differently by little, the sform counts and is flagged.

    Raises:
        StudyError: ``missing_position`` where neither sform nor qform is set, or they make no space;
            ``implausible_spacing`` if no CT has such voxels; ``orientation_conflict`` where the forms name other axes
            or other lengths.
    """
    if not int(header["sform_code"]) and not int(header["qform_code"]):
        raise StudyError(
            Reason.MISSING_POSITION, "neither sform nor qform is set, expected an orientation"
        )
    is_unit = _has_unit_quaternion(header)
    if not is_unit and not int(header["sform_code"]):
        raise StudyError(Reason.MISSING_POSITION, "the qform is not a unit quaternion")
    affine = np.asarray(header.get_best_affine(), np.float64)
    unit = _length_unit(header)
    if unit not in ("mm", "unknown"):
        raise StudyError(Reason.MISSING_POSITION, f"lengths are in {unit}, expected mm")
    if not _spans_space(affine):
        raise StudyError(
            Reason.MISSING_POSITION, "the affine does not span a space, expected three axes in mm"
        )
    _check_voxel_size(affine)
    return LPS_TO_RAS @ affine, _compare_forms(header, affine, is_unit=is_unit)


def _has_unit_quaternion(header: Any) -> bool:
    """Whether the qform is a unit quaternion; one a rounding error over unit length is brought back to it.

    b2 + c2 + d2 above 1 leaves no room for the first component, which the file does not hold.
    """
    names = ("quatern_b", "quatern_c", "quatern_d")
    quaternion = np.array([header[name] for name in names], np.float64)
    length = float(np.linalg.norm(quaternion))
    if not length <= MAX_QUATERNION_LENGTH:
        return False
    if length > 1:
        for name, value in zip(names, quaternion / length, strict=True):
            header[name] = value
    return True


def _spans_space(affine: NDArray[np.float64]) -> bool:
    """Whether the affine has three axes that lie in no plane, whatever their lengths."""
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or not lengths.all():
        return False
    return bool(abs(np.linalg.det(affine[:3, :3] / lengths)) > MIN_VOLUME_OF_AXES)


def _check_voxel_size(affine: NDArray[np.float64]) -> None:
    """Refuse voxels that no CT has; slices are axial here, whatever plane the file was made in."""
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    x, y, z = lengths[np.argsort(io_orientation(affine)[:, 0])]
    check_spacing((float(y), float(x)), float(z))


def _has_known_spacing(header: Any) -> bool:
    """Whether the voxel size is more than what a converter writes that knows none."""
    return _length_unit(header) != "unknown" or bool((header["pixdim"][1:4] != 1).any())


def _length_unit(header: Any) -> str:
    try:
        return str(header.get_xyzt_units()[0])
    except KeyError as error:
        raise StudyError(
            Reason.MISSING_POSITION, "the unit of lengths is none that there is"
        ) from error


def _compare_forms(header: Any, affine: NDArray[np.float64], *, is_unit: bool) -> tuple[str, ...]:
    """Flags for what the header says a second time; refuses where it says something else."""
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    nominal = np.abs(np.asarray(header["pixdim"][1:4], float))
    if not np.allclose(lengths, nominal, rtol=SPACING_RTOL):
        raise StudyError(
            Reason.ORIENTATION_CONFLICT,
            "the voxel size and the orientation of the header differ in length",
        )
    if not (int(header["sform_code"]) and int(header["qform_code"])):
        return ()
    if not is_unit:
        raise StudyError(
            Reason.ORIENTATION_CONFLICT, "the qform beside the sform is not a unit quaternion"
        )
    other = np.asarray(header.get_qform(), np.float64)
    if (io_orientation(other) != io_orientation(affine)).any():
        raise StudyError(
            Reason.ORIENTATION_CONFLICT, "sform and qform name different axes of the patient"
        )
    turned = (
        np.abs(
            other[:3, :3] / np.linalg.norm(other[:3, :3], axis=0) - affine[:3, :3] / lengths
        ).max()
        > AXIS_TOL
    )
    return (QcFlag.TWO_ORIENTATIONS,) if turned else ()


def _to_hu(array: NDArray[Any], header: Any) -> NDArray[Any]:
    slope_and_intercept = _slope_and_intercept(header)
    if slope_and_intercept is None:
        raise StudyError(Reason.MISSING_RESCALE, "slope or intercept is no number")
    dtype = _hu_dtype(array, *slope_and_intercept)
    _check_bytes(array.size, dtype)
    if array.dtype == dtype and slope_and_intercept == (1.0, 0.0):
        return array
    hu = np.empty(array.shape, dtype, order="F")
    for index in range(array.shape[2]):  # what is between takes more memory than both
        hu[:, :, index] = _rescaled(array[:, :, index], *slope_and_intercept, dtype)
    return hu


def _slope_and_intercept(header: Any) -> tuple[float, float] | None:
    """Return slope and intercept, 1 and 0 if none are set; None if they are no numbers."""
    if np.isinf(float(header["scl_slope"])) or np.isinf(float(header["scl_inter"])):
        return None
    try:
        slope, intercept = header.get_slope_inter()
    except HeaderDataError:
        return None
    return 1.0 if slope is None else float(slope), 0.0 if intercept is None else float(intercept)


def rescale(array: NDArray[Any], slope: float, intercept: float) -> NDArray[Any]:
    """Stored values to HU: int16 where slope, intercept and values are whole numbers that fit, else float32."""
    return _rescaled(array, slope, intercept, _hu_dtype(array, slope, intercept))


def _hu_dtype(array: NDArray[Any], slope: float, intercept: float) -> np.dtype[Any]:
    if array.dtype.kind in "iu" and slope.is_integer() and intercept.is_integer():
        low, high = (
            int(array.min()) * int(slope) + int(intercept),
            int(array.max()) * int(slope) + int(intercept),
        )
        if min(low, high) >= -32768 and max(low, high) <= 32767:
            return np.dtype(np.int16)
    return np.dtype(np.float32)


def _rescaled(
    array: NDArray[Any], slope: float, intercept: float, dtype: np.dtype[Any]
) -> NDArray[Any]:
    if dtype == np.int16:
        if array.dtype == np.int16 and slope == 1 and intercept == 0:
            return array
        wide = array.astype(np.int16 if array.dtype.itemsize == 1 else np.int32, copy=False)
        return (wide * int(slope) + int(intercept)).astype(np.int16, copy=False)
    with np.errstate(
        over="ignore"
    ):  # fill values of float64 become infinite, which is off the scale as well
        return array.astype(np.float32) * np.float32(slope) + np.float32(intercept)


def _is_label_map(array: NDArray[Any], slope: float, intercept: float) -> bool:
    """Whether the stored values are few whole numbers, none of them below 0 HU but fill values.

    A CT is told apart by its first voxel below 0 HU, mostly in its middle slice.
    """
    depth = array.shape[2]
    for index in (depth // 2, *range(depth)):
        slice_hu = rescale(array[:, :, index], slope, intercept)
        if ((slice_hu < 0) & on_scale(slice_hu)).any():
            return False
    labels = array if array.dtype.kind in "iu" else array[np.isfinite(array)]
    if not labels.size or (labels.dtype.kind == "f" and (np.rint(labels) != labels).any()):
        return False
    return _num_different(labels) <= MAX_LABELS


def _num_different(whole: NDArray[Any]) -> int:
    low, high = int(whole.min()), int(whole.max())
    if high - low > MAX_COUNTED:
        return len(np.unique(whole))
    return int(
        np.count_nonzero(np.bincount((whole - whole.min()).astype(np.uint16).ravel(order="K")))
    )


def check_hu(hu: NDArray[Any]) -> None:
    """Refuse values that cannot be HU: a chest has air and soft tissue, and nothing far outside the scale.

    Raises:
        StudyError: ``not_hu``.
    """
    sample = hu[:: max(1, len(hu) // 32)]
    if hu.dtype.kind == "f" and not all(np.isfinite(slice_hu).all() for slice_hu in hu):
        raise StudyError(Reason.NOT_HU, "some voxels are not numbers")
    low, high = float(sample.min()), float(sample.max())
    num_air = num_tissue = 0
    for slice_hu in sample:
        num_air += int(np.count_nonzero(slice_hu < AIR_BELOW_HU))
        num_tissue += int(np.count_nonzero((slice_hu > TISSUE_HU[0]) & (slice_hu < TISSUE_HU[1])))
    air, tissue = num_air / sample.size, num_tissue / sample.size
    if low < LOWEST_HU or high > HIGHEST_HU or air < MIN_AIR_SHARE or tissue < MIN_AIR_SHARE:
        raise StudyError(
            Reason.NOT_HU,
            f"values {low:.0f}..{high:.0f}, {air:.1%} air and {tissue:.1%} soft tissue; expected HU with 1 % of each",
        )
