"""Cases of DICOM series: acquisitions, localizers, odd texts, objects beside the series."""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
from chests import (
    APPLE_DOUBLE,
    chest,
    datasets,
    enhanced,
    nifti_gz,
    save,
    set_pixels,
    set_uid,
    to_bytes,
    write,
)
from pydicom.config import disable_value_validation
from pydicom.dataset import Dataset
from pydicom.uid import (
    ImplicitVRLittleEndian,
    MediaStorageDirectoryStorage,
)
from right_rows import Case, Right, Row, refused, sound

# 00: nothing odd


def plain_dicom(folder: Path, name: str) -> Right:
    save(folder, datasets(name))
    return Right(rows=(sound(spacing_mm=(11.0, 3.75, 3.75)),), hu=chest().hu)


# 07, 08: two acquisitions


def interleaved(
    folder: Path,
    name: str,
    *,
    by: str,
    shift_mm: float = 5.5,
    num_second: int = 24,
) -> Right:
    """Write two breath-holds whose slices lie between each other. by: the attribute
    that differs.
    """
    first, second = datasets(name), datasets(name, chest(seed=5))[:num_second]
    for dataset in second:
        x, y, z = dataset.ImagePositionPatient
        dataset.ImagePositionPatient = [x, y, f"{float(z) + shift_mm:g}"]
    for number, stack in enumerate((first, second)):
        for index, dataset in enumerate(stack):
            set_uid(dataset, f"{dataset.SeriesInstanceUID[:56]}.{number}.{index}")
            dataset.AcquisitionNumber = number + 1 if by in ("number", "all") else 1
            is_sharp = number == 1 and by in ("kernel", "all")
            dataset.ConvolutionKernel = "B70f" if is_sharp else "B30f"
            if by in ("time", "all"):
                dataset.AcquisitionTime = f"1015{30 * number + index * 0.4:09.6f}"
    pairs = [dataset for pair in zip(first, second, strict=False) for dataset in pair]
    save(folder, [*pairs, *first[num_second:]])
    return Right(rows=(refused("mixed_acquisitions"),))


def same_places(folder: Path, name: str) -> Right:
    """Write two phases of one scan at the same places."""
    first, second = datasets(name), datasets(name, chest(seed=5))
    for index, dataset in enumerate(second):
        set_uid(dataset, f"{dataset.SeriesInstanceUID[:56]}.9.{index}")
        dataset.AcquisitionNumber = 2
    save(folder, [*first, *second])
    return Right(rows=(refused("duplicate_slice"),))


def timed(folder: Path, name: str, *, attributes: Callable[[int, int], dict[str, Any]]) -> Right:
    """Write one regular stack. attributes: of a slice by its number from the feet and the count."""
    series = datasets(name)
    for index, dataset in enumerate(series):
        for attribute, value in attributes(index, len(series)).items():
            setattr(dataset, attribute, value)
    save(folder, series)
    return Right(rows=(sound(),), hu=chest().hu)


def clock(seconds: float) -> str:
    """A DICOM time some seconds after 10:15."""
    return f"1015{seconds:09.6f}"


def shuffled_place(index: int, count: int) -> int:
    """A place that follows from the slice's, but not in order."""
    return int(np.random.default_rng(1).permutation(count)[index])


