"""One uploaded file as a folder of objects: a NIfTI file, a DICOM object, or a zip of such objects.

No name that the caller chose becomes the name of a file. Hence objects that the listing would
ignore by their name are left out here. Sizes are counted as bytes come out, never believed.
"""

import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from covtanet.archive.object_kinds import (
    CONTAINER_SUFFIXES,
    DICOM_SUFFIXES,
    is_debris_content,
    is_debris_name,
    looks_like_nifti,
)
from covtanet.ct.dicom_headers import looks_like_dicom
from covtanet.ct.gzip_stream import GZIP_MAGIC
from covtanet.errors import UploadError

CHUNK_BYTES = 1 << 20
ZIP = b"PK\x03\x04"
# Enough for a preamble and the magic, or for the first elements of an object without them.
HEADER_BYTES = 4096
# Magic bytes of zip, 7z, RAR, xz, bzip2 and gzip.
NESTED = (ZIP, b"7z\xbc\xaf\x27\x1c", b"Rar!", b"\xfd7zXZ", b"BZh", GZIP_MAGIC)
# Bit 0 of a member's flags.
ENCRYPTED = 1
# A few zeros compress well in any honest file; the ratio counts from this size on.
RATIO_FROM_BYTES = 10 << 20
# 8,192 members with names of 466 bytes; ordinary exports need a tenth of it.
MAX_DIRECTORY_BYTES = 4 << 20


@dataclass(frozen=True, kw_only=True)
class IntakeLimits:
    """Limits of one upload."""

    max_bytes: int = 1 << 30
    """Size as sent."""
    max_inflated_bytes: int = 2 << 30
    """Size of all members of a zip."""
    max_members: int = 8192
    """Number of members of a zip."""
    max_ratio: float = 200.0
    """Inflated over sent bytes."""


def parse_upload(
    upload: Path,
    folder: Path,
    digest: str,
    limits: IntakeLimits,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Put the objects of an upload into an empty folder.

    digest: hex digits of its bytes, which name a single file, so that the same bytes are the same
    series. check: called with every chunk; raises once the request has ended.

    Raises:
        UploadError: the file is not of these three kinds, or a zip breaks a rule.
    """
    header = _read_header(upload)
    if header.startswith(ZIP):
        _unzip(upload, folder, limits, check)
    elif looks_like_nifti(header):
        suffix = ".nii.gz" if header.startswith(GZIP_MAGIC) else ".nii"
        upload.rename(folder / f"{digest}{suffix}")
    elif looks_like_dicom(header):
        upload.rename(folder / f"{digest}.dcm")
    else:
        raise UploadError(
            "unsupported_media",
            "expected a .nii, a .nii.gz, a DICOM object or a zip of DICOM objects",
        )


def _read_header(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEADER_BYTES)


def _unzip(upload: Path, folder: Path, limits: IntakeLimits, check: Callable[[], None]) -> None:
    size = upload.stat().st_size
    inflated = 0
    try:
        # Before the zip is opened: ZipFile makes an object of every entry.
        _check_directory(upload, limits)
        with zipfile.ZipFile(upload) as archive:
            for index, member in enumerate(_members(archive, limits)):
                target = folder / _file_name(index, member)
                with archive.open(member) as source, target.open("wb") as file:
                    for chunk in _chunks(source):
                        # With every chunk, so that the work ends soon after its request.
                        check()
                        # Counted while inflating: the sizes that a zip states for its members may
                        # be wrong.
                        inflated += len(chunk)
                        _check_size(inflated, size, limits)
                        file.write(chunk)
                if is_debris_content(_path_in_zip(member), _read_header(target)):
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


def _path_in_zip(member: zipfile.ZipInfo) -> str:
    """Return a member's path in the zip, for checks; it is never a path on a disk."""
    # Windows programs write backslashes.
    return member.filename.replace("\\", "/")


def _file_name(index: int, member: zipfile.ZipInfo) -> str:
    suffix = ".dcm" if member.filename.lower().endswith(DICOM_SUFFIXES) else ""
    # The number alone: no name of a member becomes a name on the disk.
    return f"{index:06d}{suffix}"


def _check_directory(upload: Path, limits: IntakeLimits) -> None:
    """Refuse a central directory that is larger than its members explain.

    Before ``ZipFile`` reads all of it and makes an object of every entry: 500,000 entries cost it
    some seconds and over 100 MiB. Its own function locates the directory, so that both mean the
    same one.
    """
    with upload.open("rb") as file:
        try:
            end = zipfile._EndRecData(file)  # type: ignore[attr-defined]
        except OSError:
            end = None
    if end is None:
        raise zipfile.BadZipFile
    num_entries = end[zipfile._ECD_ENTRIES_TOTAL]  # type: ignore[attr-defined]
    num_bytes = end[zipfile._ECD_SIZE]  # type: ignore[attr-defined]
    # Folders have entries too, and a Mac adds one to every file.
    max_entries = 2 * limits.max_members
    if num_entries > max_entries or num_bytes > MAX_DIRECTORY_BYTES:
        raise UploadError(
            "too_large",
            f"the zip has {num_entries} entries in {num_bytes} bytes, expected at most "
            f"{max_entries} in {MAX_DIRECTORY_BYTES}",
        )


def _members(archive: zipfile.ZipFile, limits: IntakeLimits) -> list[zipfile.ZipInfo]:
    """Return the members that are not folders, once all of them keep the rules."""
    members = [member for member in archive.infolist() if not member.is_dir()]
    if not members:
        raise UploadError("bad_zip", "the zip is empty")
    num_counted = sum(not is_debris_name(_path_in_zip(member)) for member in members)
    if num_counted > limits.max_members:
        raise UploadError(
            "too_large", f"the zip has {num_counted} members, expected at most {limits.max_members}"
        )
    if len({member.filename for member in members}) != len(members):
        raise UploadError("bad_zip", "the zip has two members of one name")
    for member in members:
        _check_member(member)
    return members


def _check_member(member: zipfile.ZipInfo) -> None:
    name = member.filename
    is_absolute = name.startswith(("/", "\\")) or "\0" in name or ":" in name
    if is_absolute or ".." in _path_in_zip(member).split("/"):
        raise UploadError("bad_zip", "a member's name leads out of the zip")
    # The upper 16 bits hold the mode of the file on Unix.
    if stat.S_ISLNK(member.external_attr >> 16):
        raise UploadError("bad_zip", "the zip has a link")
    if member.flag_bits & ENCRYPTED:
        raise UploadError("bad_zip", "the zip is encrypted")
    if name.lower().endswith(CONTAINER_SUFFIXES):
        raise UploadError("bad_zip", "the zip holds another archive")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UploadError("bad_zip", "unsupported compression of the zip, expected deflate")


def _chunks(source: IO[bytes]) -> Iterator[bytes]:
    """Yield a member's bytes; refuse a member that begins as an archive does."""
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
