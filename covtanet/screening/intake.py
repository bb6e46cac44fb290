"""What a caller sends in one file, laid out as a folder of objects: a NIfTI file, a DICOM object, or a zip of those.

No name that the caller chose becomes a name of a file. Sizes are counted as bytes come out, never believed.
"""

import stat
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from covtanet.data.manifest import CONTAINER_SUFFIXES, DICOM_SUFFIXES
from covtanet.errors import UploadError

CHUNK_BYTES = 1 << 20
# Where magic numbers stand: a NIfTI-1 header gives its size first, a DICOM file has a preamble.
NIFTI_SIZES = {(348).to_bytes(4, "little"), (348).to_bytes(4, "big"), (540).to_bytes(4, "little")}
GZIP, ZIP, DICOM, DICOM_AT = b"\x1f\x8b", b"PK\x03\x04", b"DICM", 128
HEAD_BYTES = DICOM_AT + len(DICOM)
NESTED = (ZIP, b"7z\xbc\xaf\x27\x1c", b"Rar!", b"\xfd7zXZ", b"BZh", GZIP)
ENCRYPTED = 1
# A few zeros compress well in any honest file; from here on the ratio counts.
RATIO_FROM_BYTES = 10 << 20


@dataclass(frozen=True, kw_only=True)
class IntakeLimits:
    """What an upload may hold. max_ratio: inflated over sent bytes."""

    max_bytes: int = 1 << 30
    max_inflated_bytes: int = 2 << 30
    max_members: int = 8192
    max_ratio: float = 200.0


def lay_out(upload: Path, folder: Path, digest: str, limits: IntakeLimits) -> None:
    """Put the objects of an upload into an empty folder.

    digest: hex digits of its bytes, after which a single file is named, so that the same bytes are the same series.

    Raises:
        UploadError: for what is none of the three kinds, or a zip that breaks a rule.
    """
    with upload.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if head.startswith(ZIP):
        _unzip(upload, folder, limits)
    elif head.startswith(GZIP) or head[:4] in NIFTI_SIZES:
        upload.rename(folder / f"{digest}.nii{'.gz' if head.startswith(GZIP) else ''}")
    elif head[DICOM_AT:] == DICOM:
        upload.rename(folder / f"{digest}.dcm")
    else:
        raise UploadError("unsupported_media", "expected a .nii, a .nii.gz, a DICOM object or a zip of DICOM objects")


def _unzip(upload: Path, folder: Path, limits: IntakeLimits) -> None:
    size, inflated = upload.stat().st_size, 0
    try:
        with zipfile.ZipFile(upload) as archive:
            members = _members(archive, limits)
            for index, member in enumerate(members):
                suffix = ".dcm" if member.filename.lower().endswith(DICOM_SUFFIXES) else ""
                with archive.open(member) as source, (folder / f"{index:06d}{suffix}").open("wb") as target:
                    for chunk in _chunks(source):
                        inflated += len(chunk)
                        _check_size(inflated, size, limits)
                        target.write(chunk)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise UploadError("bad_zip", f"the zip cannot be read: {type(error).__name__}") from None


def _members(archive: zipfile.ZipFile, limits: IntakeLimits) -> list[zipfile.ZipInfo]:
    found = [each for each in archive.infolist() if not each.is_dir()]
    names = [each.filename for each in found]
    if not found:
        raise UploadError("bad_zip", "the zip is empty")
    if len(found) > limits.max_members:
        raise UploadError("too_large", f"the zip has {len(found)} members, expected at most {limits.max_members}")
    if len(set(names)) != len(names):
        raise UploadError("bad_zip", "the zip has two members of one name")
    for each in found:
        name = each.filename
        if name.startswith(("/", "\\")) or "\0" in name or ":" in name or ".." in name.replace("\\", "/").split("/"):
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
        raise UploadError("bad_zip", "the zip holds another archive, expected DICOM objects as they are")
    while first:
        yield first
        first = source.read(CHUNK_BYTES)


def _check_size(inflated: int, size: int, limits: IntakeLimits) -> None:
    if inflated > limits.max_inflated_bytes:
        raise UploadError("too_large", f"the zip inflates beyond {limits.max_inflated_bytes} bytes")
    if inflated > RATIO_FROM_BYTES and inflated > limits.max_ratio * size:
        raise UploadError("too_large", f"the zip inflates to more than {limits.max_ratio:g} times its size")
