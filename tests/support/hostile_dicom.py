"""Malformed DICOM series with the reason for their refusal, and odd series that are read."""

import struct
import zlib
from collections.abc import Callable
from functools import partial
from io import BytesIO

import imagecodecs
import numpy as np
import pydicom
from bombs import empty_items
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    RLELossless,
    SecondaryCaptureImageStorage,
)
from sound_input import Objects, named, slices

from covtanet.phantoms.damage import DICOM_DAMAGE

FAR_SEGMENTS = struct.pack("<16I", 2, 64, 1 << 30, *[0] * 13)
Edit = Callable[[int, pydicom.Dataset], None]


def edited(change: Edit, **how: bool) -> Objects:
    """The sound series with each dataset changed."""
    out = []
    for index, data in enumerate(slices()):
        dataset = pydicom.dcmread(BytesIO(data))
        change(index, dataset)
        buffer = BytesIO()
        dataset.save_as(buffer, **{"enforce_file_format": True, **how})
        out.append(buffer.getvalue())
    return named(out)


def nested_modality() -> Objects:
    """Modality as a sequence whose item holds an element of a kind that there is not. Found by the
    fuzzer.
    """
    element = b"\x28\x00\x10\x00U\t\x00\x00"
    item = b"\xfe\xff\x00\xe0" + struct.pack("<I", len(element)) + element
    objects = list(slices())
    at = objects[3].index(b"\x08\x00\x60\x00CS")
    end = at + 8 + int.from_bytes(objects[3][at + 6 : at + 8], "little")
    sequence = b"\x08\x00\x60\x00SQ\x00\x00" + struct.pack("<I", len(item)) + item
    objects[3] = objects[3][:at] + sequence + objects[3][end:]
    return named(objects)


def with_values(**values: object) -> Objects:
    def change(index: int, dataset: pydicom.Dataset) -> None:
        for name, value in values.items():
            setattr(dataset, name, value)

    return edited(change)


def without(*names: str) -> Objects:
    def change(index: int, dataset: pydicom.Dataset) -> None:
        for name in names:
            delattr(dataset, name)

    return edited(change)


def on_slice(number: int, **values: object) -> Objects:
    def change(index: int, dataset: pydicom.Dataset) -> None:
        if index == number:
            for name, value in values.items():
                setattr(dataset, name, value)

    return edited(change)


def replaced_text(old: bytes, new: bytes) -> Objects:
    """The value of an element overwritten by one of the same length, past every check of the
    writer.
    """
    assert len(old) == len(new)
    assert old in slices()[0]
    return named([data.replace(old, new) for data in slices()])


def element(name: str, value: bytes) -> Objects:
    """An explicit-VR element's value replaced, whatever its length."""
    tag = pydicom.tag.Tag(name)
    raw = struct.pack("<HH", tag.group, tag.element)
    out = []
    for data in slices():
        at = data.index(raw, 132)
        length = struct.unpack_from("<H", data, at + 6)[0]
        text = value + b" " * (len(value) % 2)
        out.append(data[: at + 6] + struct.pack("<H", len(text)) + text + data[at + 8 + length :])
    return named(out)


def compressed(stream: Callable[[bytes], bytes], syntax: str = JPEG2000Lossless) -> Objects:
    def change(index: int, dataset: pydicom.Dataset) -> None:
        dataset.PixelData = pydicom.encaps.encapsulate([stream(dataset.PixelData)])
        dataset["PixelData"].is_undefined_length = True
        dataset.file_meta.TransferSyntaxUID = UID(syntax)

    return edited(change)


def jpeg2000(pixels: bytes) -> bytes:
    array = np.frombuffer(pixels, np.uint16).reshape(64, 64)
    return bytes(imagecodecs.jpeg2k_encode(array, level=0, reversible=True, codecformat="j2k"))


def huge_siz(pixels: bytes) -> bytes:
    """A codestream whose header speaks of 60,000 x 60,000 pixels."""
    stream = bytearray(jpeg2000(pixels))
    at = stream.index(b"\xff\x51")
    for offset in (6, 10, 22, 26):  # Xsiz, Ysiz, XTsiz, YTsiz
        struct.pack_into(">I", stream, at + offset, 60000)
    return bytes(stream)


def deflated(bomb: int = 0) -> Objects:
    out = []
    for data in slices():
        dataset = pydicom.dcmread(BytesIO(data))
        dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        buffer = BytesIO()
        dataset.save_as(buffer, enforce_file_format=True)
        out.append(buffer.getvalue())
    if bomb:
        from covtanet.ct.dicom_headers import transfer_syntax

        start = transfer_syntax(out[0])[1]
        stream = zlib.compressobj(9, zlib.DEFLATED, -15)
        plain = zlib.decompressobj(-15).decompress(out[0][start:])
        packed = stream.compress(plain) + b"".join(
            stream.compress(bytes(1 << 20)) for _ in range(bomb)
        )
        out = [out[0][:start] + packed + stream.flush()]
    return named(out)


