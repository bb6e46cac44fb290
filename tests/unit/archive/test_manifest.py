"""The manifest: folders of objects to rows, one per series."""

import hashlib
from collections import Counter
from dataclasses import replace
from io import BytesIO

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from covtanet.archive.manifest import (
    Series,
    flag_repeated,
    join_by_uid,
    scan_folder,
    series_from_row,
)
from covtanet.archive.object_kinds import HEADER_BYTES
from covtanet.ct import dicom_headers
from covtanet.errors import AccessError, QcFlag, UnreachableError
from covtanet.phantoms.encodings import dicom_objects
from covtanet.phantoms.phantom import Phantom
from covtanet.storage import ObjectInfo


def scan(objects: dict[str, bytes], folder: str = "a/") -> tuple[list[Series], list[ObjectInfo]]:
    infos = [ObjectInfo(folder + name, len(data), "v1") for name, data in objects.items()]

    def read_head(path: str, num_bytes: int) -> bytes:
        return objects[path.removeprefix(folder)][:num_bytes]

    return scan_folder(folder, infos, read_head, dicom_headers.read_identities)


@pytest.fixture(scope="module")
def series_objects(mild: Phantom) -> list[bytes]:
    return dicom_objects(mild, 5)[:3]


def test_each_nifti_object_is_a_series() -> None:
    series, ignored = scan({"one.nii": b"", "two.NII.GZ": b""})
    assert [(item.source_path, item.source_format) for item in series] == [
        ("a/one.nii", "nifti"),
        ("a/two.NII.GZ", "nifti"),
    ]
    assert ignored == []


def test_dicom_objects_of_any_name_are_one_series(series_objects: list[bytes]) -> None:
    names = ["IM0001", "x.dcm", "scan.bin"]
    series, ignored = scan(dict(zip(names, series_objects, strict=True)))
    assert len(series) == 1
    assert series[0].source_path == "a/"
    assert [member.path for member in series[0].objects] == ["a/IM0001", "a/scan.bin", "a/x.dcm"]
    assert ignored == []


def test_mixed_series_of_a_folder_are_separated(series_objects: list[bytes], mild: Phantom) -> None:
    other = dicom_objects(mild, 6)[0]
    series, _ = scan({"1": series_objects[0], "2": other, "3": series_objects[1]})
    assert sorted(len(item.objects) for item in series) == [1, 2]
    assert len({item.series_key for item in series}) == 2


def test_unreadable_dicom_is_a_separate_row() -> None:
    series, _ = scan(
        {"empty.dcm": b"", "text.ima": b"hello", "cut.dicom": bytes(128) + b"DICM\x02"}
    )
    assert [(item.reason, item.series_uid) for item in series] == [("unreadable", None)] * 3


def test_containers_are_rows_and_the_rest_is_ignored(series_objects: list[bytes]) -> None:
    series, ignored = scan(
        {
            "a.zip": b"PK",
            "b.tar.gz": b"",
            "c.7z": b"",
            "notes.txt": b"x",
            "DICOMDIR": series_objects[0],
        }
    )
    assert [item.reason for item in series] == ["container"] * 3
    assert [item.path for item in ignored] == ["a/notes.txt", "a/DICOMDIR"]


APPLE = bytes.fromhex("0005160700020000") + b"Mac OS X        " + bytes(200)


@pytest.mark.parametrize("content", [APPLE, b"", bytes(4096), b"not what a Mac writes"])
def test_apple_double_files_are_ignored(content: bytes, series_objects: list[bytes]) -> None:
    names = [
        "._IM0.dcm",
        "._IM1",
        "._scan.nii.gz",
        "._scan.nii",
        "._all.zip",
        "__MACOSX/._IM0.dcm",
        "._DICOMDIR",
        "__MACOSX/scan.nii.gz",
        ".AppleDouble/IM0.dcm",
        ".AppleDouble/scan.nii.gz",
    ]
    series, ignored = scan({"IM0.dcm": series_objects[0], **dict.fromkeys(names, content)})
    assert [item.source_path for item in series] == ["a/"]
    assert [item.path for item in ignored] == [f"a/{name}" for name in names]


