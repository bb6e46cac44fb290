"""Cases of what the image shows: no air outside, cut lungs, children, noise, blank slices."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from chests import (
    chest,
    cropped,
    datasets,
    nifti_gz,
    pixels,
    rotation,
    round_field,
    save,
    save_field,
    scaled,
    set_pixels,
    write,
)
from right_rows import Case, Right, Row, refused, sound
from scipy import ndimage

# 12, 50: NIfTI with something else than air outside


def filled(folder: Path, name: str, *, value: int) -> Right:
    """Write a volume whose corners were filled, as resampling does."""
    hu = chest().hu.copy()
    hu[:, round_field(chest(), 172.0)] = value
    write(folder, {"ct.nii.gz": nifti_gz(replace(chest(), hu=hu))})
    row = sound(optional=("padding",))
    # Corners brighter than any bone may also be refused as no HU.
    return Right(rows=(row, refused("not_hu")) if value > 3000 else (row,))


def turned(folder: Path, name: str, *, plane: tuple[int, int], degrees: float, value: int) -> Right:
    """Write a volume resampled at an angle, its new corners filled."""
    phantom = chest()
    mm = np.linalg.norm(phantom.affine[:3, :3], axis=0)
    axis = np.zeros(3)
    axis[({0, 1, 2} - set(plane)).pop()] = 1
    matrix = np.diag(1 / mm) @ rotation(axis, degrees) @ np.diag(mm)
    middle = (np.array(phantom.hu.shape) - 1) / 2
    hu = ndimage.affine_transform(
        phantom.hu.astype(np.float32),
        matrix,
        middle - matrix @ middle,
        order=1,
        cval=float(value),
    )
    write(folder, {"ct.nii.gz": nifti_gz(replace(phantom, hu=np.rint(hu).astype(np.int16)))})
    return Right(rows=(sound(optional=("padding",)),))


def with_couch(folder: Path, name: str, *, as_dicom: bool) -> Right:
    """Write a patient on a couch: a shell of 0 HU around closed air, below the body."""
    hu = chest().hu.copy()
    hu[:, 82:94, 8:88] = 0
    hu[:, 84:92, 10:86] = -990
    phantom = replace(chest(), hu=hu)
    if as_dicom:
        save(folder, datasets(name, phantom))
    else:
        write(folder, {"ct.nii.gz": nifti_gz(phantom)})
    return Right(rows=(sound(),))


def in_a_tube(folder: Path, name: str) -> Right:
    """Write a patient within a closed ring, as of an incubator, with all air within it."""
    hu = chest().hu.copy()
    ring = round_field(chest(), 168.0) & ~round_field(chest(), 176.0)
    hu[:, ring & (hu[12] < -500)] = 0
    write(folder, {"ct.nii.gz": nifti_gz(replace(chest(), hu=hu))})
    return Right(rows=(sound(),))


def framed(folder: Path, name: str, *, value: int, width_px: int = 1) -> Right:
    """Write slices with a frame of one value around them."""
    hu = np.full_like(chest().hu, value)
    inner = np.s_[:, width_px:-width_px, width_px:-width_px]
    hu[inner] = chest().hu[inner]
    write(folder, {"ct.nii.gz": nifti_gz(replace(chest(), hu=hu))})
    return Right(rows=(sound(optional=("padding",)),))


# 30, 31: noise and children


def noisy(folder: Path, name: str) -> Right:
    """Write the noise of a sharp kernel."""
    hu = chest().hu + np.random.default_rng(3).normal(0, 100, chest().hu.shape)
    noisy_hu = np.clip(np.rint(hu), -1024, 3071).astype(np.int16)
    write(folder, {"ct.nii.gz": nifti_gz(replace(chest(), hu=noisy_hu))})
    return Right(rows=(sound(),))


def child(folder: Path, name: str, *, size: float, as_dicom: bool = False) -> Right:
    """Write a chest of a child. size: of an adult's, as a share."""
    phantom = scaled(chest(), size)
    if as_dicom:
        save(folder, datasets(name, phantom))
    else:
        write(folder, {"ct.nii.gz": nifti_gz(phantom)})
    return Right(rows=(sound(phantom, tolerance=0.15),))


def adult_without_lungs(folder: Path, name: str) -> Right:
    """Write an adult in whom no slice shows more than 15 cm2 of lung."""
    phantom = chest()
    hu = phantom.hu.copy()
    hu[phantom.lung_mask] = 40
    hu[8:14, 44:52, 26:34] = -850
    write(folder, {"ct.nii.gz": nifti_gz(replace(phantom, hu=hu))})
    return Right(rows=(refused("no_lung"),))


# 36, 44: the field of view


def cut_field(folder: Path, name: str, *, side: str, share: float, as_nifti: bool = False) -> Right:
    """Write a field of view that lacks a share of the lungs' extent on a side."""
    phantom = chest()
    axis = {"left": 2, "right": 2, "front": 1, "back": 1, "top": 0, "base": 0}[side]
    others = tuple(other for other in range(3) if other != axis)
    extent = np.flatnonzero(phantom.lung_mask.any(axis=others))
    lost = max(1, round(share * len(extent)))
    start, stop = 0, phantom.hu.shape[axis]
    if side in ("right", "front", "base"):
        start = int(extent[0]) + lost
    else:
        stop = int(extent[-1]) + 1 - lost
    save_field(folder, name, cropped(phantom, axis, start, stop), as_nifti=as_nifti)
    return Right(rows=(Row(flags=("partial_lungs",)),))


