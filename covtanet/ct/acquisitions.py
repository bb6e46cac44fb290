"""Whether the slices of a series are of one acquisition, or of two whose slices lie between each other.

Two that lie end to end, as of a step-and-shoot scan, are one stack. Two that interleave are two
breath-holds or two reconstructions: no volume, although their slices may lie at regular distances.

A time or a number per slice is normal, in either direction along the stack, with a jump at midnight
or at a slab that was taken again. Only if two runs through the stack, one after the other in time,
lie between each other are they two.

Not covered: acquisitions that nothing in the headers tells apart; two at the same places, which are
duplicate slices.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from datetime import date
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from covtanet.ct.series_geometry import DUPLICATE_MM, depths, have_one_direction
from covtanet.errors import Reason, StudyError

# What differs between acquisitions or reconstructions, in no order.
NAMES = (
    "ConvolutionKernel", "FilterType", "KVP", "AcquisitionUID", "IrradiationEventUID", "TemporalPositionIdentifier",
)  # fmt: skip
# Slices so near share their place: two phases whose table positions differ in the last digit.
SAME_PLACE_SHARE = 0.05
MIN_BETWEEN = 2
# At the border of two overlapping slabs some slices of each lie between the other's, at most a part
# of them.
MIN_SHARE_BETWEEN = 0.5
MIN_SHARE_OF_STACK, MIN_SHARE_OF_STACK_BY_CONTENT = 1 / 8, 1 / 4
# Slices are reconstructed in parallel and written in any order, within seconds; breath-holds lie
# further apart.
MIN_CONTENT_GAP_S, MIN_CONTENT_TIMES = 5.0, 3
# Of an adversary's thousands of names only so many are compared.
MAX_GROUPS = 64

DAY_S = 86_400

Ranks = NDArray[np.int64]
Moment = tuple[int | None, float]  # day, seconds since midnight


def check_one_acquisition(headers: Sequence[Dataset]) -> None:
    """Refuse a series in which the slices of several acquisitions lie between each other.

    Without positions, or with slices of several directions, nothing lies between anything.

    Raises:
        StudyError: ``mixed_acquisitions``.
    """
    ranks = _ranks(headers)
    if ranks is None:
        return
    for name in NAMES:
        groups = _groups([_name(header, name) for header in headers], ranks)
        _refuse_interleaved(name, list(groups.values()), 0.0, len(headers))
    numbers = _groups([_float(header.get("AcquisitionNumber")) for header in headers], ranks)
    _refuse_interleaved("AcquisitionNumber", _passes(numbers), MIN_SHARE_OF_STACK, len(headers))
    by_time = _groups(_comparable([_acquisition_moment(header) for header in headers]), ranks)
    if by_time:
        _refuse_interleaved("AcquisitionTime", _passes(by_time), MIN_SHARE_OF_STACK, len(headers))
        return
    by_content = _groups(_comparable([_moment(header, "Content") for header in headers]), ranks)
    _refuse_interleaved(
        "ContentTime", _far_passes(by_content), MIN_SHARE_OF_STACK_BY_CONTENT, len(headers)
    )


def _refuse_interleaved(
    name: str, groups: Sequence[Ranks], min_share: float, num_slices: int
) -> None:
    """Refuse two groups of which many slices of each lie between, and not at, places of the other."""
    large = [
        group
        for group in groups
        if len(group) > MIN_BETWEEN and len(group) >= min_share * num_slices
    ]
    for one, other in combinations(sorted(large, key=len)[-MAX_GROUPS:], 2):
        needed = max(MIN_BETWEEN, MIN_SHARE_BETWEEN * len(one), min_share * num_slices)
        if min(_num_between(one, other), _num_between(other, one)) >= needed:
            raise StudyError(
                Reason.MIXED_ACQUISITIONS,
                f"{len(one)} and {len(other)} slices that differ in {name} lie between each other, expected one stack",
            )


def _num_between(one: Ranks, other: Ranks) -> int:
    """How many places of one lie between those of the other, and are none of its own."""
    inside = one[(one > other[0]) & (one < other[-1])]
    return int((~np.isin(inside, other)).sum())


def _ranks(headers: Sequence[Dataset]) -> Ranks | None:
    """The number of each slice's place along the stack, None if the slices have none."""
    for header in headers:
        for name, length in (("ImagePositionPatient", 3), ("ImageOrientationPatient", 6)):
            values = header.get(name)
            if (
                values is None
                or len(values) != length
                or not np.isfinite(np.asarray(values, float)).all()
            ):
                return None
    if len(headers) < 2 or not have_one_direction(headers):
        return None
    depth = depths(headers)
    order = np.argsort(depth, kind="stable")
    gaps = np.diff(depth[order])
    is_new = gaps > max(DUPLICATE_MM, SAME_PLACE_SHARE * float(gaps.mean()))
    ranks = np.empty(len(headers), np.int64)
    ranks[order] = np.concatenate([[0], is_new.cumsum()])
    return ranks