def test_apple_double_file_of_any_name_is_ignored() -> None:
    """As an upload loses its names."""
    series, ignored = scan({"000001.dcm": APPLE, "000002": APPLE})
    assert series == []
    assert len(ignored) == 2


def test_system_files_are_ignored() -> None:
    junk = {
        ".DS_Store": b"\0\0\0\1Bud1" + bytes(6000),
        "Thumbs.db": b"\xd0\xcf\x11\xe0" + bytes(600),
        "empty": b"",
        "desktop.ini": b"[.ShellClassInfo]",
        "IM0.dcm:Zone.Identifier": b"[ZoneTransfer]",
    }
    series, ignored = scan(junk)
    assert series == []
    assert len(ignored) == len(junk)


def test_dicom_or_nifti_content_under_an_apple_double_name_is_a_series(
    series_objects: list[bytes],
) -> None:
    nifti = (348).to_bytes(4, "little") + bytes(348)
    odd = {
        "._IM0": series_objects[0],
        "__MACOSX/IM1.dcm": series_objects[1],
        "._a.nii": nifti,
        "._b.nii.gz": b"\x1f\x8b",
    }
    series, ignored = scan(odd)
    counts = {item.source_path: len(item.objects) for item in series}
    assert counts == {"a/._a.nii": 1, "a/._b.nii.gz": 1, "a/": 2}
    assert ignored == []


def test_apple_double_file_that_vanishes_is_ignored() -> None:
    def read_head(path: str, num_bytes: int) -> bytes:
        raise FileNotFoundError("gone")

    item = ObjectInfo("a/._IM0.dcm", 100, "v1")
    assert scan_folder("a/", [item], read_head, dicom_headers.read_identities) == ([], [item])


def directory() -> bytes:
    """The beginning of a DICOMDIR."""
    meta = b"\x02\0\0\0UL\x04\0\x9a\0\0\0" + b"\x02\0\x01\0OB\0\0\x02\0\0\0\0\x01"
    meta += b"\x02\0\x02\0UI\x14\x001.2.840.10008.1.3.10"
    return bytes(128) + b"DICM" + meta + b"\x04\0\x30\x11CS\x04\0TEST"


@pytest.mark.parametrize(
    "name", ["DICOMDIR", "dicomdir", "DicomDir.dcm", "DICOMDIR.;1", "DICOMDIR;1", "dicomdir.ima"]
)
@pytest.mark.parametrize("cut", [0, 132, 3000])
def test_dicomdir_is_ignored(name: str, cut: int) -> None:
    """With a preamble, without one, or without magic and file meta."""
    series, ignored = scan({name: directory()[cut:]})
    assert series == []
    assert len(ignored) == 1


@pytest.mark.parametrize("cut", [0, 132])
def test_dicomdir_of_any_name_is_ignored(cut: int) -> None:
    series, ignored = scan({"index.dcm": directory()[cut:], "DICOMDIR.bak": directory()[cut:]})
    assert series == []
    assert len(ignored) == 2


# ---- objects without a preamble


def rewritten(data: bytes, syntax: str, *, meta: bool) -> bytes:
    """An object in another encoding, without preamble and, by default, without file meta."""
    is_implicit, is_little = syntax == ImplicitVRLittleEndian, syntax != ExplicitVRBigEndian
    dataset, fresh, buffer = pydicom.dcmread(BytesIO(data)), Dataset(), BytesIO()
    for item in dataset:
        fresh.add(item)
    fresh.file_meta = dataset.file_meta
    fresh.file_meta.TransferSyntaxUID = UID(syntax)
    fresh.save_as(
        buffer, implicit_vr=is_implicit, little_endian=is_little, enforce_file_format=True
    )
    whole = buffer.getvalue()
    return whole[132 if meta else dicom_headers.transfer_syntax(whole)[1] :]