def nested(depth: int) -> Objects:
    """Sequences in sequences, of undefined length, before the pixels."""
    head = struct.pack("<HH2sHI", 0x0008, 0x1140, b"SQ", 0, 0xFFFFFFFF) + struct.pack(
        "<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF
    )
    tail = struct.pack("<HHI", 0xFFFE, 0xE00D, 0) + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    insert = head * depth + tail * depth
    out = []
    for data in slices():
        at = data.index(struct.pack("<HH", 0x0010, 0x0010), 132)
        out.append(data[:at] + insert + data[at:])
    return named(out)


def bomb_of_items() -> bytes:
    """A head of 500,000 empty items in a sequence before the UIDs; deflated it would be 6 kB."""
    data = slices()[0]
    at = data.index(struct.pack("<HH", 0x0010, 0x0010), 132)
    return data[:at] + empty_items(500_000) + data[at:]


def declared_4gib() -> Objects:
    out = []
    for data in slices():
        at = data.index(struct.pack("<HH", 0x7FE0, 0x0010))
        out.append(data[: at + 8] + struct.pack("<I", 0xFFFFFFF0) + data[at + 12 : at + 200])
    return named(out)


def unknown_vr() -> Objects:
    """The element of the pixels with a value representation that is none."""
    out = []
    for data in slices():
        at = data.index(struct.pack("<HH", 0x7FE0, 0x0010))
        out.append(data[: at + 4] + b"O\xf3" + data[at + 6 :])
    return named(out)


def two_syntaxes() -> Objects:
    """A transfer syntax with two values."""
    syntax = b"1.2.840.10008.1.2.1\0"
    return replaced_text(syntax, b"1.2.840.10008\\1.2.1\0")


def enhanced(num_described: int = 12, **values: object) -> Objects:
    """The series as one Enhanced CT object."""
    first = pydicom.dcmread(BytesIO(slices()[0]))
    whole = Dataset()
    whole.file_meta = first.file_meta
    for item in first:
        if item.tag.group != 0x7FE0:
            whole.add(item)
    for name in (
        "ImagePositionPatient",
        "ImageOrientationPatient",
        "PixelSpacing",
        "RescaleSlope",
        "RescaleIntercept",
    ):
        del whole[name]
    whole.SOPClassUID = whole.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    shared, frames, pixels = Dataset(), [], []
    for data in slices():
        dataset, frame = pydicom.dcmread(BytesIO(data)), Dataset()
        frame.PlanePositionSequence = Sequence([_only(dataset, "ImagePositionPatient")])
        frame.PixelValueTransformationSequence = Sequence(
            [_only(dataset, "RescaleSlope", "RescaleIntercept")]
        )
        frames.append(frame)
        pixels.append(dataset.PixelData)
    shared.PlaneOrientationSequence = Sequence([_only(first, "ImageOrientationPatient")])
    shared.PixelMeasuresSequence = Sequence([_only(first, "PixelSpacing", "SliceThickness")])
    whole.SharedFunctionalGroupsSequence = Sequence([shared])
    whole.PerFrameFunctionalGroupsSequence = Sequence(frames[:num_described])
    whole.NumberOfFrames = 12
    for name, value in values.items():
        setattr(whole, name, value)
    whole.PixelData = b"".join(pixels)
    whole["PixelData"].VR = "OW"
    buffer = BytesIO()
    whole.save_as(buffer, enforce_file_format=True)
    return {"enhanced.dcm": buffer.getvalue()}


def _only(dataset: pydicom.Dataset, *names: str) -> Dataset:
    item = Dataset()
    for name in names:
        setattr(item, name, dataset[name].value)
    return item


def cut(number: int, share: float) -> Objects:
    data = slices()[number]
    return named([*slices()[:number], data[: int(len(data) * share)], *slices()[number + 1 :]])


def damaged(kind: str) -> Objects:
    """The series with a damage of the archive's phantoms."""
    return named(DICOM_DAMAGE[kind](list(slices())))


