"""Acquisitions of a series: its slices must belong to one, or to several end to end.

Two that lie end to end, as of a step-and-shoot scan, are one stack. Two that interleave are two
breath-holds or two reconstructions: they make no volume, although their slices may lie at regular
distances.

A time or a number per slice is normal, in either direction along the stack, with a jump at midnight
or at a slab that was taken again. Only if two passes through the stack, one after the other in
time, lie between each other are they two acquisitions.

Not covered: acquisitions that the headers do not distinguish; two at the same depths, which are
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

from covtanet.ct.dicom_geometry import DUPLICATE_MM, depths, have_one_direction
from covtanet.ct.dicom_objects import read_text
from covtanet.ct.dicom_values import value_of
from covtanet.errors import Reason, StudyError

# Attributes that differ between acquisitions or reconstructions, in any order along the stack.
NAMES = (
    "ConvolutionKernel", "FilterType", "KVP", "AcquisitionUID", "IrradiationEventUID",
    "TemporalPositionIdentifier",
)  # fmt: skip
# Slices nearer than this share of their mean distance lie at one depth: two phases whose table
# positions differ in the last digit.
SAME_DEPTH_SHARE = 0.05
MIN_BETWEEN = 2
# At the border of two overlapping slabs some slices of each lie between those of the other slab,
# at most a part of them.
MIN_SHARE_BETWEEN = 0.5
MIN_SHARE_OF_STACK = 1 / 8
MIN_SHARE_OF_STACK_BY_CONTENT = 1 / 4
# Slices are reconstructed in parallel and written in any order, within seconds; breath-holds lie
# further apart.
MIN_CONTENT_GAP_S = 5.0
MIN_CONTENT_TIMES = 3
# A hostile series may have thousands of values: only the largest groups are compared, pair by pair.
MAX_GROUPS = 64

DAY_S = 86_400

# Index of the depth of slices along the stack, from 0, ascending within a group.
Ranks = NDArray[np.int64]
# Day (None if it is missing) and seconds since midnight.
Moment = tuple[int | None, float]


def check_one_acquisition(headers: Sequence[Dataset]) -> None:
    """Refuse a series in which the slices of several acquisitions lie between each other.

    Slices without positions, or of several directions, pass: they have no order.

    Raises:
        StudyError: ``mixed_acquisitions``.
    """
    ranks = _rank_slices(headers)
    if ranks is None:
        return
    num_slices = len(headers)
    for name in NAMES:
        by_value = _group([_normalized(header, name) for header in headers], ranks)
        _refuse_interleaved(name, list(by_value.values()), 0.0, num_slices)
    by_number = _group([_float(value_of(header, "AcquisitionNumber")) for header in headers], ranks)
    _refuse_interleaved("AcquisitionNumber", _passes(by_number), MIN_SHARE_OF_STACK, num_slices)
    by_time = _group(_comparable([_acquisition_moment(header) for header in headers]), ranks)
    if by_time:
        _refuse_interleaved("AcquisitionTime", _passes(by_time), MIN_SHARE_OF_STACK, num_slices)
        return
    by_content = _group(_comparable([_moment(header, "Content") for header in headers]), ranks)
    passes = _distinct_content_passes(by_content)
    _refuse_interleaved("ContentTime", passes, MIN_SHARE_OF_STACK_BY_CONTENT, num_slices)


def _refuse_interleaved(
    name: str, groups: Sequence[Ranks], min_share: float, num_slices: int
) -> None:
    """Refuse two groups if many slices of each lie between slices of the other group.

    Slices at depths of the other group do not count: those are duplicates.
    """
    min_slices = max(MIN_BETWEEN + 1, min_share * num_slices)
    large = [group for group in groups if len(group) >= min_slices]
    for smaller, larger in combinations(sorted(large, key=len)[-MAX_GROUPS:], 2):
        limit = max(MIN_BETWEEN, MIN_SHARE_BETWEEN * len(smaller), min_share * num_slices)
        if min(_num_between(smaller, larger), _num_between(larger, smaller)) >= limit:
            raise StudyError(
                Reason.MIXED_ACQUISITIONS,
                f"{len(smaller)} and {len(larger)} slices that differ in {name} lie between each "
                "other, expected one stack",
            )


def _num_between(ranks: Ranks, outer: Ranks) -> int:
    """Count the ranks that lie between the ends of another group, and not at one of its ranks."""
    inside = ranks[(ranks > outer[0]) & (ranks < outer[-1])]
    return int((~np.isin(inside, outer)).sum())


def _rank_slices(headers: Sequence[Dataset]) -> Ranks | None:
    """Return the rank of each slice's depth along the stack; None if the slices have no order."""
    has_geometry = all(
        _is_vector(header, "ImagePositionPatient", 3)
        and _is_vector(header, "ImageOrientationPatient", 6)
        for header in headers
    )
    if not has_geometry or len(headers) < 2 or not have_one_direction(headers):
        return None
    depth = depths(headers)
    order = np.argsort(depth, kind="stable")
    gaps = np.diff(depth[order])
    is_new = gaps > max(DUPLICATE_MM, SAME_DEPTH_SHARE * float(gaps.mean()))
    ranks = np.empty(len(headers), np.int64)
    ranks[order] = np.concatenate([[0], is_new.cumsum()])
    return ranks