@pytest.mark.parametrize("suffix", ["", ".dcm"])
@pytest.mark.parametrize("meta", [True, False])
@pytest.mark.parametrize(
    "syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian]
)
def test_objects_without_preamble_are_grouped_by_series(
    series_objects: list[bytes], mild: Phantom, syntax: str, meta: bool, suffix: str
) -> None:
    bare = [
        rewritten(data, syntax, meta=meta)
        for data in [*series_objects, *dicom_objects(mild, 6)[:2]]
    ]
    series, ignored = scan({f"IM{index}{suffix}": data for index, data in enumerate(bare)})
    assert [(item.source_format, item.reason, len(item.objects)) for item in series] == [
        ("dicom", None, 3),
        ("dicom", None, 2),
    ]
    assert ignored == []
    (whole,) = scan({"IM0": series_objects[0]})[0]
    assert (series[0].series_uid, series[0].study_uid) == (whole.series_uid, whole.study_uid)


def test_objects_with_and_without_preamble_are_one_series(series_objects: list[bytes]) -> None:
    series, _ = scan(
        {"1": series_objects[0], "2": series_objects[1][132:], "3.dcm": series_objects[2][128:]}
    )
    assert [len(item.objects) for item in series] == [3]


def test_other_files_than_dicom_are_recognized_by_their_first_bytes() -> None:
    rng = np.random.default_rng(0)
    others = {f"random{index}": rng.bytes(500) for index in range(2000)}
    others |= {
        "text": b"The quick brown fox.\n" * 50,
        "utf16": "Befund der Untersuchung".encode("utf-16"),
        "zeros": bytes(999),
        "group 8 alone": b"\x08\0" + rng.bytes(500),
        "group 8 of text": b"\x08\0\x05\0" + b"x" * 500,
        "falling tags": b"\x08\0\x16\0UI\x02\x001\0\x08\0\x05\0CS\x02\0AB" + bytes(99),
        "unknown VR": b"\x08\0\x05\0ZZ\x02\0AB" + bytes(99),
        "magic of nothing": b"DICM" + b"x" * 99,
        "dicom of no series": b"\x08\0\x05\0CS\x0a\0ISO_IR 100\x08\0\x60\0CS\x02\0CT",
    }
    series, ignored = scan(others)
    assert series == []
    assert len(ignored) == len(others)
    series, _ = scan({f"{name}.dcm": data for name, data in list(others.items())[-12:]})
    assert {item.reason for item in series} == {"unreadable"}


def test_long_header_without_preamble_is_read_further(
    series_objects: list[bytes],
) -> None:
    bare = series_objects[0][132:]
    at = bare.index(b"\x10\0\x10\0PN")
    note = (
        b"\x09\0\x10\0LO\x04\0NOTE"
        + b"\x09\0\x01\x10OB\0\0"
        + (HEADER_BYTES * 2).to_bytes(4, "little")
    )
    series, _ = scan({"IM0": bare[:at] + note + bytes(HEADER_BYTES * 2) + bare[at:]})
    assert [item.reason for item in series] == [None]
    assert series[0].series_uid == scan({"IM0": bare})[0][0].series_uid


def test_series_key_follows_from_path_and_uid() -> None:
    one = Series(source_path="a/", source_format="dicom", objects=(), series_uid="1.2")
    assert one.series_key == hashlib.sha256(b"a/\n1.2").hexdigest()[:32]
    other = Series(source_path="b/", source_format="dicom", objects=(), series_uid="1.2")
    assert one.series_key != other.series_key


def test_series_survive_as_rows(series_objects: list[bytes]) -> None:
    series, _ = scan({"1": series_objects[0]})
    assert series_from_row(series[0].to_row()) == series[0]


def test_source_version_changes_with_an_object(series_objects: list[bytes]) -> None:
    versions = {
        Series(source_path="a/", source_format="dicom", objects=objects).to_row()["source_version"]
        for objects in (
            (ObjectInfo("a/1", 5, "x"),),
            (ObjectInfo("a/1", 5, "y"),),
            (ObjectInfo("a/1", 6, "x"),),
        )
    }
    assert len(versions) == 3


