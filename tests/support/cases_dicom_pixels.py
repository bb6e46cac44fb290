"""Cases of DICOM pixels: padding, excess bytes, bits, compressed streams, thousands of slices."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from chests import (
    chest,
    datasets,
    encapsulate,
    enhanced,
    pixels,
    round_field,
    save,
    set_pixels,
    set_uid,
    stream_of,
    to_bytes,
    with_excess,
    write,
)
from pydicom.encaps import encapsulate_extended
from pydicom.uid import (
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)
from right_rows import Case, Right, Row, refused, sound

# 10, 23: padding


@dataclass(frozen=True, kw_only=True)
class Padding:
    """The value stored outside the circle of reconstruction, and the header's statement of it."""

    stored: int
    is_signed: bool = False
    intercept: int = -1024
    declared: dict[str, tuple[str, int]] = field(default_factory=dict)
    spread: int = 0


VALUE, LIMIT = "PixelPaddingValue", "PixelPaddingRangeLimit"
PADDINGS = {
    "unsigned_63536": Padding(stored=63536, declared={VALUE: ("US", 63536)}),
    "unsigned_62536": Padding(stored=62536, declared={VALUE: ("US", 62536)}),
    "unsigned_63536_called_signed": Padding(stored=63536, declared={VALUE: ("SS", -2000)}),
    "unsigned_range": Padding(
        stored=63536, spread=300, declared={VALUE: ("US", 63536), LIMIT: ("US", 63836)}
    ),
    "unsigned_range_downwards": Padding(
        stored=63536, spread=300, declared={VALUE: ("US", 63836), LIMIT: ("US", 63536)},
    ),
    "signed_2000": Padding(stored=-2000, is_signed=True, declared={VALUE: ("SS", -2000)}),
    "signed_2000_as_unsigned": Padding(
        stored=-2000, is_signed=True, declared={VALUE: ("US", 63536)}
    ),
    "signed_2000_undeclared": Padding(stored=-2000, is_signed=True),
    "signed_range": Padding(
        stored=-2000,
        spread=300,
        is_signed=True,
        declared={VALUE: ("SS", -2000), LIMIT: ("SS", -1700)},
    ),
    "signed_32768": Padding(stored=-32768, is_signed=True, declared={VALUE: ("SS", -32768)}),
    "0_of_1024": Padding(stored=0, declared={VALUE: ("US", 0)}),
    "0_of_0": Padding(stored=0, is_signed=True, intercept=0, declared={VALUE: ("SS", 0)}),
    "1024_of_1024": Padding(stored=1024, declared={VALUE: ("US", 1024)}),
    "0_of_0_undeclared": Padding(stored=0, is_signed=True, intercept=0),
}  # fmt: skip


def padded(folder: Path, name: str, *, padding: Padding, **how: Any) -> Right:
    """Write slices whose corners hold padding."""
    outside, rng = round_field(chest(), 175.0), np.random.default_rng(0)
    series = datasets(name)
    for dataset in series:
        stored = pixels(dataset) - 1024 - padding.intercept
        stored[outside] = padding.stored + rng.integers(0, padding.spread + 1, int(outside.sum()))
        dataset.PixelRepresentation = int(padding.is_signed)
        dataset.RescaleIntercept = str(padding.intercept)
        for attribute, (vr, value) in padding.declared.items():
            dataset.add_new(attribute, vr, value)
        set_pixels(dataset, stored)
        if how:
            dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    save(folder, series, **how)
    # The flag tells of declared padding below -1024 HU; other padding may be told as well.
    is_below = padding.stored < 0 or padding.stored > 30000
    flags = ("padding",) if is_below and padding.declared else ()
    row = sound(chest(), *flags, optional=("padding",))
    return Right(rows=(row,))


# 13: bytes behind the pixels


