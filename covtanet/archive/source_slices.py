"""Slices of a series by its metadata in DICOM JSON, in the order in which a viewer shows them."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from covtanet.storage.dicomweb import SOP_UID, checked_uid, values_of
from covtanet.storage.dicomweb_server import Attributes

MAX_SLICES = 8192
# Row and column of unit length at right angles have a product of length 1.
MIN_NORMAL = 0.5

# Tags of PS3.6.
INSTANCE_NUMBER, POSITION, ORIENTATION = "00200013", "00200032", "00200037"
NUM_FRAMES, ROWS = "00280008", "00280010"
SHARED_GROUPS, FRAME_GROUPS = "52009229", "52009230"
PLANE_POSITION, PLANE_ORIENTATION = "00209113", "00209116"

Vector = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class SourceSlice:
    """An image of a series, or a frame of one, with its plane in the patient."""

    path: str
    """Path below the series: ``instances/UID`` or ``instances/UID/frames/N``."""
    instance_number: int | None = None
    position_mm: tuple[float, ...] | None = None
    """LPS mm of the first pixel; None if the server does not tell."""
    cosines: tuple[float, ...] | None = None
    """Directions of row and column, six LPS cosines; None if the server does not tell."""


def slices_of(image: Attributes) -> Iterator[SourceSlice]:
    """Yield the slices of an image: itself, or the frames of an Enhanced CT.

    Raises:
        OSError: it has no valid UID, or too many frames.
    """
    path = f"instances/{checked_uid(image, SOP_UID)}"
    frames = values_of(image, FRAME_GROUPS)
    if not frames:
        yield _slice_at(path, _whole_number(image, INSTANCE_NUMBER), [image])
        return
    num_frames = _whole_number(image, NUM_FRAMES) or 1
    check_count(num_frames)
    shared = values_of(image, SHARED_GROUPS)[:1]
    for index in range(num_frames):
        groups = [*frames[index : index + 1], *shared]
        planes = [plane for group in groups for plane in _planes(group)]
        yield _slice_at(f"{path}/frames/{index + 1}", index + 1, planes)


def check_count(num_slices: int) -> None:
    """Refuse a series that no viewer shows slice by slice.

    Raises:
        OSError: it has more than ``MAX_SLICES`` slices.
    """
    if num_slices > MAX_SLICES:
        raise OSError(f"a series has more than {MAX_SLICES} slices")


def _planes(group: object) -> Iterator[Attributes]:
    """Yield the items of a functional group that may hold a position or an orientation."""
    if not isinstance(group, dict):
        return
    for tag in (PLANE_POSITION, PLANE_ORIENTATION):
        yield from (item for item in values_of(group, tag) if isinstance(item, dict))


def _slice_at(path: str, number: int | None, planes: Sequence[Attributes]) -> SourceSlice:
    """Return a slice with the first position and orientation that are told."""
    positions = (_numbers(plane, POSITION, 3) for plane in planes)
    orientations = (_numbers(plane, ORIENTATION, 6) for plane in planes)
    return SourceSlice(
        path=path,
        instance_number=number,
        position_mm=next(filter(None, positions), None),
        cosines=next(filter(None, orientations), None),
    )


def _numbers(attributes: Attributes, tag: str, count: int) -> tuple[float, ...] | None:
    """Return the finite numbers of an element; None if it has others, or another count."""
    try:
        numbers = tuple(float(value) for value in values_of(attributes, tag))
    except (TypeError, ValueError):
        return None
    is_sound = len(numbers) == count and all(map(math.isfinite, numbers))
    return numbers if is_sound else None


def _whole_number(attributes: Attributes, tag: str) -> int | None:
    numbers = _numbers(attributes, tag, 1)
    return None if numbers is None else int(numbers[0])


def order_slices(slices: Sequence[SourceSlice]) -> tuple[SourceSlice, ...]:
    """Return slices from base to apex: by their distance along the normal of their planes.

    Without plane and position of every slice: by instance number, slices without one last.
    """

    def key(item: tuple[float, SourceSlice]) -> tuple[float, float, str]:
        distance_mm, one = item
        number = math.inf if one.instance_number is None else one.instance_number
        return distance_mm, number, one.path

    ordered = sorted(zip(_distances_mm(slices), slices, strict=True), key=key)
    return tuple(one for _, one in ordered)


def _distances_mm(slices: Sequence[SourceSlice]) -> list[float]:
    """Return the distances along the normal; all 0 if they are unknown."""
    normal = _normal(slices)
    positions = [one.position_mm for one in slices if one.position_mm is not None]
    if normal is None or len(positions) < len(slices):
        return [0.0] * len(slices)
    # Positions are rounded to micrometres: copies of a slice are equal.
    return [round(float(normal @ np.array(position)), 3) for position in positions]


def _normal(slices: Sequence[SourceSlice]) -> Vector | None:
    """Return the unit normal of most planes; None if no plane is known.

    Its largest component is positive, so that it points to head, back or left.
    """
    counts = Counter(one.cosines for one in slices if one.cosines is not None)
    if not counts:
        return None
    cosines = np.array(counts.most_common(1)[0][0])
    normal: Vector = np.cross(cosines[:3], cosines[3:])
    length = float(np.linalg.norm(normal))
    if length < MIN_NORMAL:
        return None
    unit: Vector = normal / (length * np.sign(normal[np.abs(normal).argmax()]))
    return unit
