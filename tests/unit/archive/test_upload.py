"""Uploads: the three kinds of files, and the rules of a zip."""

import io
import re
import tracemalloc
import zipfile
from pathlib import Path

import pytest
from bombs import directory_bomb
from hostile_nifti import big_endian_nifti, nifti2
from sound_input import gz, plain_nifti, slices

from covtanet.archive.manifest import scan_folder
from covtanet.archive.upload import IntakeLimits, parse_upload
from covtanet.ct.dicom_headers import read_identities, transfer_syntax
from covtanet.errors import UploadError
from covtanet.storage import ObjectInfo

DIGEST = "d" * 32
LIMITS = IntakeLimits(max_inflated_bytes=40 << 20, max_members=20, max_ratio=50)


def spread(data: bytes, tmp_path: Path, limits: IntakeLimits = LIMITS) -> list[Path]:
    upload, folder = tmp_path / "upload", tmp_path / "objects"
    upload.write_bytes(data)
    folder.mkdir()
    parse_upload(upload, folder, DIGEST, limits)
    return sorted(folder.iterdir())


def zipped(*members: tuple[str | zipfile.ZipInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (gz(plain_nifti()), f"{DIGEST}.nii.gz"),
        (plain_nifti(), f"{DIGEST}.nii"),
        (slices()[0], f"{DIGEST}.dcm"),
        (nifti2()["a.nii"], f"{DIGEST}.nii"),
        (big_endian_nifti()["a.nii"], f"{DIGEST}.nii"),
        ((540).to_bytes(4, "big") + bytes(600), f"{DIGEST}.nii"),
        (slices()[0][132:], f"{DIGEST}.dcm"),
        (slices()[0][128:], f"{DIGEST}.dcm"),
        (slices()[0][transfer_syntax(slices()[0])[1] :], f"{DIGEST}.dcm"),
    ],
)
def test_one_file_is_named_by_its_bytes(data: bytes, name: str, tmp_path: Path) -> None:
    (file,) = spread(data, tmp_path)
    assert (file.name, file.read_bytes()) == (name, data)


def test_zip_members_keep_their_bytes_and_lose_their_names(tmp_path: Path) -> None:
    members = [(f"Doe^Jane/IM{index}.dcm", data) for index, data in enumerate(slices())]
    files = spread(zipped(*members, ("Doe^Jane/", b""), ("README", b"text")), tmp_path)
    assert [path.read_bytes() for path in files] == [data for _, data in members] + [b"text"]
    assert not any("Doe" in path.name for path in files)


APPLE = bytes.fromhex("0005160700020000") + bytes(200)


def patient_cd() -> list[tuple[str, bytes]]:
    """A patient's CD as a Mac zips it, with the other files that stand on a CD."""
    images = [(f"DICOM/PAT1/IM{index}", data) for index, data in enumerate(slices())]
    beside = [(f"__MACOSX/DICOM/PAT1/._IM{index}", APPLE) for index in range(len(images))]
    other = [
        ("DICOMDIR", b"no directory at all"),
        ("dicomdir.dcm", bytes(128) + b"DICM"),
        ("__MACOSX/._DICOMDIR", APPLE),
        ("._loose.dcm", b"something else"),
        ("__MACOSX\\._x.dcm", b"from Windows"),
        (".DS_Store", b"\0\0\0\1Bud1"),
        ("README.TXT", b"viewer"),
        ("AUTORUN.INF", b"[autorun]"),
    ]
    return [*images, *beside, *other]


def test_zip_of_a_patient_cd_from_a_mac_is_one_series(tmp_path: Path) -> None:
    files = spread(zipped(*patient_cd()), tmp_path)
    infos = [ObjectInfo(path.name, path.stat().st_size, "v1") for path in files]
    series, ignored = scan_folder(
        "", infos, lambda name, n: (files[0].parent / name).read_bytes()[:n], read_identities
    )
    assert [(each.reason, len(each.objects)) for each in series] == [(None, len(slices()))]
    assert len(ignored) == 3  # README, AUTORUN and .DS_Store


def test_names_of_zip_members_never_become_file_names(tmp_path: Path) -> None:
    for path in spread(zipped(*patient_cd(), ("._Doe.dcm", slices()[0])), tmp_path):
        assert re.fullmatch(r"\d{6}(\.dcm)?", path.name)


def test_dicom_under_an_apple_double_name_is_kept(tmp_path: Path) -> None:
    files = spread(
        zipped(("._IM0.dcm", slices()[0]), ("__MACOSX/IM1", slices()[1][132:])), tmp_path
    )
    assert [path.read_bytes() for path in files] == [slices()[0], slices()[1][132:]]


