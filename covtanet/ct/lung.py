"""Lungs and involvement by image processing; no learned model.

Thresholds alone lose exactly the lung that matters, the opaque part. So the aerated lung is closed lung by lung, and
whatever the network calls lesion within the chest cavity is lung as well (``measure_involvement``). Airways down to
the main bronchi are left out. Not covered: lobes, pleural effusion as such, a lung that shows no air in any slice.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from covtanet.ct.body import (
    AERATED_HU,
    AIR_HU,
    BODY_HU,
    IN_PLANE,
    SHELL_MM,
    SURELY_AIR_HU,
    SURELY_DENSE_HU,
    Mask,
    beside_unmeasured,
    blank_slices,
    convex_hull,
    diamond,
    find_outside,
    inside_body,
    rim,
    touching_border,
)
from covtanet.ct.volume import Volume
from covtanet.ct.window import pixel_aspect
from covtanet.errors import Reason, StudyError

GRID_MM = 2.5
GRID_Z_MM = 2.5
PURE_AIR_HU = -920
PURE_AIR_CM2 = 0.6
CLOSING_MM = 12.0
CAVITY_MARGIN_MM = 3.0
CHEST_WALL_MM = 10.0
MIN_LUNG_CM2 = 20.0
PARTIAL_CM2 = 15.0
SECOND_LUNG_SHARE = 0.05
# Of a lone lung's width, between the lung and the end of the image or of the body.
ROOM_FOR_A_LUNG, ROOM_FOR_LUNG_AND_WALL = 0.6, 1.0
CUT_TISSUE_SHARE = 0.3
CONTACT_CM2 = 2.0
LUNGS_ML = (50.0, 12000.0)
SMALL_BODY_CM2 = 200.0
# A series without a voxel size is measured as if its body were an adult's.
ADULT_BODY_CM2 = 650.0
ADULT_LUNG_HEIGHT_MM = 220.0
LUNG_SHARE_OF_BODY = 0.1
THINNEST_MM, THICKEST_MM = 0.5, 10.0
MAX_PIECES = 8
BODY_CHECK_SLICES = 9
# Chest walls that are as thin as shells are left out: much of a lung then has no tissue beside it.
IN_BODY_SHARE = 0.3


@dataclass(frozen=True, kw_only=True)
class Lungs:
    """Both lungs and the space that they may fill. Masks are (z, y, x) bool on the volume's grid.

    lung_mask: both lungs, closed. cavity_mask: the chest cavity, within which a lesion is lung.
    is_partial: the field of view cuts the lungs. has_blank_slices: slices between the first and the
    last of the lungs show nothing; both masks are empty there.
    """

    lung_mask: Mask
    cavity_mask: Mask
    is_partial: bool
    has_blank_slices: bool = False


@dataclass(frozen=True, kw_only=True)
class Involvement:
    """Lesion and lung of one volume, as masks and as measurements.

    Volumes are null if the voxel size is unknown. ``involvement`` is null if lungs are cut or
    ``is_implausible``: their volume is none that lungs have.
    """

    lesion_mask: Mask
    lung_mask: Mask
    lesion_volume_ml: float | None
    lung_volume_ml: float | None
    involvement: float | None
    is_implausible: bool = False


@dataclass(frozen=True, kw_only=True)
class _Scan:
    """A volume on the working grid, ``steps`` (z, y, x) voxels of the source to one of its own.

    hu: block averages. outside: room air and unmeasured; unmeasured: that alone.
    """

    hu: NDArray[np.float32]
    outside: Mask
    unmeasured: Mask
    steps: tuple[int, int, int]
    grid_mm: tuple[float, float, float]

    @property
    def pixel_cm2(self) -> float:
        return self.grid_mm[1] * self.grid_mm[2] / 100.0

    @property
    def body_cm2(self) -> float:
        """Area of the body in a slice that shows much of it; the largest may show a table as well."""
        areas = np.count_nonzero(~self.outside, axis=(1, 2))
        return float(np.percentile(areas, 90)) * self.pixel_cm2


def measure_involvement(lungs: Lungs, lesion_mask: Mask, voxel_ml: float | None) -> Involvement:
    """Measure the lesion inside the lung.

    lesion_mask: (z, y, x) bool as predicted, anywhere. voxel_ml: null if the voxel size is unknown;
    involvement is a ratio of voxel counts either way.
    """
    lesion = lesion_mask & (lungs.lung_mask | lungs.cavity_mask)
    lung = lungs.lung_mask | lesion
    num_lesion, num_lung = (int(np.count_nonzero(mask)) for mask in (lesion, lung))
    is_implausible = is_implausible_volume(lungs, num_lung, voxel_ml)
    return Involvement(
        lesion_mask=lesion,
        lung_mask=lung,
        lesion_volume_ml=None if voxel_ml is None else float(num_lesion) * voxel_ml,
        lung_volume_ml=None if voxel_ml is None else float(num_lung) * voxel_ml,
        involvement=None if lungs.is_partial or is_implausible else num_lesion / num_lung,
        is_implausible=is_implausible,
    )


def is_implausible_volume(lungs: Lungs, num_voxels: int, voxel_ml: float | None) -> bool:
    """Tell whether whole lungs of known voxel size measure outside 50 to 12,000 ml.

    Choice: a newborn has 90 ml, the largest lungs of adults about 10,000 ml.
    """
    if voxel_ml is None or lungs.is_partial:
        return False
    low, high = LUNGS_ML
    return bool(not low <= num_voxels * voxel_ml <= high)


def find_lungs(volume: Volume) -> Lungs:
    """Segment both lungs.

    Works on a grid of about 2.5 mm and sharpens the outline at full resolution.

    Choice: a body of less than 200 cm2 is enlarged to that size, so that every limit in mm or cm2
    shrinks with a small child. Without a voxel size the body is taken for an adult's of 650 cm2, with
    lungs of 220 mm height: each limit is then a share of the body.

    Raises:
        StudyError: ``no_lung`` if no slice shows 20 cm2 of lung.
    """
    sound = np.flatnonzero(~blank_slices(volume.hu))
    if not len(sound):
        raise StudyError(Reason.NO_LUNG, "every slice holds one value throughout, expected a chest")
    spacing_mm = volume.spacing_mm if volume.has_known_spacing else _adult_spacing(volume.hu, sound)
    scan = _scan(volume.hu, sound, spacing_mm)
    is_small = volume.has_known_spacing and 0 < scan.body_cm2 < SMALL_BODY_CM2
    enlarged = float(np.sqrt(SMALL_BODY_CM2 / scan.body_cm2)) if is_small else 1.0
    if is_small:
        z, y, x = (mm * enlarged for mm in spacing_mm)
        scan = _scan(volume.hu, sound, (z, y, x))

    aerated = (scan.hu < AERATED_HU) & ~scan.outside
    gas = _pure_air(aerated, scan)
    aerated &= ~gas
    pieces = _lung_pieces(aerated, scan)
    lungs = pieces if len(pieces) == 2 else _halves(pieces[0]) if pieces else []
    _check_lung_area(lungs, scan, enlarged, volume.has_known_spacing)
    closed = np.zeros_like(aerated)
    for lung in lungs:
        closed |= _close(lung, scan.grid_mm)
    closed &= ~scan.outside
    cavity = _cavity(closed, scan)
    # Lung that consolidation cut off from the rest; what hems gas is its rim, not lung.
    closed |= aerated & cavity & ~ndimage.binary_dilation(gas, structure=rim(scan.grid_mm))
    is_partial = _is_partial(closed, scan) or (len(pieces) == 1 and _lacks_a_lung(pieces[0], scan))
    return _on_source(volume, scan, sound, closed, cavity, is_partial)


def _on_source(
    volume: Volume,
    scan: _Scan,
    sound: NDArray[np.intp],
    closed: Mask,
    cavity: Mask,
    is_partial: bool,
) -> Lungs:
    """Bring the masks to the volume's grid; slices that show nothing have neither lung nor cavity."""
    lung_mask = _sharpen(closed, volume, scan.steps)
    cavity_mask = _enlarge(cavity, volume.hu.shape, scan.steps)
    has_blank = False
    if len(sound) < len(volume.hu):
        blank = np.setdiff1d(np.arange(len(volume.hu)), sound)
        lung_mask[blank], cavity_mask[blank] = False, False
        shown = np.flatnonzero(lung_mask.any(axis=(1, 2)))
        has_blank = bool(len(shown)) and bool(((blank > shown[0]) & (blank < shown[-1])).any())
    return Lungs(
        lung_mask=lung_mask,
        cavity_mask=cavity_mask,
        is_partial=is_partial,
        has_blank_slices=has_blank,
    )


