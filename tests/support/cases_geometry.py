"""Cases of planes and voxels: reformats, pixels not square, rounded numbers, voxel sizes."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
from chests import (
    chest,
    datasets,
    lung_ml,
    nifti_gz,
    nifti_image,
    plane_datasets,
    rotation,
    save,
    scaled,
    stretched,
    true_aspect,
    write,
)
from numpy.typing import NDArray
from right_rows import Case, Right, Row, refused, sound

# 01, 03: reformats and pixels that are not square

FINE = partial(chest, num_slices=90, slice_mm=3.0)


def reformat(
    folder: Path,
    name: str,
    *,
    plane: str,
    turn_deg: float = 0.0,
    says: str = "REFORMATTED",
) -> Right:
    """Write a coronal or sagittal reformat of slices 7.5 mm apart, the patient's head up."""
    phantom = FINE()
    hu, origin = phantom.hu, phantom.affine[:3, 3] + [0, 0, 3.0 * 89]
    if plane == "coronal":
        slices = hu.reshape(90, 48, 2, 96).mean(axis=2).transpose(1, 0, 2)[:, ::-1]
        columns, step = np.array([1.0, 0, 0]), np.array([0, 7.5, 0])
    else:
        slices = hu.reshape(90, 96, 48, 2).mean(axis=3).transpose(2, 0, 1)[:, ::-1]
        columns, step = np.array([0, 1.0, 0]), np.array([7.5, 0, 0])
    # Of two slices that make one, the middle lies half a slice behind the first.
    start = origin + step / 4
    turn = rotation(np.array([0, 0, 1.0]), turn_deg)
    cosines = [*(turn @ columns), 0.0, 0.0, -1.0]
    series = plane_datasets(
        name,
        slices,
        origin=turn @ start,
        cosines=cosines,
        pixel_mm=(3.0, 3.75),
        step_mm=turn @ step,
    )
    for dataset in series:
        image_type = ["DERIVED", "SECONDARY", says]
        dataset.ImageType = image_type if says else ["ORIGINAL", "PRIMARY", "AXIAL"]
    save(folder, series)
    spacing = (3.0, 7.5, 3.75) if plane == "coronal" else (3.0, 3.75, 7.5)
    row = sound(
        phantom,
        "reformatted",
        spacing_mm=spacing,
        optional=("oblique",) if turn_deg else (),
    )
    return Right(rows=(row,), aspect=true_aspect(phantom))


def not_square(
    folder: Path,
    name: str,
    *,
    axis: int,
    factor: float,
    as_nifti: bool = False,
) -> Right:
    """Write pixels that are longer along rows (axis 1) or columns (axis 2)."""
    phantom = stretched(chest(), axis, factor)
    if as_nifti:
        write(folder, {"ct.nii.gz": nifti_gz(phantom)})
    else:
        save(folder, datasets(name, phantom))
    spacing = [11.0, 3.75, 3.75]
    spacing[axis] *= factor
    row = Row(lung_ml=lung_ml(chest()), spacing_mm=(spacing[0], spacing[1], spacing[2]))
    return Right(rows=(row,), hu=phantom.hu, aspect=true_aspect(chest()))


# 04, 05, 33: positions and cosines


def rounded_cosines(folder: Path, name: str, *, seed: int, decimals: int) -> Right:
    """Write a stack that is turned a little about some axis, its direction cosines rounded."""
    rng = np.random.default_rng(seed)
    turn = rotation(rng.standard_normal(3), float(rng.uniform(1, 12)))
    phantom = chest()
    columns, rows = turn[:, 0], turn[:, 1]
    origin, step = turn @ phantom.affine[:3, 3], turn[:, 2] * 11.0
    series = plane_datasets(
        name,
        phantom.hu,
        origin=origin,
        cosines=[*columns, *rows],
        pixel_mm=(3.75, 3.75),
        step_mm=step,
    )
    for dataset in series:
        dataset.ImageOrientationPatient = [f"{cosine:.{decimals}f}" for cosine in (*columns, *rows)]
    save(folder, series)
    row = sound(spacing_mm=(11.0, 3.75, 3.75), optional=("oblique",))
    return Right(rows=(row,), hu=phantom.hu)


def rounded_positions(folder: Path, name: str, *, slice_mm: float, decimals: int) -> Right:
    phantom = chest(80, 96, 4.5, slice_mm)
    series = datasets(name, phantom)
    for dataset in series:
        position = [float(mm) for mm in dataset.ImagePositionPatient]
        dataset.ImagePositionPatient = [f"{mm:.{decimals}f}" for mm in position]
    save(folder, series)
    # Over the whole stack the rounded positions give the distance to a thousandth.
    return Right(rows=(sound(phantom, spacing_mm=(slice_mm, 4.5, 4.5)),), hu=phantom.hu)


def moved(
    folder: Path,
    name: str,
    *,
    offsets: Callable[[int], NDArray[np.float64]],
    row: Row,
) -> Right:
    """Write slices moved along the stack. offsets: of so many slices, in mm."""
    series = datasets(name)
    for dataset, offset in zip(series, offsets(len(series)), strict=True):
        x, y, z = dataset.ImagePositionPatient
        dataset.ImagePositionPatient = [x, y, f"{float(z) + offset:.4f}"]
    save(folder, series)
    return Right(rows=(row,))


def jitter(count: int, *, share: float) -> NDArray[np.float64]:
    """Offsets that waver around the grid by a share of the slice distance."""
    return np.random.default_rng(3).uniform(-share, share, count) * 11.0