def test_apple_double_files_do_not_count_as_members(tmp_path: Path) -> None:
    """20 members are allowed."""
    objects = [(f"IM{index:02d}", slices()[index % 12]) for index in range(20)]
    beside = [(f"__MACOSX/._{name}", APPLE) for name, _ in objects]
    assert len(spread(zipped(*objects, *beside), tmp_path)) == 20


def test_bomb_under_an_apple_double_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UploadError, match="50 times its size"):
        spread(zipped(("__MACOSX/._a.dcm", bytes(30 << 20))), tmp_path)


def test_single_apple_double_file_is_unsupported(tmp_path: Path) -> None:
    with pytest.raises(UploadError, match=r"expected a \.nii"):
        spread(APPLE, tmp_path)


def link() -> zipfile.ZipInfo:
    info = zipfile.ZipInfo("a.dcm")
    info.external_attr = 0o120777 << 16
    return info


def encrypted() -> bytes:
    data = bytearray(zipped(("a.dcm", b"x" * 100)))
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(mark) + at] |= 1
    return bytes(data)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("build", "reason", "message"),
    [
        (lambda: b"", "unsupported_media", "expected a .nii"),
        (lambda: b"%PDF-1.7", "unsupported_media", "expected a .nii"),
        (lambda: zipped(), "unsupported_media", "expected a .nii"),  # an empty zip begins otherwise
        (lambda: zipped(("../../etc/x.dcm", b"x")), "bad_zip", "out of the zip"),
        (lambda: zipped(("/etc/x.dcm", b"x")), "bad_zip", "out of the zip"),
        (lambda: zipped(("..\\x.dcm", b"x")), "bad_zip", "out of the zip"),
        (lambda: zipped(("C:x.dcm", b"x")), "bad_zip", "out of the zip"),
        (lambda: zipped((link(), b"/etc/passwd")), "bad_zip", "a link"),
        (encrypted, "bad_zip", "encrypted"),
        (lambda: zipped(("a.dcm", b"x"), ("a.dcm", b"y")), "bad_zip", "of one name"),
        (lambda: zipped(("a.zip", b"x")), "bad_zip", "another archive"),
        (lambda: zipped(("hidden", zipped(("a", b"x")))), "bad_zip", "another archive"),
        (lambda: zipped(("a.dcm", gz(b"x"))), "bad_zip", "another archive"),
        (lambda: zipped(*((f"{k}.dcm", b"x") for k in range(21))), "too_large", "21 members"),
        (lambda: zipped(("a.dcm", bytes(30 << 20))), "too_large", "50 times its size"),
        (
            lambda: zipped(*((f"{k}.dcm", slices()[0] * 200) for k in range(20))),
            "too_large",
            "inflates",
        ),
        (lambda: zipped(("a.dcm", b"x" * 500))[:-20], "bad_zip", "cannot be read"),
    ],
)
def test_a_zip_that_breaks_a_rule_is_refused(
    build: object, reason: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UploadError, match=message) as error:
        spread(build(), tmp_path)  # type: ignore[operator]
    assert error.value.reason == reason


def test_declared_sizes_of_a_zip_are_not_trusted(tmp_path: Path) -> None:
    """The central directory says 10 bytes; 30 MiB come out."""
    data = bytearray(zipped(("a.dcm", bytes(30 << 20))))
    at = data.index(b"PK\x01\x02") + 24
    data[at : at + 4] = (10).to_bytes(4, "little")
    with pytest.raises(UploadError):
        spread(bytes(data), tmp_path)
    assert sum(path.stat().st_size for path in (tmp_path / "objects").iterdir()) < 12 << 20


def test_a_damaged_member_is_refused_by_its_checksum(tmp_path: Path) -> None:
    data = bytearray(zipped(("a.dcm", slices()[0])))
    at = data.index(b"PK\x03\x04") + 14
    data[at] ^= 1
    data[data.index(b"PK\x01\x02") + 16] ^= 1
    with pytest.raises(UploadError, match="cannot be read"):
        spread(bytes(data), tmp_path)


def test_zip_with_a_huge_directory_is_refused_before_its_entries_are_read(tmp_path: Path) -> None:
    """Half a million entries of one byte each: ``ZipFile`` would make an object of every one."""
    for num_declared in (500_000, 1):  # as the zip64 record says, or a lie
        bomb, folder = directory_bomb(500_000, num_declared), tmp_path / str(num_declared)
        folder.mkdir()
        tracemalloc.start()
        with pytest.raises(UploadError, match="expected at most 40 in") as error:
            spread(bomb, folder)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert error.value.reason == "too_large"
        assert peak < 8 << 20  # entries as objects would take 124 MiB