DICOM: dict[str, tuple[str, Callable[[], Objects]]] = {
    **{
        f"damage: {kind}": (kind, partial(damaged, kind))
        for kind in DICOM_DAMAGE
        if "slices" not in kind
    },
    "5 slices": ("too_few_slices", lambda: named(slices()[:5])),
    "two slices missing": ("missing_slices", lambda: named([*slices()[:5], *slices()[7:]])),
    "empty object": ("unreadable", lambda: {"a.dcm": b""}),
    "magic alone": ("unreadable", lambda: {"a.dcm": bytes(128) + b"DICM"}),
    "deflated": ("unsupported_syntax", deflated),
    "deflated bomb": ("unsupported_syntax", lambda: deflated(64)),
    "a JPEG of 8 bits": (
        "unsupported_syntax",
        lambda: compressed(lambda pixels: b"\xff\xd8", JPEGBaseline8Bit),
    ),
    "a sequence in the place of a text": ("unreadable", nested_modality),
    "pixels of an unknown VR": ("unreadable", unknown_vr),
    "two syntaxes": ("unsupported_syntax", two_syntaxes),
    "unknown transfer syntax": ("unsupported_syntax", lambda: compressed(bytes, "1.2.3.4.5")),
    "a billion frames": ("unsupported_syntax", lambda: with_values(NumberOfFrames=1_000_000_000)),
    "no rows": ("truncated", lambda: with_values(Rows=0)),
    "rows for more pixels than there are": (
        "truncated",
        lambda: with_values(Rows=65535, Columns=65535),
    ),
    "rows for fewer pixels than there are": ("undecodable", lambda: with_values(Rows=32)),
    "4 GiB declared": ("truncated", declared_4gib),
    "cut in the pixels": ("truncated", lambda: cut(4, 0.8)),
    "17 bits": ("undecodable", lambda: with_values(BitsAllocated=17)),
    "40 of 16 bits": ("undecodable", lambda: with_values(BitsStored=40)),
    "JPEG 2000 cut": ("undecodable", lambda: compressed(lambda pixels: jpeg2000(pixels)[:80])),
    "JPEG 2000 of 60,000 x 60,000": ("undecodable", lambda: compressed(huge_siz)),
    "RLE of nothing": ("undecodable", lambda: compressed(lambda pixels: bytes(64), RLELossless)),
    "RLE with segments far away": (
        "undecodable",
        lambda: compressed(lambda pixels: FAR_SEGMENTS, RLELossless),
    ),
    "slope is text": ("unreadable", lambda: element("RescaleSlope", b"steep")),
    "slope NaN": ("missing_rescale", lambda: element("RescaleSlope", b"NaN")),
    "slope of nothing": ("missing_rescale", lambda: with_values(RescaleSlope="0")),
    "atomic numbers": ("not_hu", lambda: with_values(RescaleType="Z_EFF")),
    "no orientation": ("missing_position", lambda: without("ImageOrientationPatient")),
    "no pixel spacing": ("missing_position", lambda: without("PixelSpacing")),
    "pixel spacing of nothing": ("missing_position", lambda: with_values(PixelSpacing=["0", "0"])),
    "position is no number": (
        "missing_position",
        lambda: element("ImagePositionPatient", b"nan\\nan\\nan"),
    ),
    "two numbers for a position": ("unreadable", lambda: element("ImagePositionPatient", b"1\\2")),
    "two patients": ("mixed_patients", lambda: on_slice(3, PatientID="SOMEONE ELSE")),
    "two studies": ("mixed_patients", lambda: on_slice(3, StudyInstanceUID="1.2.3.4")),
    "localizers alone": (
        "not_ct",
        lambda: with_values(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]),
    ),
    "secondary capture": ("not_ct", lambda: with_values(SOPClassUID=SecondaryCaptureImageStorage)),
    "three colours": ("not_ct", lambda: with_values(SamplesPerPixel=3)),
    "a palette": ("not_ct", lambda: with_values(PhotometricInterpretation="PALETTE COLOR")),
    "a slice of another size": (
        "mixed_orientation",
        lambda: on_slice(2, Rows=32, PixelData=bytes(32 * 64 * 2)),
    ),
    "a head of 500,000 items": ("unreadable", lambda: {"a.dcm": bomb_of_items()}),
    "2000 nested sequences": ("unreadable", lambda: nested(2000)),
    "frames without a description": ("unreadable", lambda: enhanced(num_described=5)),
    "more frames than pixels": ("unreadable", lambda: enhanced(NumberOfFrames=500)),
    "frames of a localizer": (
        "not_ct",
        lambda: enhanced(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER", "NONE"]),
    ),
}


def big_endian_dicom() -> Objects:
    out = []
    for data in slices():
        dataset, fresh = pydicom.dcmread(BytesIO(data)), Dataset()
        dataset.PixelData = np.frombuffer(dataset.PixelData, "<i2").astype(">i2").tobytes()
        for item in dataset:
            fresh.add(item)
        fresh.file_meta = dataset.file_meta
        fresh.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
        buffer = BytesIO()
        fresh.save_as(buffer, implicit_vr=False, little_endian=False, enforce_file_format=True)
        out.append(buffer.getvalue())
    return named(out)


def implicit_vr() -> Objects:
    def change(index: int, dataset: pydicom.Dataset) -> None:
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian

    return edited(change)


def padding() -> Objects:
    """GE's way: -2000 outside the circle of reconstruction, which is no HU."""

    def change(index: int, dataset: pydicom.Dataset) -> None:
        pixels = np.frombuffer(dataset.PixelData, "<i2").reshape(64, 64).copy()
        y, x = np.mgrid[:64, :64]
        pixels[(y - 32) ** 2 + (x - 32) ** 2 > 32**2] = -2000
        dataset.PixelData = pixels.tobytes()
        dataset.add_new("PixelPaddingValue", "SS", -2000)
        dataset.ContrastBolusAgent = "yes"

    return edited(change)