def drift(count: int) -> NDArray[np.float64]:
    """Distances of 11.33 mm, then 10.67 mm: no gap is 5 % off, yet the middle lies 4 mm off."""
    steps = np.where(np.arange(count - 1) < (count - 1) // 2, 0.33, -0.33)
    return np.concatenate([[0.0], np.cumsum(steps)])


def one_off(count: int) -> NDArray[np.float64]:
    """One slice 3 mm off its place."""
    return np.where(np.arange(count) == count // 2, 3.0, 0.0)


# 29, 49: voxel sizes


def sized(
    folder: Path,
    name: str,
    *,
    factors: Sequence[float],
    rows: tuple[Row, ...],
    as_dicom: bool = False,
) -> Right:
    """Write a chest in another size. factors: one, or those of z, y and x."""
    phantom = scaled(chest(), *factors)
    if as_dicom:
        save(folder, datasets(name, phantom))
    else:
        image = nifti_image(phantom)
        write(folder, {"ct.nii": image.to_bytes()})
    return Right(rows=rows)


def far_apart(folder: Path, name: str) -> Right:
    """Write slices 18 mm apart, which is coarse but no fault."""
    phantom = chest(96, 14, 3.75, 18.0)
    save(folder, datasets(name, phantom))
    return Right(rows=(sound(phantom, spacing_mm=(18.0, 3.75, 3.75), tolerance=0.15),))


def nominal(
    folder: Path,
    name: str,
    *,
    has_unit: bool,
    size: float,
    rows: tuple[Row, ...],
) -> Right:
    """Write voxels of ``size`` mm in all directions, with the unit mm or without one."""
    image = nifti_image(chest(), has_unit=has_unit)
    affine = np.diag([*np.sign(np.diag(image.affine)[:3]) * size, 1.0])
    unsure = nib.Nifti1Image(np.asarray(image.dataobj), affine)
    unsure.header["xyzt_units"] = 2 if has_unit else 0
    write(folder, {"ct.nii": unsure.to_bytes()})
    return Right(rows=rows)


def without_unit(folder: Path, name: str) -> Right:
    """Write true voxel sizes without a unit, which NIfTI readers take for millimetres."""
    write(folder, {"ct.nii": nifti_image(chest(), has_unit=False).to_bytes()})
    return Right(rows=(sound(),), hu=chest().hu)


def cases() -> Iterator[tuple[str, Case]]:
    """Yield all cases by their names."""
    for plane in ("coronal", "sagittal"):
        yield f"01_{plane}", partial(reformat, plane=plane)
        yield f"01_{plane}_by_its_plane_alone", partial(reformat, plane=plane, says="")
        yield f"01_{plane}_turned", partial(reformat, plane=plane, turn_deg=12.0)
    for axis, along in ((1, "rows"), (2, "columns")):
        for factor in (2.0, 1.25):
            yield f"03_{along}_{factor}", partial(not_square, axis=axis, factor=factor)
        yield f"03_nifti_{along}", partial(not_square, axis=axis, factor=2.0, as_nifti=True)
    for seed in range(6):
        yield f"04_cosines_of_3_decimals_{seed}", partial(rounded_cosines, seed=seed, decimals=3)
    for decimals in (4, 5):
        yield (
            f"04_cosines_of_{decimals}_decimals",
            partial(rounded_cosines, seed=9, decimals=decimals),
        )
    for slice_mm in (0.5, 0.6, 0.625, 1.25):
        yield (
            f"05_positions_of_1_decimal_{slice_mm}",
            partial(rounded_positions, slice_mm=slice_mm, decimals=1),
        )
    yield "05_positions_of_2_decimals_0.625", partial(rounded_positions, slice_mm=0.625, decimals=2)
    for share in (0.01, 0.04):
        yield (
            f"33_jitter_{share}",
            partial(moved, offsets=partial(jitter, share=share), row=sound()),
        )
    irregular = refused("irregular_spacing")
    yield "33_jitter_0.3", partial(moved, offsets=partial(jitter, share=0.3), row=irregular)
    yield "33_drift", partial(moved, offsets=drift, row=irregular)
    yield "33_one_slice_off", partial(moved, offsets=one_off, row=irregular)
    yield from _sizes()


def _sizes() -> Iterator[tuple[str, Case]]:
    implausible = (refused("implausible_spacing"),)
    for kind, factors in {
        "metres": (1000.0,),
        "micrometres": (0.001,),
        "25_mm_between_slices": (25 / 11, 1.0, 1.0),
        "0.05_mm_between_slices": (0.05 / 11, 1.0, 1.0),
        "12_mm_in_plane": (1.0, 12 / 3.75, 12 / 3.75),
        "0.05_mm_in_plane": (1.0, 0.05 / 3.75, 0.05 / 3.75),
    }.items():
        yield f"29_{kind}", partial(sized, factors=factors, rows=implausible)
        yield f"29_{kind}_dicom", partial(sized, factors=factors, rows=implausible, as_dicom=True)
    yield "29_18_mm_between_slices", far_apart
    # 13.7 litres of lung in voxels of 5.9 x 5.9 x 17 mm; 28 ml in voxels of 0.75 x 0.75 x 2.2 mm.
    yield "29_giant", partial(sized, factors=(1.57,), rows=(Row(flags=("implausible_lungs",)),))
    yield (
        "29_dwarf",
        partial(
            sized,
            factors=(0.2,),
            rows=(Row(flags=("implausible_lungs",)), refused("no_lung")),
        ),
    )
    unknown = (Row(flags=("unknown_spacing",)),)
    yield "49_voxels_of_1_without_unit", partial(nominal, has_unit=False, size=1.0, rows=unknown)
    known = (Row(optional=("implausible_lungs",)), refused("no_lung"))
    yield "49_voxels_of_1_mm", partial(nominal, has_unit=True, size=1.0, rows=known)
    yield "49_no_unit", without_unit