def excess(folder: Path, name: str, *, num_bytes: int, rows: tuple[Row, ...] = ()) -> Right:
    objects = [with_excess(to_bytes(dataset), bytes(num_bytes)) for dataset in datasets(name)]
    write(folder, {f"IM{index:04d}": data for index, data in enumerate(objects)})
    return Right(rows=rows or (sound(),), hu=chest().hu)


# 18, 19: bits


def overlay_bits(folder: Path, name: str, *, is_signed: bool) -> Right:
    """Write 12 bits with an overlay above them, the patient prone and feet first, from the head."""
    phantom, rng = chest(), np.random.default_rng(1)
    series = datasets(name)
    for index, dataset in enumerate(series):
        hu = np.clip(pixels(dataset) - 1024, -1024, 2047)
        stored = (hu if is_signed else hu + 1024) & 0xFFF
        stored |= (rng.random(stored.shape) < 0.3).astype(np.int32) << 12
        dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 12, 11, int(is_signed)
        dataset.RescaleIntercept = "0" if is_signed else "-1024"
        set_pixels(dataset, stored[::-1, ::-1])
        corner = (phantom.affine @ [index, 95, 95, 1])[:3]
        dataset.ImagePositionPatient = [f"{mm:.6g}" for mm in corner]
        dataset.ImageOrientationPatient = ["-1", "0", "0", "0", "-1", "0"]
        dataset.PatientPosition, dataset.InstanceNumber = "FFP", 1
        del dataset.SliceThickness
    save(folder, series[::-1])
    return Right(rows=(sound(),), hu=np.clip(phantom.hu, -1024, 2047))


def high_bit(folder: Path, name: str, *, bits_stored: int, high: int, shift: int) -> Right:
    """Write a HighBit that is not BitsStored - 1, with the values up there or in the low bits."""
    series = datasets(name)
    for dataset in series:
        stored = np.clip(pixels(dataset), 0, 4095) << shift
        dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = bits_stored, high, 0
        set_pixels(dataset, stored)
    save(folder, series)
    wrong = ("undecodable",) if shift else ("undecodable", "not_hu")
    return Right(rows=(sound(), refused(*wrong)))


# 20, 21, 37: compressed pixels


def fragments(folder: Path, name: str, *, syntax: str) -> Right:
    """Write one frame in three fragments without a table of offsets."""
    series = datasets(name)
    for dataset in series:
        stream = stream_of(pixels(dataset).astype(np.uint16), syntax)
        dataset.PixelRepresentation = 0
        third = len(stream) // 6 * 2
        encapsulate(
            dataset,
            [stream[:third], stream[third : 2 * third], stream[2 * third :]],
            syntax,
        )
    save(folder, series)
    return Right(rows=(sound(),), hu=chest().hu)


def enhanced_fragments(folder: Path, name: str, *, has_table: bool) -> Right:
    """Write Enhanced CT in JPEG 2000 with an Extended Offset Table, or two fragments a frame."""
    series = datasets(name)
    whole = enhanced(series)
    whole.PixelRepresentation = 0
    streams = [stream_of(pixels(dataset).astype(np.uint16), JPEG2000Lossless) for dataset in series]
    halves: list[bytes] = []
    for stream in streams:
        middle = len(stream) // 4 * 2
        halves += [stream[:middle], stream[middle:]]
    encapsulate(whole, halves, JPEG2000Lossless)
    if has_table:
        whole.PixelData, offsets, lengths = encapsulate_extended(streams)
        whole.ExtendedOffsetTable, whole.ExtendedOffsetTableLengths = offsets, lengths
    save(folder, [whole])
    return Right(rows=(sound(),), hu=chest().hu)


