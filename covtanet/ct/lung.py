"""Lungs and involvement by image processing; no learned model.

Thresholds alone lose exactly the lung that matters, the opaque part. So the aerated lung is closed lung by lung, and
whatever the network calls lesion within the chest cavity is lung as well (``measure_involvement``). Airways down to
the main bronchi are left out. Not covered: lobes, pleural effusion as such, a lung that shows no air in any slice.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage
from scipy.spatial import ConvexHull, QhullError

from covtanet.ct.volume import Volume
from covtanet.errors import StudyError

Mask = NDArray[np.bool_]

GRID_MM = 2.5
GRID_Z_MM = 2.5
AERATED_HU = -400
BODY_HU = -300
AIR_HU = -1000
PURE_AIR_HU = -920
PURE_AIR_CM2 = 0.6
CLOSING_MM = 12.0
CAVITY_MARGIN_MM = 3.0
CHEST_WALL_MM = 10.0
MIN_LUNG_CM2 = 20.0
PARTIAL_CM2 = 15.0
SECOND_LUNG_SHARE = 0.05


@dataclass(frozen=True, kw_only=True)
class Lungs:
    """Where lung is and where it may be. Masks are (z, y, x) bool on the volume's grid.

    lung_mask: both lungs, closed. cavity_mask: the chest cavity, within which a lesion is lung.
    is_partial: the field of view cuts the lungs.
    """

    lung_mask: Mask
    cavity_mask: Mask
    is_partial: bool


@dataclass(frozen=True, kw_only=True)
class Involvement:
    """Lesion and lung of one volume, as masks and as measurements; ``involvement`` is null where lungs are cut."""

    lesion_mask: Mask
    lung_mask: Mask
    lesion_volume_ml: float
    lung_volume_ml: float
    involvement: float | None


def measure_involvement(lungs: Lungs, lesion_mask: Mask, voxel_ml: float) -> Involvement:
    """Lesion volume inside the lung over lung volume. lesion_mask: (z, y, x) bool as predicted, anywhere."""
    lesion = lesion_mask & (lungs.lung_mask | lungs.cavity_mask)
    lung = lungs.lung_mask | lesion
    lesion_ml, lung_ml = (float(np.count_nonzero(mask)) * voxel_ml for mask in (lesion, lung))
    return Involvement(
        lesion_mask=lesion,
        lung_mask=lung,
        lesion_volume_ml=lesion_ml,
        lung_volume_ml=lung_ml,
        involvement=None if lungs.is_partial else lesion_ml / lung_ml,
    )


def find_lungs(volume: Volume) -> Lungs:
    """Segment both lungs.

    Works on a grid of about 2.5 mm and sharpens the outline at full
    resolution.

    Raises:
        StudyError: ``no_lung`` where no slice shows 20 cm2 of lung.
    """
    spacing = volume.spacing_mm
    step_z = max(1, round(GRID_Z_MM / spacing[0]))
    step = max(1, round(GRID_MM / spacing[1]))
    hu = _shrink(volume.hu[step_z // 2 :: step_z] if len(volume.hu) > step_z else volume.hu, step)
    grid_mm = (spacing[0] * step_z, spacing[1] * step, spacing[2] * step)
    pixel_cm2 = grid_mm[1] * grid_mm[2] / 100.0

    outside = _touching_border(hu < BODY_HU)
    aerated = (hu < AERATED_HU) & ~outside
    gas = _pure_air(aerated, hu, pixel_cm2)
    aerated &= ~gas
    lungs = _two_lungs(aerated)
    largest_cm2 = float(lungs.any(axis=0).sum(axis=(1, 2)).max()) * pixel_cm2
    if largest_cm2 < MIN_LUNG_CM2:
        raise StudyError("no_lung", f"no slice shows more than {largest_cm2:.0f} cm2 of lung, expected 20")
    closed = np.zeros_like(aerated)
    for lung in lungs:
        closed |= _close(lung, grid_mm)
    closed &= ~outside
    cavity = _cavity(closed, outside, grid_mm)
    # Lung that consolidation cut off from the rest; what hems gas is its rim, not lung.
    closed |= aerated & cavity & ~ndimage.binary_dilation(gas, structure=IN_PLANE, iterations=2)
    return Lungs(
        lung_mask=_sharpen(closed, volume, step_z, step),
        cavity_mask=_enlarge(cavity, volume.hu.shape, step_z, step),
        is_partial=_is_partial(closed, pixel_cm2),
    )


def _shrink(hu: NDArray[np.generic], step: int) -> NDArray[np.float32]:
    """Average blocks of step x step pixels; the margin that does not fill a block repeats the edge."""
    if step == 1:
        return hu.astype(np.float32)
    depth, height, width = hu.shape
    rows, columns = -(-height // step), -(-width // step)
    out = np.empty((depth, rows, columns), np.float32)
    pad = ((0, rows * step - height), (0, columns * step - width))
    for index, slice_hu in enumerate(hu):
        blocks = np.pad(slice_hu, pad, mode="edge").astype(np.float32).reshape(rows, step, columns, step)
        out[index] = blocks.mean(axis=(1, 3))
    return out


IN_PLANE = np.zeros((3, 3, 3), bool)
IN_PLANE[1] = [[0, 1, 0], [1, 1, 1], [0, 1, 0]]


def _touching_border(mask: Mask) -> Mask:
    """The part of a mask that is connected, within its slice, to the edge of the image."""
    labels, count = ndimage.label(mask, structure=IN_PLANE)
    is_outside = np.zeros(count + 1, bool)
    for edge in (labels[:, 0], labels[:, -1], labels[:, :, 0], labels[:, :, -1]):
        is_outside[np.unique(edge)] = True
    is_outside[0] = False
    return is_outside[labels]


def _pure_air(aerated: Mask, hu: NDArray[np.float32], pixel_cm2: float) -> Mask:
    """Trachea, main bronchi and gas in the bowel: solid spots nearer to air than to this patient's lung, and their rim.

    A bulla is such a spot too; within a lung, closing puts it back.
    """
    if not aerated.any():
        return aerated
    threshold = min((float(np.median(hu[aerated])) + AIR_HU) / 2, PURE_AIR_HU)
    core = ndimage.binary_opening(aerated & (hu < threshold), structure=IN_PLANE)
    labels, count = ndimage.label(core, structure=IN_PLANE)
    is_large = np.bincount(labels.ravel(), minlength=count + 1) * pixel_cm2 >= PURE_AIR_CM2
    is_large[0] = False
    return aerated & ndimage.binary_dilation(is_large[labels], structure=IN_PLANE, iterations=2)


def _two_lungs(aerated: Mask) -> Mask:
    """The lungs as (2, z, y, x): the two large pieces, or one large piece cut at its middle where they are joined."""
    labels, count = ndimage.label(aerated)
    if not count:
        return np.zeros((2, *aerated.shape), bool)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    sizes[0] = 0
    first, second = ([*np.argsort(sizes)[::-1][:2].tolist(), 0])[:2]
    if sizes[second] >= SECOND_LUNG_SHARE * sizes[first]:
        return np.stack([labels == first, labels == second])
    both = labels == first
    columns = np.flatnonzero(both.any(axis=(0, 1)))
    middle = (columns[0] + columns[-1] + 1) // 2
    is_right = np.arange(both.shape[2]) < middle
    return np.stack([both & is_right, both & ~is_right])


def _close(lung: Mask, grid_mm: tuple[float, float, float]) -> Mask:
    """Close one lung with a ball of 12 mm and fill the holes of its slices; works within its bounding box."""
    found = ndimage.find_objects(lung.view(np.uint8))
    if not found or found[0] is None:
        return lung
    box = found[0]
    pad = [int(np.ceil(CLOSING_MM / mm)) + 1 for mm in grid_mm]
    inner = np.pad(lung[box], [(n, n) for n in pad])
    grown = ndimage.distance_transform_edt(~inner, sampling=grid_mm) <= CLOSING_MM
    shrunk = ndimage.distance_transform_edt(grown, sampling=grid_mm) > CLOSING_MM
    filled = shrunk | inner
    filled |= ~filled & ~_touching_border(~filled)
    out = np.zeros_like(lung)
    out[box] = filled[tuple(slice(n, -n) for n in pad)]
    return out


def _cavity(closed: Mask, outside: Mask, grid_mm: tuple[float, float, float]) -> Mask:
    """The chest cavity: per slice the convex hull of the lungs and their mirror image, within the chest wall.

    The mirror image stands in for a lung that is opaque throughout a slice.
    """
    columns = np.flatnonzero(closed.any(axis=(0, 1)))
    shift = columns[0] + columns[-1]
    mirrored = np.zeros_like(closed)
    target = shift - np.arange(closed.shape[2])
    inside = (target >= 0) & (target < closed.shape[2])
    mirrored[:, :, np.flatnonzero(inside)] = closed[:, :, target[inside]]
    reach = max(1, round(CAVITY_MARGIN_MM * 2 / grid_mm[0]))
    spread = ndimage.maximum_filter1d((closed | mirrored).view(np.uint8), 2 * reach + 1, axis=0).astype(bool)
    hull = np.stack([_convex_hull(mask) for mask in spread])
    margin, wall = (max(1, round(mm / grid_mm[1])) for mm in (CAVITY_MARGIN_MM, CHEST_WALL_MM))
    hull = ndimage.binary_dilation(hull, structure=IN_PLANE, iterations=margin)
    hull &= ~ndimage.binary_dilation(outside, structure=IN_PLANE, iterations=wall)
    return hull | closed


def _convex_hull(slice_mask: Mask) -> Mask:
    rows = np.flatnonzero(slice_mask.any(axis=1))
    left, right = slice_mask[rows].argmax(axis=1), slice_mask.shape[1] - 1 - slice_mask[rows, ::-1].argmax(axis=1)
    points = np.unique(np.column_stack([np.tile(rows, 2), np.concatenate([left, right])]), axis=0)
    if len(points) < 3:
        return slice_mask
    try:
        corners = points[ConvexHull(points).vertices]
    except QhullError:  # all points on one line
        return slice_mask
    image = Image.new("1", (slice_mask.shape[1], slice_mask.shape[0]))
    ImageDraw.Draw(image).polygon([(int(x), int(y)) for y, x in corners], fill=1, outline=1)
    return np.asarray(image)


def _is_partial(closed: Mask, pixel_cm2: float) -> bool:
    """Whether lung of more than 15 cm2 lies in the first or last slice or on an edge of the image."""
    ends = max(np.count_nonzero(closed[0]), np.count_nonzero(closed[-1])) * pixel_cm2
    edges = (closed[:, 0], closed[:, -1], closed[:, :, 0], closed[:, :, -1])
    return bool(ends > PARTIAL_CM2 or any(edge.any() for edge in edges))


def _enlarge(mask: Mask, shape: tuple[int, ...], step_z: int, step: int) -> Mask:
    """Repeat the voxels of the working grid on the volume's grid."""
    z, y, x = (
        np.minimum(np.arange(n) // s, m - 1) for n, s, m in zip(shape, (step_z, step, step), mask.shape, strict=True)
    )
    return np.asarray(mask.take(z, axis=0).take(y, axis=1).take(x, axis=2))


def _sharpen(closed: Mask, volume: Volume, step_z: int, step: int) -> Mask:
    """Follow the aerated outline at full resolution within one voxel of the working grid."""
    core = ndimage.binary_erosion(closed, structure=IN_PLANE)
    reach = ndimage.binary_dilation(closed, structure=IN_PLANE)
    shape = volume.hu.shape
    aerated = volume.hu < AERATED_HU
    return _enlarge(core, shape, step_z, step) | (_enlarge(reach, shape, step_z, step) & aerated)
