"""Slices of a series by its metadata: their order, frames, and metadata that says little."""

import itertools
import random
from typing import Any

import pytest

from covtanet.archive.dicomweb_images import media_type_of
from covtanet.archive.source_slices import MAX_SLICES, SourceSlice, order_slices, slices_of

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
# The normal of rows to the left and columns to the front points to the feet.
FEET_UP = (1.0, 0.0, 0.0, 0.0, -1.0, 0.0)


def at(name: str, z_mm: float | None, number: int | None = None, **values: Any) -> SourceSlice:
    position_mm = None if z_mm is None else (0.0, 0.0, z_mm)
    known = {"cosines": AXIAL, "position_mm": position_mm, **values}
    return SourceSlice(path=name, instance_number=number, **known)


def names(slices: tuple[SourceSlice, ...]) -> str:
    return "".join(one.path for one in slices)


@pytest.mark.parametrize("cosines", [AXIAL, FEET_UP])
def test_slices_go_from_base_to_apex_whatever_their_numbers(cosines: tuple[float, ...]) -> None:
    """LPS z grows towards the head."""
    slices = [at(name, -10.0 + index, -index, cosines=cosines) for index, name in enumerate("abcd")]
    for order in itertools.permutations(slices):
        assert names(order_slices(order)) == "abcd"


def test_slices_of_a_tilted_gantry_go_along_their_normal() -> None:
    """By z alone these would be in the opposite order."""
    tilted = (1.0, 0.0, 0.0, 0.0, 0.6, -0.8)  # normal (0, 0.8, 0.6)
    low = SourceSlice(path="a", position_mm=(0.0, 0.0, 1.0), cosines=tilted)
    high = SourceSlice(path="b", position_mm=(0.0, 10.0, 0.0), cosines=tilted)
    assert names(order_slices([high, low])) == "ab"


def test_slice_without_a_position_puts_all_by_instance_number() -> None:
    slices = [at("c", 1.0, 9), at("a", None, 2), at("b", 5.0, 4), at("d", None)]
    assert names(order_slices(slices)) == "abcd"


@pytest.mark.parametrize("cosines", [None, (1.0, 0.0, 0.0, 1.0, 0.0, 0.0), (0.0,) * 6])
def test_slices_without_a_plane_go_by_instance_number(cosines: tuple[float, ...] | None) -> None:
    slices = [at("b", 1.0, 2, cosines=cosines), at("a", 5.0, 1, cosines=cosines)]
    assert names(order_slices(slices)) == "ab"


def test_slices_at_one_position_keep_the_same_order() -> None:
    slices = [at(name, 3.0, number) for name, number in (("a", 1), ("c", 2), ("b", 2))]
    for _ in range(5):
        random.shuffle(slices)
        assert names(order_slices(slices)) == "abc"


def image(**elements: list[Any]) -> dict[str, Any]:
    values = {"00080018": ["1.2.3"], **{tag.removeprefix("t"): elements[tag] for tag in elements}}
    return {tag: {"Value": value} for tag, value in values.items()}


def test_image_is_a_slice_with_position_and_plane() -> None:
    """DICOM JSON has decimal strings as numbers or as texts."""
    (one,) = slices_of(image(t00200013=["7"], t00200032=[1, "2.5", -3], t00200037=list(AXIAL)))
    expected = SourceSlice(
        path="instances/1.2.3", instance_number=7, position_mm=(1.0, 2.5, -3.0), cosines=AXIAL
    )
    assert one == expected


@pytest.mark.parametrize(
    "position", [[], [1, 2], [1, 2, None], [1, 2, "x"], [1, 2, "nan"], [1, 2, {"a": 1}]]
)
def test_unsound_position_is_no_position(position: list[Any]) -> None:
    (one,) = slices_of(image(t00200032=position, t00200013=["1e400"]))
    assert (one.position_mm, one.instance_number) == (None, None)


def test_frames_of_enhanced_ct_are_slices_with_their_planes() -> None:
    frames = [{"00209113": {"Value": [{"00200032": {"Value": [0, 0, z]}}]}} for z in (4, 2)]
    shared = {"00209116": {"Value": [{"00200037": {"Value": list(AXIAL)}}]}}
    whole = image(t00280008=[3], t52009229=[shared], t52009230=[*frames, "text"])
    slices = list(slices_of(whole))
    assert [one.path for one in slices] == [f"instances/1.2.3/frames/{k}" for k in (1, 2, 3)]
    assert [one.position_mm for one in slices] == [(0.0, 0.0, 4.0), (0.0, 0.0, 2.0), None]
    assert {one.cosines for one in slices} == {AXIAL}


def test_image_with_too_many_frames_or_an_invalid_uid_raises() -> None:
    many = image(t00280008=[MAX_SLICES + 1], t52009230=[{}])
    with pytest.raises(OSError, match="more than 8192 slices"):
        list(slices_of(many))
    with pytest.raises(OSError, match="invalid UID"):
        list(slices_of({"00080018": {"Value": ["../x"]}}))


def test_only_png_and_jpeg_are_pictures() -> None:
    assert media_type_of(b"\x89PNG\r\n\x1a\nrest") == "image/png"
    assert media_type_of(b"\xff\xd8\xff\xe0rest") == "image/jpeg"
    for content in (b"", b"<svg onload=x>", b"<html>", b"GIF89a", b"\x89PN"):
        with pytest.raises(OSError, match="neither PNG nor JPEG"):
            media_type_of(content)