def test_object_that_vanishes_between_two_reads_of_its_header_is_a_row(
    series_objects: list[bytes],
) -> None:
    """It has the magic and no UIDs in its first bytes, and is gone when more of it is read."""
    item = ObjectInfo("a/1", 1 << 20, "v1")

    def read_head(path: str, num_bytes: int) -> bytes:
        if num_bytes > HEADER_BYTES:
            raise FileNotFoundError("gone")
        return bytes(128) + b"DICM"

    series, ignored = scan_folder("a/", [item], read_head, dicom_headers.read_identities)
    assert [(item.source_path, item.source_format, item.reason) for item in series] == [
        ("a/1", "other", "vanished")
    ]
    assert ignored == []


@pytest.mark.parametrize(
    ("error", "reason"),
    [(OSError("an answer broke off"), "storage"), (FileNotFoundError(), "vanished")],
)
def test_series_next_to_an_object_that_could_not_be_read_is_flagged(
    series_objects: list[bytes], error: OSError, reason: str
) -> None:
    """It may be a slice of the series, whose numbers would be wrong without a word."""
    objects = {f"a/{index}": data for index, data in enumerate(series_objects)}

    def read_head(path: str, num_bytes: int) -> bytes:
        if path == "a/2":
            raise error
        return objects[path][:num_bytes]

    infos = [ObjectInfo(path, len(data), "v1") for path, data in objects.items()]
    series, ignored = scan_folder("a/", infos, read_head, dicom_headers.read_identities)
    assert [(each.source_path, each.reason, each.qc_flags) for each in series] == [
        ("a/2", reason, ()),
        ("a/", None, ("unread_objects",)),
    ]
    assert ignored == []


def test_flags_of_joined_folders_are_those_of_all(series_objects: list[bytes]) -> None:
    (series,), _ = scan({"1": series_objects[0]})
    parts = [series, replace(series, source_path="b/", qc_flags=(QcFlag.UNREAD_OBJECTS,))]
    counts = Counter({str(series.series_uid): 2})
    (joined,) = join_by_uid((part.to_row() for part in parts), counts)
    assert (joined["source_path"], joined["qc_flags"]) == ("a/", ["unread_objects"])


@pytest.mark.parametrize("error", [AccessError("refused"), UnreachableError("gone")])
def test_fault_of_every_object_ends_the_scan(error: OSError) -> None:
    def read_head(path: str, num_bytes: int) -> bytes:
        raise error

    infos = [ObjectInfo("a/1", 7, "v1")]
    with pytest.raises(type(error)):
        scan_folder("a/", infos, read_head, dicom_headers.read_identities)


def test_many_objects_of_every_kind_keep_their_order_and_their_series(
    series_objects: list[bytes],
) -> None:
    """More than are read at a time."""
    objects = {f"{k:03d}": series_objects[k % 3] for k in range(200)}
    objects |= (
        {f"{k:03d}.nii": b"" for k in range(0, 200, 50)} | {"070.dcm": b"no"} | {"071.txt": b"no"}
    )
    series, ignored = scan(dict(sorted(objects.items())))
    assert [item.source_path for item in series[:-1]] == [
        "a/000.nii",
        "a/050.nii",
        "a/070.dcm",
        "a/100.nii",
        "a/150.nii",
    ]
    assert len(series[-1].objects) == 200
    assert [item.path for item in ignored] == ["a/071.txt"]


def repeated() -> tuple[list[dict[str, object]], Counter[str]]:
    rows = [
        Series(
            source_path=path,
            source_format="dicom",
            objects=(ObjectInfo(f"{path}1", 5, "x"),),
            series_uid=uid,
        ).to_row()
        for path, uid in (("b/", "1.2"), ("a/", "1.2"), ("c/", "1.3"))
    ]
    return rows, Counter(row["series_uid"] for row in rows)


def test_a_uid_in_two_folders_is_two_flagged_series() -> None:
    rows, counts = repeated()
    assert [row["qc_flags"] for row in flag_repeated(rows, counts)] == [
        ["series_uid_repeated"]
    ] * 2 + [[]]


def test_group_by_uid_joins_folders() -> None:
    rows, counts = repeated()
    joined = {row["source_path"]: row for row in join_by_uid(rows, counts)}
    assert set(joined) == {"a/", "c/"}
    assert [item["path"] for item in joined["a/"]["objects"]] == ["a/1", "b/1"]
