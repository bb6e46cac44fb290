"""What a caller sends in one file, laid out as a folder of objects: a NIfTI file, a DICOM object, or a zip of those.

No name that the caller chose becomes a name of a file, so what the listing ignores by its name is left out here. Sizes
are counted as bytes come out, never believed.
"""

import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from covtanet.archive.manifest import (
    CONTAINER_SUFFIXES,
    DICOM_SUFFIXES,
    GZIP,
    is_debris_content,
    is_debris_name,
    looks_like_nifti,
)
from covtanet.ct.dicom_head import looks_like_dicom
from covtanet.errors import UploadError

CHUNK_BYTES = 1 << 20
ZIP = b"PK\x03\x04"
# Holds a preamble and the magic, or the first elements of an object without.
HEAD_BYTES = 4096
NESTED = (ZIP, b"7z\xbc\xaf\x27\x1c", b"Rar!", b"\xfd7zXZ", b"BZh", GZIP)
ENCRYPTED = 1
# A few zeros compress well in any honest file; from here on the ratio counts.
RATIO_FROM_BYTES = 10 << 20
# 8,192 members with names of 466 bytes; ordinary exports need a tenth of it.
MAX_DIRECTORY_BYTES = 4 << 20


@dataclass(frozen=True, kw_only=True)
class IntakeLimits:
    """What an upload may hold. max_ratio: inflated over sent bytes."""

    max_bytes: int = 1 << 30
    max_inflated_bytes: int = 2 << 30
    max_members: int = 8192
    max_ratio: float = 200.0


def lay_out(
    upload: Path,
    folder: Path,
    digest: str,
    limits: IntakeLimits,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Put the objects of an upload into an empty folder.

    digest: hex digits of its bytes, after which a single file is named, so that the same bytes are the same series.
    check: called with every chunk; raises once the request has ended.

    Raises:
        UploadError: for what is none of the three kinds, or a zip that breaks a rule.
    """
    head = _head(upload)
    if head.startswith(ZIP):
        _unzip(upload, folder, limits, check)
    elif looks_like_nifti(head):
        upload.rename(folder / f"{digest}.nii{'.gz' if head.startswith(GZIP) else ''}")
    elif looks_like_dicom(head):
        upload.rename(folder / f"{digest}.dcm")
    else:
        raise UploadError(
            "unsupported_media",
            "expected a .nii, a .nii.gz, a DICOM object or a zip of DICOM objects",
        )


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD_BYTES)


def _unzip(upload: Path, folder: Path, limits: IntakeLimits, check: Callable[[], None]) -> None:
    size, inflated = upload.stat().st_size, 0
    try:
        _check_directory(upload, limits)
        with zipfile.ZipFile(upload) as archive:
            for index, member in enumerate(_members(archive, limits)):
                target = folder / _name_of(index, member)
                with archive.open(member) as source, target.open("wb") as file:
                    for chunk in _chunks(source):
                        check()
                        inflated += len(chunk)
                        _check_size(inflated, size, limits)
                        file.write(chunk)
                if is_debris_content(_path_of(member), _head(target)):
                    target.unlink()
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        NotImplementedError,
        RuntimeError,
        ValueError,
    ) as error:
        raise UploadError("bad_zip", f"the zip cannot be read: {type(error).__name__}") from None


def _path_of(member: zipfile.ZipInfo) -> str:
    """The member's path in the zip, to judge it by; never one on a disk."""
    return member.filename.replace("\\", "/")


def _name_of(index: int, member: zipfile.ZipInfo) -> str:
    return f"{index:06d}{'.dcm' if member.filename.lower().endswith(DICOM_SUFFIXES) else ''}"


def _check_directory(upload: Path, limits: IntakeLimits) -> None:
    """Refuse a central directory that is larger than its members explain, before ``ZipFile`` reads all of it.

    ``ZipFile`` makes an object of every entry: 500,000 entries cost it some seconds and over 100 MiB. Its own function
    finds the directory, so that both mean the same one.
    """
    with upload.open("rb") as file:
        try:
            end = zipfile._EndRecData(file)  # type: ignore[attr-defined]
        except OSError:
            end = None
    if end is None:
        raise zipfile.BadZipFile
    num_entries, num_bytes = end[zipfile._ECD_ENTRIES_TOTAL], end[zipfile._ECD_SIZE]  # type: ignore[attr-defined]
    max_entries = (
        2 * limits.max_members
    )  # folders have entries too, and a Mac adds one to every file
    if num_entries > max_entries or num_bytes > MAX_DIRECTORY_BYTES:
        raise UploadError(
            "too_large",
            f"the zip has {num_entries} entries in {num_bytes} bytes, expected at most {max_entries} in "
            f"{MAX_DIRECTORY_BYTES}",
        )


def _members(archive: zipfile.ZipFile, limits: IntakeLimits) -> list[zipfile.ZipInfo]:
    found = [each for each in archive.infolist() if not each.is_dir()]
    names = [each.filename for each in found]
    if not found:
        raise UploadError("bad_zip", "the zip is empty")
    num_members = sum(not is_debris_name(_path_of(each)) for each in found)
    if num_members > limits.max_members:
        raise UploadError(
            "too_large", f"the zip has {num_members} members, expected at most {limits.max_members}"
        )
    if len(set(names)) != len(names):
        raise UploadError("bad_zip", "the zip has two members of one name")
    for each in found:
        name = each.filename
        if (
            name.startswith(("/", "\\"))
            or "\0" in name
            or ":" in name
            or ".." in name.replace("\\", "/").split("/")
        ):
            raise UploadError("bad_zip", "a member's name leads out of the zip")
        if stat.S_ISLNK(each.external_attr >> 16):
            raise UploadError("bad_zip", "the zip has a link")
        if each.flag_bits & ENCRYPTED:
            raise UploadError("bad_zip", "the zip is encrypted")
        if name.lower().endswith(CONTAINER_SUFFIXES):
            raise UploadError("bad_zip", "the zip holds another archive")
        if each.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UploadError("bad_zip", "the zip is compressed otherwise than by deflate")
    return found


def _chunks(source: IO[bytes]) -> Iterator[bytes]:
    """A member's bytes; what another archive begins with is refused."""
    first = source.read(CHUNK_BYTES)
    if first.startswith(NESTED):
        raise UploadError(
            "bad_zip", "the zip holds another archive, expected DICOM objects as they are"
        )
    while first:
        yield first
        first = source.read(CHUNK_BYTES)


def _check_size(inflated: int, size: int, limits: IntakeLimits) -> None:
    if inflated > limits.max_inflated_bytes:
        raise UploadError("too_large", f"the zip inflates beyond {limits.max_inflated_bytes} bytes")
    if inflated > RATIO_FROM_BYTES and inflated > limits.max_ratio * size:
        raise UploadError(
            "too_large", f"the zip inflates to more than {limits.max_ratio:g} times its size"
        )