def _scan(
    hu: NDArray[Any], sound: NDArray[np.intp], spacing_mm: tuple[float, float, float]
) -> _Scan:
    """Bring a volume to the working grid; a blank slice is replaced by the nearest sound one."""
    step_z = max(1, round(GRID_Z_MM / spacing_mm[0]))
    step_y, step_x = (max(1, round(GRID_MM / mm)) for mm in spacing_mm[1:])
    if pixel_aspect(spacing_mm) == 1:
        step_x = step_y
    steps = (step_z, step_y, step_x)
    wanted = np.arange(step_z // 2, len(hu), step_z) if len(hu) > step_z else np.arange(len(hu))
    if len(sound) < len(hu):
        wanted = _nearest(sound, wanted)
    z, y, x = (mm * step for mm, step in zip(spacing_mm, steps, strict=True))
    averages = _shrink(hu, wanted, step_y, step_x)
    samples = _samples(hu, wanted, averages.shape, step_y, step_x)
    outside, unmeasured = find_outside(averages, samples, (z, y, x))
    return _Scan(
        hu=averages, outside=outside, unmeasured=unmeasured, steps=steps, grid_mm=(z, y, x)
    )


def _nearest(sound: NDArray[np.intp], wanted: NDArray[np.intp]) -> NDArray[np.intp]:
    return np.asarray(sound[np.abs(wanted[:, None] - sound[None, :]).argmin(axis=1)])


def _adult_spacing(hu: NDArray[Any], sound: NDArray[np.intp]) -> tuple[float, float, float]:
    """Guess the voxel size of a series that does not know its own, from an adult's body and lungs."""
    wanted = sound[np.unique(np.linspace(0, len(sound) - 1, 64).astype(int))]
    step = max(1, max(hu.shape[1:]) // 128)
    averages = _shrink(hu, wanted, step, step)
    samples = _samples(hu, wanted, averages.shape, step, step)
    # As if the image were 350 mm wide; only limits of the outside depend on it.
    first_mm = 350.0 / averages.shape[2]
    outside, _ = find_outside(averages, samples, (GRID_Z_MM, first_mm, first_mm))
    body = np.count_nonzero(~outside, axis=(1, 2))
    pixel_mm = float(np.sqrt(100.0 * ADULT_BODY_CM2 / max(1.0, np.percentile(body, 90)))) / step
    aerated = np.count_nonzero((averages < AERATED_HU) & ~outside, axis=(1, 2))
    num_lung = (
        np.count_nonzero(aerated > LUNG_SHARE_OF_BODY * np.maximum(body, 1))
        * len(sound)
        / len(wanted)
    )
    slice_mm = float(np.clip(ADULT_LUNG_HEIGHT_MM / max(1.0, num_lung), THINNEST_MM, THICKEST_MM))
    return slice_mm, pixel_mm, pixel_mm


def _shrink(
    hu: NDArray[Any], wanted: NDArray[np.intp], step_y: int, step_x: int
) -> NDArray[np.float32]:
    """Average blocks of wanted slices; the margin that does not fill a block repeats the edge."""
    height, width = hu.shape[1:]
    rows, columns = -(-height // step_y), -(-width // step_x)
    out = np.empty((len(wanted), rows, columns), np.float32)
    pad = ((0, rows * step_y - height), (0, columns * step_x - width))
    is_whole = hu.dtype.kind == "i"
    for index, z in enumerate(wanted):
        slice_hu = hu[z] if pad == ((0, 0), (0, 0)) else np.pad(hu[z], pad, mode="edge")
        if is_whole:  # exact either way; this order is four times as fast
            sums = slice_hu.reshape(rows, step_y, -1).sum(axis=1, dtype=np.int32)
            sums = sums.reshape(rows, columns, step_x).sum(axis=2, dtype=np.int32)
            out[index] = sums.astype(np.float32) / np.float32(step_y * step_x)
        else:
            blocks = slice_hu.astype(np.float32).reshape(rows, step_y, columns, step_x)
            out[index] = blocks.mean(axis=(1, 3))
    return out


def _samples(
    hu: NDArray[Any], wanted: NDArray[np.intp], shape: tuple[int, ...], step_y: int, step_x: int
) -> NDArray[Any]:
    """Take the middle pixel of each block of ``_shrink``."""
    out = np.empty(shape, hu.dtype)
    rows = np.minimum(np.arange(shape[1]) * step_y + step_y // 2, hu.shape[1] - 1)
    columns = np.minimum(np.arange(shape[2]) * step_x + step_x // 2, hu.shape[2] - 1)
    for index, z in enumerate(wanted):
        out[index] = hu[z].take(rows, axis=0).take(columns, axis=1)
    return out


def _pure_air(aerated: Mask, scan: _Scan) -> Mask:
    """Return trachea, main bronchi and gas in the bowel, with their rim.

    They are solid spots nearer to air than to this patient's lung. A bulla is such a spot too; within
    a lung, closing puts it back.
    """
    if not aerated.any():
        return aerated
    median_hu = float(np.median(scan.hu[aerated]))
    is_dense = aerated & (scan.hu > SURELY_AIR_HU)
    if median_hu < SURELY_AIR_HU and is_dense.any():  # more room air than lung is left
        median_hu = float(np.median(scan.hu[is_dense]))
    threshold = min((median_hu + AIR_HU) / 2, PURE_AIR_HU)
    core = ndimage.binary_opening(aerated & (scan.hu < threshold), structure=IN_PLANE)
    labels, count = ndimage.label(core, structure=IN_PLANE)
    is_large = np.bincount(labels.ravel(), minlength=count + 1) * scan.pixel_cm2 >= PURE_AIR_CM2
    is_large[0] = False
    return aerated & ndimage.binary_dilation(is_large[labels], structure=rim(scan.grid_mm))


def _lung_pieces(aerated: Mask, scan: _Scan) -> list[Mask]:
    """Return the two largest pieces within the body, or one if the second is far smaller.

    An image that lies within a lung may show no body; then the largest piece counts if it is as
    dense as lung.
    """
    labels, count = ndimage.label(aerated)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    sizes[0] = 0
    pieces: list[Mask] = []
    least = 1.0
    order = np.argsort(sizes)[::-1][:MAX_PIECES]
    for label in order:
        if len(pieces) == 2 or sizes[label] < least:
            break
        piece = labels == label
        if _is_in_body(piece, scan):
            pieces.append(piece)
            least = max(least, SECOND_LUNG_SHARE * float(sizes[label]))
    largest = labels == order[0]
    if not pieces and sizes[order[0]] and float(np.median(scan.hu[largest])) > SURELY_DENSE_HU:
        pieces.append(largest)
    return pieces


def _is_in_body(piece: Mask, scan: _Scan) -> bool:
    """Tell lung from closed air beside the body, as in a table, by a few of its slices."""
    shown = np.flatnonzero(piece.any(axis=(1, 2)))
    checked = shown[np.unique(np.linspace(0, len(shown) - 1, BODY_CHECK_SLICES).astype(int))]
    inside = inside_body(scan.hu[checked], scan.unmeasured[checked], scan.grid_mm, SHELL_MM)
    return bool(
        np.count_nonzero(piece[checked] & inside)
        >= IN_BODY_SHARE * np.count_nonzero(piece[checked])
    )


def _halves(both: Mask) -> list[Mask]:
    """Cut a piece that holds both lungs at its middle."""
    columns = np.flatnonzero(both.any(axis=(0, 1)))
    middle = (columns[0] + columns[-1] + 1) // 2
    is_right = np.arange(both.shape[2]) < middle
    return [both & is_right, both & ~is_right]


def _check_lung_area(
    lungs: list[Mask], scan: _Scan, enlarged: float, has_known_spacing: bool
) -> None:
    areas = np.zeros(1) if not lungs else np.count_nonzero(lungs[0] | lungs[1], axis=(1, 2))
    largest_cm2 = float(areas.max()) * scan.pixel_cm2
    if largest_cm2 >= MIN_LUNG_CM2:
        return
    if not has_known_spacing:
        shown, expected = (100.0 * cm2 / ADULT_BODY_CM2 for cm2 in (largest_cm2, MIN_LUNG_CM2))
        raise StudyError(
            Reason.NO_LUNG,
            f"no slice shows more lung than {shown:.1f} % of the body, expected {expected:.0f} %",
        )
    shown, expected = (cm2 / enlarged**2 for cm2 in (largest_cm2, MIN_LUNG_CM2))
    raise StudyError(
        Reason.NO_LUNG, f"no slice shows more than {shown:.0f} cm2 of lung, expected {expected:.0f}"
    )


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
    filled |= ~filled & ~touching_border(~filled)
    out = np.zeros_like(lung)
    out[box] = filled[tuple(slice(n, -n) for n in pad)]
    return out


def _cavity(closed: Mask, scan: _Scan) -> Mask:
    """Return the chest cavity: per slice the hull of the lungs and their mirror image, less the chest wall.

    The mirror image stands in for a lung that is opaque throughout a slice.
    """
    columns = np.flatnonzero(closed.any(axis=(0, 1)))
    shift = columns[0] + columns[-1]
    mirrored = np.zeros_like(closed)
    target = shift - np.arange(closed.shape[2])
    inside = (target >= 0) & (target < closed.shape[2])
    mirrored[:, :, np.flatnonzero(inside)] = closed[:, :, target[inside]]
    reach = max(1, round(CAVITY_MARGIN_MM * 2 / scan.grid_mm[0]))
    spread = ndimage.maximum_filter1d(
        (closed | mirrored).view(np.uint8), 2 * reach + 1, axis=0
    ).astype(bool)
    hull = np.stack([convex_hull(mask) for mask in spread])
    hull = _dilate(hull, CAVITY_MARGIN_MM, scan)
    hull &= ~_dilate(scan.outside, CHEST_WALL_MM, scan)
    return hull | closed


def _dilate(mask: Mask, reach_mm: float, scan: _Scan) -> Mask:
    """Dilate within slices by a length in millimetres, at least one pixel along each axis."""
    reach_y, reach_x = (max(1, round(reach_mm / mm)) for mm in scan.grid_mm[1:])
    if reach_y == reach_x:  # a small element many times is faster
        return np.asarray(ndimage.binary_dilation(mask, structure=IN_PLANE, iterations=reach_y))
    return np.asarray(ndimage.binary_dilation(mask, structure=diamond([reach_y, reach_x])[None]))


def _is_partial(closed: Mask, scan: _Scan) -> bool:
    """Tell whether the field of view cuts the lungs.

    It does if more than 15 cm2 of lung lie in the first or last slice or under what was not
    measured, if lung reaches an edge of the image, or if it touches unmeasured pixels on 2 cm2.
    """
    ends = max(np.count_nonzero(closed[0]), np.count_nonzero(closed[-1])) * scan.pixel_cm2
    edges = (closed[:, 0], closed[:, -1], closed[:, :, 0], closed[:, :, -1])
    if ends > PARTIAL_CM2 or any(edge.any() for edge in edges):
        return True
    # A slice without a body is as good as unmeasured: of air with noise, at the end of a volume.
    empty = scan.unmeasured | scan.outside.all(axis=(1, 2), keepdims=True)
    above = np.count_nonzero(closed[:-1] & empty[1:], axis=(1, 2)).max(initial=0)
    below = np.count_nonzero(closed[1:] & empty[:-1], axis=(1, 2)).max(initial=0)
    if max(above, below) * scan.pixel_cm2 > PARTIAL_CM2:
        return True
    if not scan.unmeasured.any():
        return False
    contact = np.count_nonzero(closed & beside_unmeasured(scan.unmeasured, scan.hu))
    contact_cm2 = float(contact) * scan.grid_mm[0] * max(scan.grid_mm[1:]) / 100.0
    return contact_cm2 > CONTACT_CM2


def _lacks_a_lung(lone: Mask, scan: _Scan) -> bool:
    """Tell whether the other lung must lie beyond the image, as in a reconstruction of one lung.

    It does if the image ends in tissue at a side of the lone lung, and the body has no room for
    another lung on either.
    """
    rows, columns = (_span(np.asarray(lone.any(axis=axes))) for axes in ((0, 2), (0, 1)))
    width, depth = columns.stop - columns.start, rows.stop - rows.start
    if width * scan.grid_mm[2] >= depth * scan.grid_mm[1]:
        return False  # wider than deep: both lungs in one piece
    shown = np.asarray(lone.any(axis=(1, 2)))
    measured = ~scan.unmeasured[shown]
    end = measured & ~ndimage.binary_erosion(measured, structure=IN_PLANE)
    body = np.asarray((~scan.outside[shown, rows]).any(axis=1))
    is_cut = False
    for side in (slice(0, columns.start), slice(columns.stop, None)):
        values = scan.hu[shown][:, :, side][end[:, :, side]]
        is_cut_here = bool(len(values)) and bool((values >= BODY_HU).mean() >= CUT_TISSUE_SHARE)
        is_cut |= is_cut_here
        room = np.median(np.count_nonzero(body[:, side], axis=1))
        if room >= width * (ROOM_FOR_A_LUNG if is_cut_here else ROOM_FOR_LUNG_AND_WALL):
            return False
    return is_cut


def _enlarge(mask: Mask, shape: tuple[int, ...], steps: tuple[int, int, int]) -> Mask:
    """Repeat the voxels of the working grid on the volume's grid."""
    out = np.zeros(shape, bool)
    index_z, index_y, index_x = _nearest_voxels(mask.shape, shape, steps)
    rows = _span(np.asarray(mask.any(axis=(0, 2)))[index_y])
    columns = _span(np.asarray(mask.any(axis=(0, 1)))[index_x])
    for z, at in enumerate(index_z):
        out[z, rows, columns] = mask[at].take(index_y[rows], axis=0).take(index_x[columns], axis=1)
    return out


def _sharpen(closed: Mask, volume: Volume, steps: tuple[int, int, int]) -> Mask:
    """Follow the aerated outline at full resolution within one voxel of the working grid."""
    core = ndimage.binary_erosion(closed, structure=IN_PLANE)
    reach = ndimage.binary_dilation(closed, structure=IN_PLANE)
    out = _enlarge(reach, volume.hu.shape, steps)
    core = _enlarge(core, volume.hu.shape, steps)
    for slice_mask, slice_core, slice_hu in zip(out, core, volume.hu, strict=True):
        rows, columns = _span(slice_mask.any(axis=1)), _span(slice_mask.any(axis=0))
        inner = slice_mask[rows, columns]
        inner &= slice_core[rows, columns] | (slice_hu[rows, columns] < AERATED_HU)
    return out


def _nearest_voxels(
    grid: tuple[int, ...], shape: tuple[int, ...], steps: tuple[int, int, int]
) -> list[NDArray[np.intp]]:
    """Return the index on the working grid of each index of the source, by axis."""
    return [
        np.minimum(np.arange(n) // step, m - 1)
        for n, step, m in zip(shape, steps, grid, strict=True)
    ]


def _span(is_shown: Mask) -> slice:
    shown = np.flatnonzero(is_shown)
    return slice(int(shown[0]), int(shown[-1]) + 1) if len(shown) else slice(0, 0)
