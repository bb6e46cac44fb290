"""What counts as a series: folders of objects to manifest rows."""

import hashlib
from collections import Counter

import pytest

from covtanet.ct import dicom_head
from covtanet.data.manifest import HEAD_BYTES, Series, flag_repeated, join_by_uid, scan_folder, series_from_row
from covtanet.data.phantom import Phantom
from covtanet.data.phantom_archive import dicom_objects
from covtanet.storage import ObjectInfo


def scan(objects: dict[str, bytes], folder: str = "a/") -> tuple[list[Series], list[ObjectInfo]]:
    infos = [ObjectInfo(folder + name, len(data), "v1") for name, data in objects.items()]

    def read_head(path: str, num_bytes: int) -> bytes:
        return objects[path.removeprefix(folder)][:num_bytes]

    return scan_folder(folder, infos, read_head, dicom_head.read_identities)


@pytest.fixture(scope="module")
def series_objects(mild: Phantom) -> list[bytes]:
    return dicom_objects(mild, 5)[:3]


def test_nifti_objects_are_series_each() -> None:
    found, ignored = scan({"one.nii": b"", "two.NII.GZ": b""})
    assert [(each.source_path, each.source_format) for each in found] == [
        ("a/one.nii", "nifti"),
        ("a/two.NII.GZ", "nifti"),
    ]
    assert ignored == []


def test_dicom_objects_are_a_series_whatever_their_names(series_objects: list[bytes]) -> None:
    names = ["IM0001", "x.dcm", "scan.bin"]
    found, ignored = scan(dict(zip(names, series_objects, strict=True)))
    assert len(found) == 1
    assert found[0].source_path == "a/"
    assert [item.path for item in found[0].objects] == ["a/IM0001", "a/scan.bin", "a/x.dcm"]
    assert ignored == []


def test_mixed_series_are_told_apart(series_objects: list[bytes], mild: Phantom) -> None:
    other = dicom_objects(mild, 6)[0]
    found, _ = scan({"1": series_objects[0], "2": other, "3": series_objects[1]})
    assert sorted(len(each.objects) for each in found) == [1, 2]
    assert len({each.series_key for each in found}) == 2


def test_unreadable_dicom_is_a_row_of_its_own() -> None:
    found, _ = scan({"empty.dcm": b"", "text.ima": b"hello", "cut.dicom": bytes(128) + b"DICM\x02"})
    assert [(each.reason, each.series_uid) for each in found] == [("unreadable", None)] * 3


def test_containers_are_rows_and_the_rest_is_ignored(series_objects: list[bytes]) -> None:
    found, ignored = scan(
        {"a.zip": b"PK", "b.tar.gz": b"", "c.7z": b"", "notes.txt": b"x", "DICOMDIR": series_objects[0]}
    )
    assert [each.reason for each in found] == ["container"] * 3
    assert [item.path for item in ignored] == ["a/notes.txt", "a/DICOMDIR"]


def test_series_key_follows_from_path_and_uid() -> None:
    one = Series(source_path="a/", source_format="dicom", objects=(), series_uid="1.2")
    assert one.series_key == hashlib.sha256(b"a/\n1.2").hexdigest()[:32]
    other = Series(source_path="b/", source_format="dicom", objects=(), series_uid="1.2")
    assert one.series_key != other.series_key


def test_rows_come_back_as_series(series_objects: list[bytes]) -> None:
    found, _ = scan({"1": series_objects[0]})
    assert series_from_row(found[0].to_row()) == found[0]


def test_source_version_changes_with_an_object(series_objects: list[bytes]) -> None:
    versions = {
        Series(source_path="a/", source_format="dicom", objects=objects).to_row()["source_version"]
        for objects in ((ObjectInfo("a/1", 5, "x"),), (ObjectInfo("a/1", 5, "y"),), (ObjectInfo("a/1", 6, "x"),))
    }
    assert len(versions) == 3


def test_object_that_vanishes_between_two_reads_of_its_header_is_a_row(series_objects: list[bytes]) -> None:
    """It has the magic and no UIDs in its first bytes, and is gone when more of it is read."""
    item = ObjectInfo("a/1", 1 << 20, "v1")

    def read_head(path: str, num_bytes: int) -> bytes:
        if num_bytes > HEAD_BYTES:
            raise FileNotFoundError("gone")
        return bytes(128) + b"DICM"

    found, ignored = scan_folder("a/", [item], read_head, dicom_head.read_identities)
    assert [(each.source_path, each.source_format, each.reason) for each in found] == [("a/1", "other", None)]
    assert ignored == []


def test_many_objects_of_every_kind_keep_their_order_and_their_series(series_objects: list[bytes]) -> None:
    """More than are read at a time."""
    objects = {f"{k:03d}": series_objects[k % 3] for k in range(200)}
    objects |= {f"{k:03d}.nii": b"" for k in range(0, 200, 50)} | {"070.dcm": b"no"} | {"071.txt": b"no"}
    found, ignored = scan(dict(sorted(objects.items())))
    assert [each.source_path for each in found[:-1]] == [
        "a/000.nii",
        "a/050.nii",
        "a/070.dcm",
        "a/100.nii",
        "a/150.nii",
    ]
    assert len(found[-1].objects) == 200
    assert [item.path for item in ignored] == ["a/071.txt"]


def repeated() -> tuple[list[dict[str, object]], Counter[str]]:
    rows = [
        Series(
            source_path=path, source_format="dicom", objects=(ObjectInfo(f"{path}1", 5, "x"),), series_uid=uid
        ).to_row()
        for path, uid in (("b/", "1.2"), ("a/", "1.2"), ("c/", "1.3"))
    ]
    return rows, Counter(row["series_uid"] for row in rows)


def test_a_uid_in_two_folders_is_two_flagged_series() -> None:
    rows, counts = repeated()
    assert [row["qc_flags"] for row in flag_repeated(rows, counts)] == [["series_uid_repeated"]] * 2 + [[]]


def test_group_by_uid_joins_folders() -> None:
    rows, counts = repeated()
    joined = {row["source_path"]: row for row in join_by_uid(rows, counts)}
    assert set(joined) == {"a/", "c/"}
    assert [item["path"] for item in joined["a/"]["objects"]] == ["a/1", "b/1"]
