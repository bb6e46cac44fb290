"""Cases of NIfTI files: odd but sound headers, types of voxels, tails and offsets."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from chests import (
    chest,
    nifti_gz,
    nifti_image,
    nifti_plain,
    write,
)
from numpy.typing import NDArray
from right_rows import Case, Right, refused, sound


def plain_nifti(folder: Path, name: str) -> Right:
    write(folder, {"ct.nii.gz": nifti_gz(chest())})
    return Right(rows=(sound(spacing_mm=(11.0, 3.75, 3.75)),), hu=chest().hu)


Change = Callable[[NDArray[Any]], NDArray[Any]]


# 26, 27: NIfTI that is odd but sound


def offset(folder: Path, name: str, *, voxels_at: int) -> Right:
    """Write foreign bytes between the header and the voxels."""
    data = bytearray(nifti_plain(chest()))
    data[108:112] = np.float32(voxels_at).tobytes()
    write(folder, {"ct.nii": bytes(data[:352]) + bytes(voxels_at - 352) + bytes(data[352:])})
    return Right(rows=(sound(),), hu=chest().hu)


def patched(folder: Path, name: str, *, changes: Sequence[tuple[int, NDArray[Any]]]) -> Right:
    """Write a volume with fields of its header overwritten. changes: offsets and their values."""
    data = bytearray(nifti_plain(chest()))
    for at, values in changes:
        data[at : at + values.nbytes] = values.tobytes()
    write(folder, {"ct.nii": bytes(data)})
    return Right(rows=(sound(),), hu=chest().hu)


def packed(folder: Path, name: str, *, file_name: str, tail: bytes = b"") -> Right:
    write(folder, {file_name: nifti_gz(chest()) + tail})
    return Right(rows=(sound(),), hu=chest().hu)


def stored_as(folder: Path, name: str, *, change: Change, intercept: float = 0) -> Right:
    """Write other stored values of the same HU."""
    image = nifti_image(chest(), change(chest().hu))
    if intercept:
        image.header.set_slope_inter(1, intercept)
    write(folder, {"ct.nii": image.to_bytes()})
    return Right(rows=(sound(),), hu=chest().hu)


def four_dimensions(folder: Path, name: str) -> Right:
    image = nifti_image(chest())
    array = np.asarray(image.dataobj)[..., None]
    whole = nib.Nifti1Image(array, image.affine, image.header)
    write(folder, {"ct.nii": whole.to_bytes()})
    return Right(rows=(sound(),), hu=chest().hu)


def with_extension(folder: Path, name: str) -> Right:
    image = nifti_image(chest())
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"x" * 1000))
    write(folder, {"ct.nii": image.to_bytes()})
    return Right(rows=(sound(),), hu=chest().hu)


def qform_alone(
    folder: Path,
    name: str,
    *,
    quaternion: Sequence[float] = (),
    flips: tuple[int, ...] = (),
) -> Right:
    """Write a qform alone. quaternion: b, c, d of the header. flips: axes stored backwards."""
    image = nifti_image(chest())
    array, affine = np.asarray(image.dataobj), image.affine.copy()
    for axis in flips:
        array = np.flip(array, axis)
        affine[:, 3] += affine[:, axis] * (array.shape[axis] - 1)
        affine[:, axis] *= -1
    turned_image = nib.Nifti1Image(np.ascontiguousarray(array), affine)
    turned_image.header.set_xyzt_units("mm")
    turned_image.set_qform(affine, 1)
    turned_image.set_sform(None, 0)
    data = bytearray(turned_image.to_bytes())
    if quaternion:
        data[256:268] = np.array(quaternion, "<f4").tobytes()
    write(folder, {"ct.nii": bytes(data)})
    return Right(rows=(sound(spacing_mm=(11.0, 3.75, 3.75)),), hu=chest().hu)


def few_grey_values(folder: Path, name: str) -> Right:
    """Write fewer than 64 stored values, none below 0, which an intercept of -1024 makes HU."""
    hu = (chest().hu // 64 * 64).astype(np.int32)
    image = nifti_image(chest(), (hu + 1024).astype(np.uint16))
    image.header.set_slope_inter(1, -1024)
    write(folder, {"ct.nii": image.to_bytes()})
    return Right(rows=(sound(),), hu=hu)


def label_map(folder: Path, name: str) -> Right:
    write(
        folder,
        {"mask.nii.gz": nifti_gz(replace(chest(), hu=chest().lung_mask.astype(np.int16) * 3))},
    )
    return Right(rows=(refused("label_map"),))


def cases() -> Iterator[tuple[str, Case]]:
    """Yield all cases by their names."""
    yield "00_nifti", plain_nifti
    for voxels_at in (352, 353, 356, 360, 1000, 4096):
        yield f"26_voxels_at_{voxels_at}", partial(offset, voxels_at=voxels_at)
    floats, short = partial(np.array, dtype="<f4"), partial(np.array, dtype="<i2")
    yield "27_sform_code_5", partial(patched, changes=[(254, short([5]))])
    yield "27_slope_nan", partial(patched, changes=[(112, floats([np.nan, np.nan]))])
    yield "27_slope_0", partial(patched, changes=[(112, floats([0, -500]))])
    yield (
        "27_qform_shifted",
        partial(patched, changes=[(252, short([1])), (268, floats([55, -20, 300]))]),
    )
    yield "27_capitals", partial(packed, file_name="GROSS.NII.GZ")
    yield "27_zeros_behind_gzip", partial(packed, file_name="ct.nii.gz", tail=bytes(512))
    yield "27_text_behind_gzip", partial(packed, file_name="ct.nii.gz", tail=b"trailing garbage")
    for dtype in ("int32", "int64", "float32", "float64"):
        yield f"27_{dtype}", partial(stored_as, change=partial(np.asarray, dtype=dtype))
    yield (
        "27_uint16",
        partial(
            stored_as,
            change=lambda hu: (hu.astype(int) + 1024).astype("uint16"),
            intercept=-1024,
        ),
    )
    yield "27_four_dimensions", four_dimensions
    yield "27_extension", with_extension
    yield "27_qform_alone", qform_alone
    flipped = partial(qform_alone, flips=(0, 1))
    for d in (1.0, 1.0000001, 1.000001):
        yield f"27_quaternion_{d}", partial(flipped, quaternion=(0.0, 0.0, d))
    yield "27_few_grey_values", few_grey_values
    yield "27_label_map", label_map