ONE_ACQUISITION: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "time_of_each_slice": lambda k, n: {
        "AcquisitionTime": clock(k * 0.5), "ContentTime": clock(k * 0.5)
    },
    "head_first": lambda k, n: {"AcquisitionTime": clock((n - k) * 0.5)},
    "four_slices_a_turn": lambda k, n: {"AcquisitionTime": clock(k // 4 * 2.0)},
    "one_time": lambda k, n: {"AcquisitionTime": "101500", "AcquisitionNumber": 3},
    "number_of_each_slice": lambda k, n: {
        "AcquisitionNumber": k + 1, "AcquisitionTime": clock(k * 0.5)
    },
    "reconstructed_out_of_order": lambda k, n: {
        "AcquisitionTime": "101500", "ContentTime": clock(shuffled_place(k, n) * 0.5)
    },
    "over_midnight": lambda k, n: {
        "AcquisitionTime": f"{'235955' if k < 12 else '000005'}.{k:02d}",
        "AcquisitionDate": "20200301" if k < 12 else "20200302",
    },
    "end_to_end": lambda k, n: {
        "AcquisitionNumber": 1 + 2 * k // n, "AcquisitionTime": clock(k * 0.5 + 10 * (2 * k // n))
    },
    "three_end_to_end": lambda k, n: {"AcquisitionNumber": 1 + 3 * k // n},
    "end_to_end_upper_first": lambda k, n: {
        "AcquisitionNumber": 2 - 2 * k // n,
        "AcquisitionTime": clock(k * 0.5 + 20 * (1 - 2 * k // n)),
    },
}  # fmt: skip


# 14: objects that systems leave beside series


def apple_double(folder: Path, name: str) -> Right:
    """Write a series and a volume as a Mac leaves them, each file with a companion."""
    series = datasets(name)
    save(folder, series, "IM{:04d}.dcm")
    companions = {f"._IM{index:04d}.dcm": APPLE_DOUBLE for index in range(len(series))}
    write(
        folder,
        {
            **companions,
            "ct.nii.gz": nifti_gz(chest()),
            "._ct.nii.gz": APPLE_DOUBLE,
            "._ct.nii": APPLE_DOUBLE,
        },
    )
    write(
        folder,
        {
            "._study.zip": APPLE_DOUBLE,
            "._IM": APPLE_DOUBLE,
            ".DS_Store": b"\0\0\0\1Bud1" + bytes(6000),
        },
    )
    return Right(rows=(sound(),), num_rows=2, num_ignored=len(series) + 5)


def apple_folder(folder: Path, name: str) -> Right:
    """Write a series beside the folder of companions that an unpacked zip of a Mac has."""
    save(folder / "study", datasets(name), "IM{:04d}.dcm")
    write(folder, {f"__MACOSX/study/._IM{index:04d}.dcm": APPLE_DOUBLE for index in range(3)})
    return Right(rows=(sound(),), num_ignored=3)


def directory(folder: Path, name: str, *, file_name: str) -> Right:
    """Write a series with the directory object of a patient CD."""
    series = datasets(name)
    save(folder, series)
    listed = Dataset()
    listed.file_meta = copy.deepcopy(series[0].file_meta)
    listed.file_meta.MediaStorageSOPClassUID = MediaStorageDirectoryStorage
    listed.FileSetID = "CD"
    listed.DirectoryRecordSequence = []
    write(folder, {file_name: to_bytes(listed)})
    return Right(rows=(sound(),), num_ignored=1)


# 22, 42: texts


def decimal_strings(folder: Path, name: str) -> Right:
    """Write numbers with exponents, signs, blanks and more characters than they may have."""
    series = datasets(name)
    with disable_value_validation():
        for dataset in series:
            dataset.PixelSpacing = ["3.75E+00", "+3.750000000000000000"]
            dataset.RescaleSlope, dataset.RescaleIntercept = " 1.0000E+000 ", "-1.024e3"
            dataset.ImageOrientationPatient = [
                "1.0000000000000000",
                "-0",
                "0.0",
                "1e-17",
                "1",
                "0.00000000000000001",
            ]
    save(folder, series)
    return Right(rows=(sound(spacing_mm=(11.0, 3.75, 3.75)),), hu=chest().hu)


def padded_uids(folder: Path, name: str) -> Right:
    """Write UIDs of odd length padded by a NUL in one slice and by a blank in the next."""
    uid = b"1.2.826.0.1.3680043.10.1471.4.2"
    for index, dataset in enumerate(datasets(name)):
        dataset.SeriesInstanceUID = uid.decode()
        dataset.PatientID = ("PHANTOM", "PHANTOM ")[index % 2]
        pad = (b"\0", b" ")[index % 2]
        write(folder, {f"IM{index:04d}": to_bytes(dataset).replace(uid + b"\0", uid + pad)})
    return Right(rows=(sound(),), hu=chest().hu)


# 25: localizers


def with_localizers(
    folder: Path,
    name: str,
    *,
    count: int,
    has_position: bool = True,
    size_px: int = 64,
) -> Right:
    series = datasets(name)
    scout = partial(scout_of, series[0], has_position=has_position, size_px=size_px)
    scouts = [scout(number) for number in range(count)]
    save(folder, [*scouts, *series])
    return Right(rows=(sound(chest(), "localizer_dropped"),), hu=chest().hu)


def only_localizers(folder: Path, name: str) -> Right:
    head = datasets(name)[0]
    save(folder, [scout_of(head, number) for number in range(2)])
    return Right(rows=(refused("not_ct"),))


def scout_of(
    head: Dataset,
    number: int,
    *,
    has_position: bool = True,
    size_px: int = 64,
) -> Dataset:
    """Return a localizer from the front, or from the side, under the UIDs of a series."""
    scout = copy.deepcopy(head)
    scout.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    set_uid(scout, f"{head.SeriesInstanceUID}.7{number}")
    columns = ["0", "1", "0"] if number else ["1", "0", "0"]
    scout.ImageOrientationPatient = [*columns, "0", "0", "-1"]
    scout.PixelSpacing = ["4.2", "3.75"]
    set_pixels(scout, np.full((size_px, size_px), 1000))
    if not has_position:
        del scout.ImagePositionPatient, scout.ImageOrientationPatient
    return scout


# 32: no preamble


def without_preamble(folder: Path, name: str, *, suffix: str, is_implicit: bool = False) -> Right:
    series = datasets(name)
    for index, dataset in enumerate(series):
        if is_implicit:
            dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
        write(folder, {f"IM{index:04d}{suffix}": to_bytes(dataset)[132:]})
    return Right(rows=(sound(),), hu=chest().hu)


def without_meta(folder: Path, name: str, *, suffix: str) -> Right:
    """Write data sets in Implicit VR with nothing before them."""
    for index, dataset in enumerate(datasets(name)):
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
        data = to_bytes(dataset)
        image_type = data.index(b"\x08\x00\x08\x00", 132)  # the first element
        write(folder, {f"IM{index:04d}{suffix}": data[image_type:]})
    return Right(rows=(sound(),), hu=chest().hu)


# 38, 41: Enhanced CT


def legacy_converted(folder: Path, name: str) -> Right:
    series = datasets(name)
    for dataset in series:
        dataset.PatientName = "PHANTOM^"
        dataset.PatientPosition, dataset.AcquisitionNumber, dataset.KVP = "HFS", 1, "120"
        dataset.BodyPartExamined, dataset.Laterality, dataset.PositionReferenceIndicator = (
            "CHEST",
            "",
            "",
        )
        dataset.SliceLocation = dataset.ImagePositionPatient[2]
    uid = series[0].SeriesInstanceUID[:56]
    whole = hd.legacy.LegacyConvertedEnhancedCTImage(
        series,
        series_instance_uid=f"{uid}.1",
        series_number=2,
        sop_instance_uid=f"{uid}.2",
        instance_number=1,
    )
    write(folder, {"legacy.dcm": to_bytes(whole)})
    return Right(rows=(sound(),), hu=chest().hu)


def plain_enhanced(folder: Path, name: str) -> Right:
    save(folder, [enhanced(datasets(name))])
    return Right(rows=(sound(),), hu=chest().hu)


def two_times(folder: Path, name: str, *, in_one_object: bool) -> Right:
    """Write Enhanced CT with two volumes in time at the same places."""
    series = datasets(name)
    if in_one_object:
        save(folder, [enhanced([*series, *series])])
    else:
        both = [enhanced(series), enhanced(series)]
        set_uid(both[1], f"{series[0].SOPInstanceUID[:60]}.2")
        both[1].AcquisitionNumber = 2
        save(folder, both)
    return Right(rows=(refused("duplicate_slice"),))


# 51: rescale types


def rescale_type(folder: Path, name: str, *, words: str, row: Row) -> Right:
    series = datasets(name)
    for dataset in series:
        dataset.RescaleType = words
    save(folder, series)
    return Right(rows=(row,))


def cases() -> Iterator[tuple[str, Case]]:
    """Yield the cases by their names."""
    yield "00_dicom", plain_dicom
    yield "00_enhanced", plain_enhanced
    for by in ("number", "kernel", "time", "all"):
        yield f"07_interleaved_by_{by}", partial(interleaved, by=by)
    yield "07_interleaved_unevenly", partial(interleaved, by="all", shift_mm=4.0)
    yield "07_interleaved_in_part", partial(interleaved, by="all", num_second=14)
    for kind, attributes in ONE_ACQUISITION.items():
        yield f"07_one_stack_{kind}", partial(timed, attributes=attributes)
    yield "08_two_phases_same_places", same_places
    yield "14_apple_double", apple_double
    yield "14_apple_folder", apple_folder
    for file_name in ("DICOMDIR", "dicomdir"):
        yield f"14_{file_name}", partial(directory, file_name=file_name)
    yield "22_decimal_strings", decimal_strings
    yield "25_localizer", partial(with_localizers, count=1)
    yield "25_two_localizers", partial(with_localizers, count=2)
    yield "25_localizer_without_position", partial(with_localizers, count=1, has_position=False)
    yield "25_localizer_of_the_same_size", partial(with_localizers, count=1, size_px=96)
    yield "25_localizers_alone", only_localizers
    for suffix in ("", ".dcm", ".ima"):
        yield f"32_no_preamble{suffix}", partial(without_preamble, suffix=suffix)
    yield "32_no_preamble_implicit_vr", partial(without_preamble, suffix="", is_implicit=True)
    for suffix in ("", ".dcm"):
        yield f"32_no_file_meta{suffix}", partial(without_meta, suffix=suffix)
    yield "38_legacy_converted", legacy_converted
    yield "41_enhanced_two_times_in_one", partial(two_times, in_one_object=True)
    yield "41_enhanced_two_times_in_two", partial(two_times, in_one_object=False)
    yield "42_uids_padded_differently", padded_uids
    for words in (
        "HU",
        "Hounsfield Units",
        "HOUNSFIELD",
        "hounsfield unit",
        "HOUNSFIELD_UNITS",
        "",
    ):
        word = words.replace(" ", "_") or "empty"
        yield f"51_rescale_type_{word}", partial(rescale_type, words=words, row=sound())
    for words in ("Z_EFF", "ED", "EDW", "MGML"):
        yield f"51_rescale_type_{words}", partial(rescale_type, words=words, row=refused("not_hu"))
