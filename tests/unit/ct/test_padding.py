"""Padding of a slice becomes air outside the body and cuts nothing out of it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from odd_dicom import (
    CORNERS,
    SIZE,
    changed,
    pixels,
    put,
    read,
    to_bytes,
    with_values,
)
from pydicom.dataset import FileDataset
from sound_input import phantom

from covtanet.ct import dicom


def padded(
    stored: int,
    *,
    is_signed: bool,
    bits: int = 16,
    where: np.ndarray = CORNERS,
    intercept: int = -1024,
    **elements: tuple[str, int],
) -> list[FileDataset]:
    """The series padded with a stored value. elements: VR and value of the header's attributes."""

    def change(index: int, dataset: FileDataset) -> None:
        values = phantom().hu[index].astype(int) - intercept
        values = np.where(where, stored, values if is_signed else np.clip(values, 0, None))
        dataset.PixelRepresentation, dataset.BitsStored, dataset.HighBit = (
            int(is_signed),
            bits,
            bits - 1,
        )
        dataset.RescaleIntercept = str(intercept)
        put(dataset, values)
        for name, (representation, value) in elements.items():
            dataset.add_new(name, representation, value)

    return changed(change)


def value(representation: str, number: int) -> dict[str, Any]:
    return {"PixelPaddingValue": (representation, number)}


def limits(representation: str, number: int, limit: int) -> dict[str, Any]:
    return {**value(representation, number), "PixelPaddingRangeLimit": (representation, limit)}


PADDED: dict[str, Callable[[], list[FileDataset]]] = {
    "signed -2000": lambda: padded(-2000, is_signed=True, **value("SS", -2000)),
    "signed -2000, called 63536": lambda: padded(-2000, is_signed=True, **value("US", 63536)),
    "unsigned 63536": lambda: padded(63536, is_signed=False, **value("US", 63536)),
    "unsigned 63536, called -2000": lambda: padded(63536, is_signed=False, **value("SS", -2000)),
    "unsigned 32768, called -32768": lambda: padded(32768, is_signed=False, **value("SS", -32768)),
    "unsigned 65535": lambda: padded(65535, is_signed=False, **value("US", 65535)),
    "unsigned 63536 that nothing declares": lambda: padded(63536, is_signed=False),
    "unsigned 63536, another declared": lambda: padded(63536, is_signed=False, **value("US", 0)),
    "-32768 that nothing declares": lambda: padded(-32768, is_signed=True, intercept=0),
    "12 bits signed, -2000": lambda: padded(
        -2000, is_signed=True, bits=12, intercept=0, **value("SS", -2000)
    ),
    "12 bits signed, -2000 without a sign above": lambda: padded(
        2096, is_signed=True, bits=12, intercept=0, **value("SS", -2000)
    ),
    "12 bits unsigned, 63536": lambda: padded(
        63536, is_signed=False, bits=12, **value("US", 63536)
    ),
    "12 bits unsigned, 63536, called -2000": lambda: padded(
        63536, is_signed=False, bits=12, **value("SS", -2000)
    ),
    "12 bits unsigned, 63536 that nothing declares": lambda: padded(
        63536, is_signed=False, bits=12
    ),
    "a range, signed": lambda: padded(-1900, is_signed=True, **limits("SS", -2000, -1500)),
    "a range, written downwards": lambda: padded(
        -1900, is_signed=True, **limits("SS", -1500, -2000)
    ),
    "a range, unsigned": lambda: padded(64000, is_signed=False, **limits("US", 63536, 65535)),
    "a range, of mixed signs": lambda: padded(
        -1900, is_signed=True, **{**value("SS", -2000), "PixelPaddingRangeLimit": ("US", 64036)}
    ),
    "0 HU outside": lambda: padded(0, is_signed=True, intercept=0, **value("SS", 0)),
    "40 HU outside": lambda: padded(1064, is_signed=False, **value("US", 1064)),
    "3071 HU outside": lambda: padded(4095, is_signed=False, bits=12, **value("US", 4095)),
}


@pytest.mark.parametrize("name", PADDED)
def test_padding_outside_is_air(name: str) -> None:
    volume = read(PADDED[name]())
    assert volume.qc_flags == ("padding",)
    assert volume.hu.dtype == np.int16
    expected = np.where(CORNERS, -1024, phantom().hu)
    np.testing.assert_array_equal(volume.hu, expected)


NOT_PADDED: dict[str, Callable[[], list[FileDataset]]] = {
    "-1024 HU": lambda: padded(0, is_signed=False, **value("US", 0)),
    "-1000 HU": lambda: padded(24, is_signed=False, **value("US", 24)),
    "a range of air": lambda: padded(10, is_signed=False, **limits("US", 0, 24)),
    "a value that is nowhere": lambda: padded(24, is_signed=True, **value("SS", -2000)),
    "a range of all": lambda: padded(24, is_signed=True, **limits("SS", -2000, 3000)),
}


@pytest.mark.parametrize("name", NOT_PADDED)
def test_padding_of_air_changes_nothing(name: str) -> None:
    series = NOT_PADDED[name]()
    volume = read(series)
    assert volume.qc_flags == ()
    expected = [pixels(dataset).astype(int) - 1024 for dataset in series]
    np.testing.assert_array_equal(volume.hu, expected)


@pytest.mark.parametrize(
    ("raw", "is_padded"), [((63536).to_bytes(2, "little"), True), (b"abc", False)]
)
def test_padding_value_of_unknown_representation_is_read_as_bytes(
    raw: bytes, is_padded: bool
) -> None:
    objects = to_bytes(padded(-2000, is_signed=True, **value("SS", -2000)))
    known = b"\x28\x00\x20\x01SS\x02\x00" + (63536).to_bytes(2, "little")
    assert known in objects[0]
    length = len(raw) + len(raw) % 2
    unknown = b"\x28\x00\x20\x01UN\0\0" + length.to_bytes(4, "little") + raw.ljust(length, b"\0")
    volume = dicom.read_series([data.replace(known, unknown) for data in objects])
    assert ("padding" in volume.qc_flags) == is_padded
    assert (volume.hu[:, 0, 0] == (-1024 if is_padded else -3024)).all()


def test_padding_value_of_tissue_is_kept_inside_the_body() -> None:
    hu = phantom().hu
    inside = (hu > -100) & (hu < 100)
    most_common = int(np.bincount((hu[inside] + 1024).astype(int)).argmax())
    series = with_values(PixelRepresentation=0)
    for dataset in series:
        dataset.add_new("PixelPaddingValue", "US", most_common)
    assert (hu == most_common - 1024).sum() > 50
    volume = read(series)
    np.testing.assert_array_equal(volume.hu, hu)
    assert volume.qc_flags == ()


def test_speck_of_the_padding_value_at_the_edge_is_not_padding() -> None:
    speck = np.zeros((SIZE, SIZE), bool)
    speck[0, 30:33] = True
    volume = read(padded(1064, is_signed=False, where=speck, **value("US", 1064)))
    assert volume.qc_flags == ()
