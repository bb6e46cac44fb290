"""NIfTI-1 and -2, plain or gzipped, to a Volume in HU, and masks back to NIfTI.

Not covered: images in pairs (.hdr/.img), more than three dimensions.
"""

from dataclasses import replace
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from covtanet.ct import limits
from covtanet.ct.fill import is_on_scale, replace_fill
from covtanet.ct.gzip_stream import compress
from covtanet.ct.hounsfield import check_hu, hu_dtype, rescale, rescale_to
from covtanet.ct.masks import span
from covtanet.ct.nifti_affine import has_known_spacing, read_affine
from covtanet.ct.nifti_file import check_num_bytes, read_header, read_stored, slope_and_intercept
from covtanet.ct.volume import LPS_TO_RAS, SourceGrid, Volume, canonical_volume
from covtanet.errors import QcFlag, Reason, StudyError

# A CT has thousands of values; a label map has one for each class.
MAX_LABELS = 64
# Up to here, counting every value is ten times as fast as sorting.
MAX_COUNTED = 65535


def read(data: bytes) -> Volume:
    """Read one NIfTI file.

    data: the file's bytes. A gzip stream is read to its end, so that its checksum counts.

    Raises:
        StudyError: ``unreadable``, ``label_map``, ``not_ct``, ``truncated``, ``undecodable``,
            ``missing_position``, ``implausible_spacing``, ``missing_rescale``,
            ``orientation_conflict``, ``gantry_tilt``, ``not_hu``, ``too_few_slices`` or
            ``too_large``.
    """
    stored, header = read_stored(data)
    # Once there are HU, neither the file nor its voxels are needed, and each may take 1 GiB.
    del data
    slope, intercept = slope_and_intercept(header) or (1.0, 0.0)
    if _is_label_map(stored, slope, intercept):
        raise StudyError(
            Reason.LABEL_MAP,
            f"at most {MAX_LABELS} different values, none below 0: a label map, expected HU",
        )
    affine, flags = read_affine(header)
    volume = canonical_volume(_to_hu(stored, header), affine)
    del stored
    hu, is_padded = replace_fill(volume.hu)
    if is_padded:
        flags = (*flags, QcFlag.PADDING)
    check_hu(hu)
    if len(hu) < limits.MIN_SLICES:
        raise StudyError(
            Reason.TOO_FEW_SLICES,
            f"{len(hu)} axial slices, expected at least {limits.MIN_SLICES}",
        )
    return replace(
        volume,
        hu=hu,
        qc_flags=(*volume.qc_flags, *flags),
        has_known_spacing=has_known_spacing(header),
    )


def read_labels(data: bytes) -> NDArray[np.uint16]:
    """Read a label map or mask as (z, y, x), in the frame of ``read``.

    Raises:
        StudyError: as ``read`` does.
    """
    stored, header = read_stored(data)
    affine, _ = read_affine(header)
    return canonical_volume(stored.astype(np.uint16), affine).hu


def read_grey8(data: bytes) -> Volume:
    """Read a volume of grey values 0..255, windowed at its source, as if they were HU.

    Raises:
        StudyError: ``not_grey8`` for values outside 0..255, else as ``read`` does.
    """
    stored, header = read_stored(data)
    values = _to_hu(stored, header)
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 255 and high > 1):
        raise StudyError(
            Reason.NOT_GREY8, f"values {low:.0f}..{high:.0f}, expected grey values 0..255"
        )
    affine, _ = read_affine(header)
    volume = canonical_volume(values, affine)
    return replace(volume, has_known_spacing=has_known_spacing(header))


def has_spacing(data: bytes) -> bool:
    """Return whether a file knows its voxel size; 1 x 1 x 1 without a unit is nominal."""
    return has_known_spacing(read_header(data))


def write(array: NDArray[Any], grid: SourceGrid) -> bytes:
    """Return a (z, y, x) mask or volume as .nii.gz in the grid and axis order of its source."""
    stored = grid.from_canonical(array)
    if stored.dtype == bool:
        stored = stored.view(np.uint8)
    image = nib.Nifti1Image(_first_axis_fastest(stored), LPS_TO_RAS @ grid.affine)
    image.header.set_xyzt_units("mm")
    return compress(image.to_bytes())


def _first_axis_fastest(array: NDArray[Any]) -> NDArray[Any]:
    """Return an array in the order in memory that a file has.

    Plane by plane along the slowest axis: nibabel and ``np.asfortranarray`` go along the file's
    order instead, and take five times as long for a series whose slices are the first axis.
    """
    if array.flags.f_contiguous:
        return array
    ordered = np.zeros(array.shape, array.dtype, order="F")
    slowest = int(np.argmax(np.abs(array.strides)))
    planes = np.moveaxis(array, slowest, 0)
    # Of a mask, only the box around it is copied.
    is_used = np.asarray(planes.any(axis=0))
    box = (span(np.asarray(is_used.any(axis=1))), span(np.asarray(is_used.any(axis=0))))
    for ordered_plane, plane in zip(np.moveaxis(ordered, slowest, 0), planes, strict=True):
        ordered_plane[box] = plane[box]
    return ordered


def _to_hu(stored: NDArray[Any], header: Any) -> NDArray[Any]:
    rescaling = slope_and_intercept(header)
    if rescaling is None:
        raise StudyError(Reason.MISSING_RESCALE, "slope or intercept is NaN or infinite")
    dtype = hu_dtype(stored, *rescaling)
    check_num_bytes(stored.size, dtype)
    if stored.dtype == dtype and rescaling == (1.0, 0.0):
        return stored
    hu = np.empty(stored.shape, dtype, order="F")
    # Slice by slice: the arrays between take more memory than stored values and HU together.
    for index in range(stored.shape[2]):
        hu[:, :, index] = rescale_to(stored[:, :, index], *rescaling, dtype)
    return hu


def _is_label_map(stored: NDArray[Any], slope: float, intercept: float) -> bool:
    """Return whether the values are few whole numbers, with only fill values below 0 HU.

    The middle slice comes first: in a CT it mostly holds a voxel below 0 HU, which settles it.
    """
    depth = stored.shape[2]
    for index in (depth // 2, *range(depth)):
        slice_hu = rescale(stored[:, :, index], slope, intercept)
        if ((slice_hu < 0) & is_on_scale(slice_hu)).any():
            return False
    labels = stored if stored.dtype.kind in "iu" else stored[np.isfinite(stored)]
    if not labels.size or (labels.dtype.kind == "f" and (np.rint(labels) != labels).any()):
        return False
    return _count_distinct(labels) <= MAX_LABELS


def _count_distinct(whole: NDArray[Any]) -> int:
    """Count the different values of an array of whole numbers."""
    low, high = int(whole.min()), int(whole.max())
    if high - low > MAX_COUNTED:
        return len(np.unique(whole))
    above_low = (whole - whole.min()).astype(np.uint16)
    return int(np.count_nonzero(np.bincount(above_low.ravel(order="K"))))