def _is_vector(header: Dataset, name: str, length: int) -> bool:
    values = value_of(header, name)
    if values is None or len(values) != length:
        return False
    return bool(np.isfinite(np.asarray(values, float)).all())


def _group(keys: Sequence[Any], ranks: Ranks) -> dict[Any, Ranks]:
    """Return the ranks of the slices of each key, ascending; slices without a key are left out."""
    ranks_by_key: dict[Any, set[int]] = defaultdict(set)
    for key, rank in zip(keys, ranks, strict=True):
        if key is not None:
            ranks_by_key[key].add(int(rank))
    return {key: np.array(sorted(members)) for key, members in ranks_by_key.items()}


def _passes(groups: dict[float, Ranks]) -> list[Ranks]:
    """Join groups, in the order of their keys, as long as they go on in one direction."""
    return [_merged(groups, keys) for keys in _keys_of_passes(groups)]


def _distinct_content_passes(groups: dict[float, Ranks]) -> list[Ranks]:
    """Return passes by ContentTime, which is the time of writing rather than of acquisition.

    A pass of few times that are close to those of the next pass or the previous one is left out.
    """
    passes = _keys_of_passes(groups)
    distinct = []
    for index, keys in enumerate(passes):
        gap_s = keys[0] - passes[index - 1][-1] if index else np.inf
        after_s = passes[index + 1][0] - keys[-1] if index + 1 < len(passes) else np.inf
        if len(keys) >= MIN_CONTENT_TIMES or min(gap_s, after_s) >= MIN_CONTENT_GAP_S:
            distinct.append(_merged(groups, keys))
    return distinct


def _merged(groups: dict[float, Ranks], keys: Sequence[float]) -> Ranks:
    return np.sort(np.concatenate([groups[key] for key in keys]))


def _keys_of_passes(groups: dict[float, Ranks]) -> list[list[float]]:
    passes: list[list[float]] = []
    direction = 0
    for key in sorted(groups):
        ranks = groups[key]
        last = groups[passes[-1][-1]] if passes else ranks
        step = int(ranks[0] > last[-1]) - int(ranks[-1] < last[0])
        if passes and step and direction in (0, step):
            passes[-1].append(key)
            direction = step
        else:
            passes.append([key])
            direction = 0
    return passes


def _normalized(header: Dataset, name: str) -> str | None:
    """Return a value as text: its parts without blanks, a number without needless zeros."""
    value = value_of(header, name)
    if value is None or isinstance(value, bytes):
        return None
    values = [value] if isinstance(value, str | int | float) else value
    parts = [str(part).strip() for part in values]
    number = _float(parts[0]) if len(parts) == 1 else None
    if number is not None:
        return f"{number:g}"
    return "\\".join(parts) or None


def _float(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if np.isfinite(number) else None


def _acquisition_moment(header: Dataset) -> Moment | None:
    text = read_text(header, "AcquisitionDateTime")
    match = re.match(r"(\d{8})(\d{2,6}(\.\d*)?)", text)
    return _parse_moment(match[1], match[2]) if match else _moment(header, "Acquisition")


def _moment(header: Dataset, kind: str) -> Moment | None:
    day = read_text(header, f"{kind}Date")
    time = read_text(header, f"{kind}Time")
    return _parse_moment(day, time)


def _parse_moment(day: str, time: str) -> Moment | None:
    """Parse DA and TM, also with the points and colons of ACR-NEMA; None without a time."""
    time_parts = re.fullmatch(r"(\d\d):?(\d\d)?:?(\d\d(?:\.\d*)?)?", time)
    if time_parts is None:
        return None
    hours, minutes, seconds = (float(part or 0) for part in time_parts.groups())
    seconds_of_day = (hours * 60 + minutes) * 60 + seconds
    day_parts = re.fullmatch(r"(\d{4})\.?(\d\d)\.?(\d\d)", day)
    if day_parts is None:
        return None, seconds_of_day
    try:
        return date(*map(int, day_parts.groups())).toordinal(), seconds_of_day
    except ValueError:  # such as month 13
        return None, seconds_of_day


def _comparable(moments: Sequence[Moment | None]) -> list[float | None]:
    """Return moments in seconds: since a fixed day if each has a day, else since midnight."""
    has_days = all(moment[0] is not None for moment in moments if moment)
    return [None if moment is None else _seconds(moment, has_days) for moment in moments]


def _seconds(moment: Moment, has_days: bool) -> float:
    day, seconds = moment
    return (day or 0) * DAY_S * has_days + seconds