def signed_codec(folder: Path, name: str, *, syntax: str, as_unsigned: bool = False) -> Right:
    """Write HU as they are, negative ones among them, compressed."""
    series = datasets(name)
    for dataset in series:
        stored = (pixels(dataset) - 1024).astype(np.int16)
        dataset.RescaleIntercept = "0"
        set_pixels(dataset, stored)
        if syntax == RLELossless:
            dataset.compress(RLELossless)
        else:
            stream = stream_of(stored.view(np.uint16) if as_unsigned else stored, syntax)
            encapsulate(dataset, [stream], syntax)
    save(folder, series)
    return Right(rows=(sound(),), hu=chest().hu)


# 43: thousands of slices


def nearly_2000_slices(folder: Path, name: str, num_slices: int = 1900) -> Right:
    """Write 512 x 512 x 1900 voxels in JPEG-LS, 0.5 mm apart."""
    phantom, head = chest(128, 54, 2.8, 5.0), datasets(name)[0]
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for index in range(num_slices):
        hu = np.kron(phantom.hu[index * 54 // num_slices], np.ones((4, 4), np.int16))
        hu = hu + rng.integers(-20, 20, hu.shape, dtype=np.int16)
        dataset = copy.deepcopy(head)
        dataset.Rows = dataset.Columns = 512
        dataset.PixelSpacing, dataset.PixelRepresentation = ["0.7", "0.7"], 0
        set_uid(dataset, f"{head.SeriesInstanceUID[:50]}.{index}")
        dataset.ImagePositionPatient = ["-179", "-179", f"{-475 + 0.5 * index:g}"]
        stored = (np.clip(hu, -1024, 3000) + 1024).astype(np.uint16)
        encapsulate(dataset, [stream_of(stored, JPEGLSLossless)], JPEGLSLossless)
        (folder / f"IM{index:05d}").write_bytes(to_bytes(dataset))
    return Right(rows=(Row(), refused("too_large")))


def cases() -> Iterator[tuple[str, Case]]:
    """Yield all cases by their names."""
    for kind, padding in PADDINGS.items():
        yield f"10_padding_{kind}", partial(padded, padding=padding)
    implicit = partial(padded, implicit_vr=True, little_endian=True)
    yield "23_padding_implicit_vr_signed", partial(implicit, padding=PADDINGS["signed_2000"])
    yield "23_padding_implicit_vr_unsigned", partial(implicit, padding=PADDINGS["unsigned_63536"])
    for num_bytes in (1, 2, 22, 23, 1024):
        yield f"13_excess_of_{num_bytes}", partial(excess, num_bytes=num_bytes)
    one_frame = 2 * 96 * 96
    yield (
        "13_excess_of_a_frame",
        partial(excess, num_bytes=one_frame, rows=(sound(), refused("undecodable"))),
    )
    yield "18_overlay_bits", partial(overlay_bits, is_signed=False)
    yield "18_overlay_bits_signed", partial(overlay_bits, is_signed=True)
    yield "19_high_bit_15_of_12", partial(high_bit, bits_stored=12, high=15, shift=4)
    yield "19_high_bit_15_of_12_values_below", partial(high_bit, bits_stored=12, high=15, shift=0)
    yield "19_high_bit_11_of_16", partial(high_bit, bits_stored=16, high=11, shift=0)
    for syntax, word in ((JPEG2000Lossless, "jpeg2000"), (JPEGLSLossless, "jpeg_ls")):
        yield f"20_fragments_{word}", partial(fragments, syntax=syntax)
    yield "21_enhanced_offset_table", partial(enhanced_fragments, has_table=True)
    yield "21_enhanced_fragments", partial(enhanced_fragments, has_table=False)
    yield "37_rle", partial(signed_codec, syntax=RLELossless)
    yield "37_jpeg2000", partial(signed_codec, syntax=JPEG2000Lossless)
    yield "37_jpeg2000_unsigned", partial(signed_codec, syntax=JPEG2000Lossless, as_unsigned=True)
    yield "37_jpeg_ls", partial(signed_codec, syntax=JPEGLSLossless)
    yield "37_jpeg_lossless", partial(signed_codec, syntax=JPEGLosslessSV1)
