"""The affine of a NIfTI header from its sform or qform, in LPS mm, and the voxel size.

The RAS frame of NIfTI exists only here and in ``covtanet.ct.nifti``, which writes it.
"""

from typing import Any

import numpy as np
from nibabel.orientations import io_orientation
from numpy.typing import NDArray

from covtanet.ct.volume import LPS_TO_RAS, check_spacing
from covtanet.errors import QcFlag, Reason, StudyError

Affine = NDArray[np.float64]

SPACING_RTOL = 0.01
# Difference of direction cosines between sform and qform that rounding explains: about a degree.
AXIS_ATOL = 0.02
# Components of 3 decimals are up to 0.0013 over unit length; a rotation that is off by half a
# degree is within this limit, too.
MAX_QUATERNION_LENGTH = 1.005
MIN_VOLUME_OF_AXES = 1e-6


def read_affine(header: Any) -> tuple[Affine, tuple[QcFlag, ...]]:
    """Return index -> LPS mm from the header, and flags; only declared orientations count.

    If sform and qform are both set and differ by a small rotation, the sform counts and the series
    gets the flag ``two_orientations``.

    Raises:
        StudyError: ``missing_position`` if neither sform nor qform is set, or they span no space;
            ``implausible_spacing`` if no CT has such voxels; ``orientation_conflict`` if the forms
            name different axes or lengths.
    """
    has_sform, has_qform = _declared_forms(header)
    if not has_sform and not has_qform:
        raise StudyError(
            Reason.MISSING_POSITION, "neither sform nor qform is set, expected an orientation"
        )
    is_unit = _normalize_quaternion(header)
    if not is_unit and not has_sform:
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


def has_known_spacing(header: Any) -> bool:
    """Return whether the voxel size is real; 1 x 1 x 1 without a unit is nominal.

    Converters write that if they do not know the voxel size.
    """
    return _length_unit(header) != "unknown" or bool((header["pixdim"][1:4] != 1).any())


def _declared_forms(header: Any) -> tuple[bool, bool]:
    return bool(int(header["sform_code"])), bool(int(header["qform_code"]))


def _normalize_quaternion(header: Any) -> bool:
    """Return whether the qform is a unit quaternion; correct, in place, a rounding error.

    b2 + c2 + d2 above 1 would leave no room for the first component, which the file does not hold.
    """
    names = ("quatern_b", "quatern_c", "quatern_d")
    quaternion = np.array([header[name] for name in names], np.float64)
    length = float(np.linalg.norm(quaternion))
    if not length <= MAX_QUATERNION_LENGTH:  # NaN included
        return False
    if length > 1:
        for name, value in zip(names, quaternion / length, strict=True):
            header[name] = value
    return True


def _spans_space(affine: Affine) -> bool:
    """Return whether the three axes do not lie in one plane, whatever their lengths."""
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or not lengths.all():
        return False
    return bool(abs(np.linalg.det(affine[:3, :3] / lengths)) > MIN_VOLUME_OF_AXES)


def _check_voxel_size(affine: Affine) -> None:
    """Refuse voxels that no CT has; slices are axial here, whatever plane the file was made in."""
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    x, y, z = lengths[np.argsort(io_orientation(affine)[:, 0])]
    check_spacing((float(y), float(x)), float(z))


def _length_unit(header: Any) -> str:
    try:
        return str(header.get_xyzt_units()[0])
    except KeyError as error:
        raise StudyError(Reason.MISSING_POSITION, "the unit of lengths is unknown") from error


def _compare_forms(header: Any, affine: Affine, *, is_unit: bool) -> tuple[QcFlag, ...]:
    """Compare the parts of the header that say the same thing twice.

    affine: index -> RAS mm, from the sform if there is one.
    """
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    nominal = np.abs(np.asarray(header["pixdim"][1:4], float))
    if not np.allclose(lengths, nominal, rtol=SPACING_RTOL):
        raise StudyError(
            Reason.ORIENTATION_CONFLICT,
            "the voxel size and the orientation of the header differ in length",
        )
    if not all(_declared_forms(header)):
        return ()
    if not is_unit:
        raise StudyError(
            Reason.ORIENTATION_CONFLICT, "the qform beside the sform is not a unit quaternion"
        )
    qform = np.asarray(header.get_qform(), np.float64)
    if (io_orientation(qform) != io_orientation(affine)).any():
        raise StudyError(
            Reason.ORIENTATION_CONFLICT, "sform and qform name different axes of the patient"
        )
    qform_axes = qform[:3, :3] / np.linalg.norm(qform[:3, :3], axis=0)
    is_turned = np.abs(qform_axes - affine[:3, :3] / lengths).max() > AXIS_ATOL
    return (QcFlag.TWO_ORIENTATIONS,) if is_turned else ()