def cut_round(
    folder: Path,
    name: str,
    *,
    radius_mm: float,
    value: int,
    is_declared: bool = False,
) -> Right:
    """Write a round field of view whose edge runs through both lungs."""
    outside = round_field(chest(), radius_mm)
    series = datasets(name)
    for dataset in series:
        stored = pixels(dataset)
        stored[outside] = value
        set_pixels(dataset, stored)
        if is_declared:
            dataset.add_new("PixelPaddingValue", "SS", value)
    save(folder, series)
    return Right(rows=(Row(flags=("partial_lungs",), optional=("padding",)),))


def rib_to_rib(folder: Path, name: str, *, margin_px: int) -> Right:
    """Write a field of view that ends in the chest wall: no air outside, but whole lungs."""
    phantom = chest()
    for axis in (1, 2):
        extent = np.flatnonzero(phantom.lung_mask.any(axis=tuple({0, 1, 2} - {axis})))
        phantom = cropped(
            phantom,
            axis,
            int(extent[0]) - margin_px,
            int(extent[-1]) + 1 + margin_px,
        )
    save(folder, datasets(name, phantom))
    return Right(rows=(sound(),))


# 51: blank slices


def blank(
    folder: Path,
    name: str,
    *,
    slices: Sequence[int],
    hu: int,
    as_nifti: bool = False,
) -> Right:
    """Write slices of one value among the others, as a transfer leaves them that broke off."""
    values = chest().hu.copy()
    values[list(slices)] = hu
    save_field(folder, name, replace(chest(), hu=values), as_nifti=as_nifti)
    lung_slices = set(np.flatnonzero(chest().lung_mask.any(axis=(1, 2))).tolist())
    inside = tuple(sorted(lung_slices & set(slices)))
    row = Row(flags=("blank_slices",)) if inside else sound(optional=("padding",))
    return Right(rows=(replace(row, optional=("padding",)),), unsegmented=inside)


def cases() -> Iterator[tuple[str, Case]]:
    """Yield all cases by their names."""
    for value in (0, -1024, -2000, -32768, 3071):
        yield f"12_filled_with_{value}", partial(filled, value=value)
    for value in (0, -1024, -32768):
        yield (
            f"12_turned_in_plane_{value}",
            partial(turned, plane=(1, 2), degrees=12.0, value=value),
        )
    yield "12_tilted_0", partial(turned, plane=(0, 1), degrees=7.0, value=0)
    yield "12_couch", partial(with_couch, as_dicom=False)
    yield "12_couch_dicom", partial(with_couch, as_dicom=True)
    yield "12_closed_ring", in_a_tube
    yield "30_sharp_kernel_noise", noisy
    for size in (0.29, 0.35, 0.5, 0.7):
        yield f"31_child_{size}", partial(child, size=size)
    yield "31_child_dicom", partial(child, size=0.29, as_dicom=True)
    yield "31_adult_without_lungs", adult_without_lungs
    yield from _fields()
    for value in (0, 3071, -2000):
        yield f"50_frame_of_{value}", partial(framed, value=value)
    yield "50_frame_of_two_pixels", partial(framed, value=0, width_px=2)
    for hu in (-1024, 0, -1000):
        yield f"52_blank_slices_{hu}", partial(blank, slices=(10, 11, 15), hu=hu)
    yield "52_blank_slice_nifti", partial(blank, slices=(12,), hu=0, as_nifti=True)
    yield "52_blank_slices_nifti_filled", partial(blank, slices=(12, 13), hu=-32768, as_nifti=True)
    yield "52_blank_slices_outside_the_lungs", partial(blank, slices=(0, 23), hu=-1024)


def _fields() -> Iterator[tuple[str, Case]]:
    for side in ("left", "right", "front", "back"):
        for share in (0.04, 0.3):
            yield f"36_cut_{side}_{share}", partial(cut_field, side=side, share=share)
        yield f"36_cut_{side}_nifti", partial(cut_field, side=side, share=0.15, as_nifti=True)
    yield "36_one_lung", partial(cut_field, side="left", share=0.55)
    for side in ("top", "base"):
        yield f"36_cut_{side}", partial(cut_field, side=side, share=0.4)
    for value in (-2000, 0):
        yield f"36_round_field_{value}", partial(cut_round, radius_mm=109.0, value=value)
    yield (
        "36_round_field_declared",
        partial(cut_round, radius_mm=109.0, value=-2000, is_declared=True),
    )
    yield "36_round_field_wide", partial(cut_round, radius_mm=120.0, value=-2000)
    for margin_px in (2, 3, 4):
        yield f"44_rib_to_rib_{margin_px}", partial(rib_to_rib, margin_px=margin_px)