def _groups(keys: Sequence[Any], ranks: Ranks) -> dict[Any, Ranks]:
    """The places of each key, in their order; slices without a key are in no group."""
    found: dict[Any, set[int]] = defaultdict(set)
    for key, rank in zip(keys, ranks, strict=True):
        if key is not None:
            found[key].add(int(rank))
    return {key: np.array(sorted(places)) for key, places in found.items()}


def _passes(groups: dict[float, Ranks]) -> list[Ranks]:
    """Runs through the stack: groups in the order of their keys as long as they go on in one direction."""
    return [
        np.sort(np.concatenate([groups[key] for key in keys])) for keys in _keys_of_passes(groups)
    ]


def _far_passes(groups: dict[float, Ranks]) -> list[Ranks]:
    """Passes by a time that is not the acquisition's: all in few times of one moment is no pass."""
    passes = _keys_of_passes(groups)
    kept = []
    for index, keys in enumerate(passes):
        gap_s = keys[0] - passes[index - 1][-1] if index else np.inf
        after_s = passes[index + 1][0] - keys[-1] if index + 1 < len(passes) else np.inf
        if len(keys) >= MIN_CONTENT_TIMES or min(gap_s, after_s) >= MIN_CONTENT_GAP_S:
            kept.append(np.sort(np.concatenate([groups[key] for key in keys])))
    return kept


def _keys_of_passes(groups: dict[float, Ranks]) -> list[list[float]]:
    passes: list[list[float]] = []
    direction = 0
    for key in sorted(groups):
        here = groups[key]
        last = groups[passes[-1][-1]] if passes else here
        step = int(here[0] > last[-1]) - int(here[-1] < last[0])
        if passes and step and direction in (0, step):
            passes[-1].append(key)
            direction = step
        else:
            passes.append([key])
            direction = 0
    return passes


def _name(header: Dataset, name: str) -> str | None:
    """The value as text: its parts without blanks, a number without needless zeros."""
    value = header.get(name)
    if value is None or isinstance(value, bytes):
        return None
    parts = [
        str(part).strip() for part in ([value] if isinstance(value, str | int | float) else value)
    ]
    number = _float(parts[0]) if len(parts) == 1 else None
    return ("\\".join(parts) or None) if number is None else f"{number:g}"


def _float(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if np.isfinite(number) else None


def _acquisition_moment(header: Dataset) -> Moment | None:
    both = re.match(
        r"(\d{8})(\d{2,6}(\.\d*)?)", str(header.get("AcquisitionDateTime") or "").strip()
    )
    return _parse_moment(both[1], both[2]) if both else _moment(header, "Acquisition")


def _moment(header: Dataset, kind: str) -> Moment | None:
    day, time = (str(header.get(f"{kind}{what}") or "").strip() for what in ("Date", "Time"))
    return _parse_moment(day, time)


def _parse_moment(day: str, time: str) -> Moment | None:
    """DA and TM, also with the points and colons of ACR-NEMA; None if there is no time."""
    parts = re.fullmatch(r"(\d\d):?(\d\d)?:?(\d\d(?:\.\d*)?)?", time)
    if parts is None:
        return None
    hours, minutes, seconds = (float(part or 0) for part in parts.groups())
    numbers = re.fullmatch(r"(\d{4})\.?(\d\d)\.?(\d\d)", day)
    try:
        days = date(*map(int, numbers.groups())).toordinal() if numbers else None
    except ValueError:
        days = None
    return days, (hours * 60 + minutes) * 60 + seconds


def _comparable(moments: Sequence[Moment | None]) -> list[float | None]:
    """Seconds, since midnight unless all moments have a day."""
    has_days = all(moment[0] is not None for moment in moments if moment)
    return [
        None if moment is None else (moment[0] or 0) * DAY_S * has_days + moment[1]
        for moment in moments
    ]
