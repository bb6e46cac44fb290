"""Where bytes live: a local path or an s3:// URI to listings, reads and whole-object writes.

Nobody else knows which it is. Endpoint and credentials of S3 come from the standard AWS variables. Keys are opaque:
they are never unquoted, normalised or joined with anything but ``/``. A file name on a disk that is no UTF-8 is listed
with each such byte as a character of a private range, and found again by it. Trouble is always an ``OSError``.
"""

import hashlib
import io
import math
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from stat import S_ISREG
from typing import IO, Any

import boto3
import pyarrow.fs as pafs
import s3fs
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, CredentialRetrievalError, NoCredentialsError
from urllib3.exceptions import HTTPError

from covtanet.errors import ConfigError

S3 = "s3://"
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
CONNECT_TIMEOUT_S, READ_TIMEOUT_S, MAX_ATTEMPTS = 10, 60, 5
CHUNK_BYTES = 1 << 20
NO_ACCESS = {"ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch", "TokenRefreshRequired"}
BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,62}")
# The version of a link that leads out of the listed root.
OUTSIDE = "outside"
# A byte that is no UTF-8 stands in a listed path as one of these characters.
ODD_BYTE_AT = 0xF700


class AccessError(OSError):
    """The store refuses our credentials, so that no object can be read or written."""


class ObjectChangedError(OSError):
    """An object is not what the listing said."""


class TooManyObjectsError(OSError):
    """A tree holds more objects than are wanted of it."""


class TooLargeError(OSError):
    """An object has more bytes than it may have."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object as the listing shows it. path: relative to the listed root. version: ETag, or mtime on a disk."""

    path: str
    num_bytes: int
    version: str


def is_s3(uri: str) -> bool:
    """Whether a URI names an object store rather than a local path."""
    return uri.startswith(S3)


def join(root: str, *parts: str) -> str:
    """Append path parts to a root URI."""
    return "/".join([root.rstrip("/"), *parts])


def resolve(root: str, path: str) -> str:
    """A path of a data set: as it stands where it is absolute, else below the root."""
    if is_s3(path) or is_s3(root):
        return path if is_s3(path) else join(root, path)
    return os.path.normpath(path if path.startswith("/") else join(root, path))


def absolute(uri: str) -> str:
    """The URI with an absolute local path and no trailing slash.

    Raises:
        ConfigError: for another scheme than s3:// and file://, and for an s3:// URI that is more than bucket and key.
    """
    scheme = SCHEME.match(uri)
    if scheme and scheme[0].lower() not in (S3, "file://"):
        raise ConfigError(f"{scheme[0]} is no storage of ours, expected a path or s3://BUCKET/PREFIX")
    if is_s3(uri):
        bucket, _, key = uri.removeprefix(S3).partition("/")
        if not BUCKET.fullmatch(bucket) or ".." in key.split("/"):
            raise ConfigError("expected s3://BUCKET/PREFIX without user, port, query or '..'")
    return uri.rstrip("/") if is_s3(uri) else str(Path(uri.removeprefix("file://")).expanduser().resolve())


def walk(
    root: str, *, max_objects: int | None = None, leaves_root: bool = False
) -> Iterator[tuple[str, list[ObjectInfo]]]:
    """List a tree folder by folder: (folder relative to the root with a trailing slash or empty, its objects).

    Holds the objects of one folder and of those above it, never the whole tree.

    leaves_root: follow links of a disk out of the root, as of data that the caller has put together. Otherwise a link
    that leads out, to a file or a folder, is listed as an object whose version says so; reading it is refused: with
    such a link in an archive any file of the machine could be read.

    Raises:
        TooManyObjectsError: the tree holds more than ``max_objects``; the listing goes no further than that.
    """
    limit = math.inf if max_objects is None else max_objects
    return _walk_s3(root, limit) if is_s3(root) else _walk_disk(Path(root), limit, leaves_root)


def _walk_disk(root: Path, max_objects: float, leaves_root: bool) -> Iterator[tuple[str, list[ObjectInfo]]]:
    num_objects = 0
    if not root.is_dir():
        raise FileNotFoundError("there is no such folder")
    seen: set[tuple[int, int]] = set()
    real_root = root.resolve()

    def leads_out(path: Path) -> bool:
        is_out = not leaves_root and path.is_symlink() and not path.resolve().is_relative_to(real_root)
        return is_out and path.exists()  # a link to nowhere is listed as such

    for folder, subfolders, names in os.walk(root, onerror=_raise, followlinks=True):
        status = Path(folder).stat()
        if (status.st_dev, status.st_ino) in seen:  # a link back into the tree
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        outside = {name for name in [*subfolders, *names] if leads_out(Path(folder) / name)}
        subfolders[:] = sorted(set(subfolders) - outside)
        relative = _listed(Path(folder).relative_to(root).as_posix())
        prefix = "" if relative == "." else f"{relative}/"
        found = []
        for name in sorted({*names, *outside}):
            info = (
                ObjectInfo(f"{prefix}{_listed(name)}", 0, OUTSIDE)
                if name in outside
                else _file_info(Path(folder) / name, f"{prefix}{_listed(name)}")
            )
            if info is not None:
                found.append(info)
        num_objects += len(found)
        _check_count(num_objects, max_objects)
        if found:
            yield prefix, found


def _check_count(num_objects: int, max_objects: float) -> None:
    if num_objects > max_objects:
        raise TooManyObjectsError(f"more than {max_objects} objects")


def _file_info(path: Path, relative: str) -> ObjectInfo | None:
    """A file as the listing shows it; a link to nowhere stays in the list, pipes and sockets do not."""
    try:
        status = path.stat()
    except OSError:
        return ObjectInfo(relative, 0, "unreadable")
    return ObjectInfo(relative, status.st_size, str(status.st_mtime_ns)) if S_ISREG(status.st_mode) else None


def _listed(name: str) -> str:
    """A name from the disk as valid Unicode."""
    return "".join(chr(ODD_BYTE_AT + ord(c) - 0xDC00) if "\udc80" <= c <= "\udcff" else c for c in name)


def _on_disk(path: str) -> Path:
    """The inverse of ``_listed``, where no file has the name as it stands."""
    if not any(ODD_BYTE_AT + 0x80 <= ord(c) <= ODD_BYTE_AT + 0xFF for c in path) or Path(path).exists():
        return Path(path)
    return Path("".join(chr(ord(c) - ODD_BYTE_AT + 0xDC00) if 0xF780 <= ord(c) <= 0xF7FF else c for c in path))


def _raise(error: OSError) -> None:
    raise OSError(f"a folder of the archive cannot be listed: {type(error).__name__}") from None


def _walk_s3(root: str, max_objects: float) -> Iterator[tuple[str, list[ObjectInfo]]]:
    """Group a flat listing. Keys come in order, so a folder is complete once a key no longer begins with it."""
    bucket, prefix = _split(root.rstrip("/") + "/")
    num_objects = 0
    open_folders: list[tuple[str, list[ObjectInfo]]] = []
    with _as_os_error():
        for page in _client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            for item in page.get("Contents", ()):
                key = str(item["Key"])
                if key.endswith("/"):
                    continue
                path = key[len(prefix) :]
                folder = path[: path.rfind("/") + 1]
                while open_folders and not folder.startswith(open_folders[-1][0]):
                    yield open_folders.pop()
                if not open_folders or open_folders[-1][0] != folder:
                    open_folders.append((folder, []))
                info = ObjectInfo(path, int(item["Size"]), str(item.get("ETag", "")).strip('"'))
                open_folders[-1][1].append(info)
                num_objects += 1
                _check_count(num_objects, max_objects)
    while open_folders:
        yield open_folders.pop()


def list_names(folder: str) -> list[str]:
    """Names directly in a folder, sorted; empty where there is no such folder."""
    if not is_s3(folder):
        path = Path(folder)
        return sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    bucket, prefix = _split(folder.rstrip("/") + "/")
    names: set[str] = set()
    with _as_os_error():
        pages = _client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix, Delimiter="/")
        for page in pages:
            keys = [item["Key"] for item in page.get("Contents", ())]
            keys += [item["Prefix"] for item in page.get("CommonPrefixes", ())]
            names |= {key[len(prefix) :].strip("/") for key in keys}
    return sorted(names - {""})


def exists(uri: str) -> bool:
    """Whether an object is there."""
    return describe(uri) is not None


def describe(uri: str) -> ObjectInfo | None:
    """Return one object as a listing of its folder would show it; None if it does not exist."""
    name = uri.rpartition("/")[2]
    if not is_s3(uri):
        return _file_info(_on_disk(uri), name) if _on_disk(uri).is_file() else None
    bucket, key = _split(uri)
    if not key:  # a whole bucket
        return None
    try:
        with _as_os_error():
            answer = _client().head_object(Bucket=bucket, Key=key)
    except FileNotFoundError:
        return None
    return ObjectInfo(name, int(answer["ContentLength"]), str(answer.get("ETag", "")).strip('"'))


def read_bytes(uri: str, max_bytes: int | None = None) -> bytes:
    """Read an object, or only its first bytes."""
    if not is_s3(uri):
        with _on_disk(uri).open("rb") as file:
            return file.read() if max_bytes is None else file.read(max_bytes)
    bucket, key = _split(uri)
    extra = {} if max_bytes is None else {"Range": f"bytes=0-{max_bytes - 1}"}
    with _as_os_error():
        try:
            return bytes(_client().get_object(Bucket=bucket, Key=key, **extra)["Body"].read())
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] == 416:  # an empty object has no first byte
                return b""
            raise


def read_chunks(uri: str, expected: ObjectInfo) -> Iterator[bytes]:
    """Read an object in chunks, as long as it is the one that was listed.

    Raises:
        FileNotFoundError: it is gone.
        ObjectChangedError: size, ETag or time of change is another, or another number of bytes comes.
    """
    num_bytes = 0
    for chunk in _chunks_of_object(uri, expected) if is_s3(uri) else _chunks_of_file(_on_disk(uri), expected):
        num_bytes += len(chunk)
        yield chunk
    if num_bytes != expected.num_bytes:
        raise ObjectChangedError("an object has another size than it was listed with")


def _chunks_of_file(path: Path, expected: ObjectInfo) -> Iterator[bytes]:
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        if (status.st_size, str(status.st_mtime_ns)) != (expected.num_bytes, expected.version):
            raise ObjectChangedError("a file is another than was listed")
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def _chunks_of_object(uri: str, expected: ObjectInfo) -> Iterator[bytes]:
    """A stream that breaks is taken up where it broke, a few times."""
    bucket, key = _split(uri)
    done = 0
    for attempt in range(MAX_ATTEMPTS):
        try:
            with _as_os_error():
                extra = {"Range": f"bytes={done}-"} if done else {}
                answer = _client().get_object(Bucket=bucket, Key=key, **extra)
                length = int(answer["ContentLength"]) + done
                if (length, str(answer.get("ETag", "")).strip('"')) != (expected.num_bytes, expected.version):
                    raise ObjectChangedError("an object is another than was listed")
                for chunk in answer["Body"].iter_chunks(CHUNK_BYTES):
                    done += len(chunk)
                    yield chunk
            return
        except (FileNotFoundError, ObjectChangedError, AccessError):
            raise
        except OSError:
            if attempt == MAX_ATTEMPTS - 1 or done >= expected.num_bytes:
                raise
            time.sleep(2**attempt / 4)


def write_bytes(uri: str, data: bytes) -> None:
    """Write an object; a reader sees all of it or nothing."""
    _put(uri, io.BytesIO(data))


def upload(path: Path, uri: str) -> None:
    """Publish a local file as one object by one PUT; on a disk by a rename. A reader sees all of it or nothing."""
    with path.open("rb") as file:
        _put(uri, file)


def create(path: Path, uri: str) -> bool:
    """Publish a local file as ``upload`` does, but only where there is no such object yet; returns whether it did."""
    with path.open("rb") as file:
        return _put(uri, file, only_new=True)


def honours_create(folder: str) -> bool:
    """Whether the store under this folder keeps ``create`` from replacing an object; some S3 servers do not."""
    if not is_s3(folder):
        return True
    uri = join(folder, f"_probe-{uuid.uuid4().hex}")
    try:
        return _put(uri, io.BytesIO(b"1"), only_new=True) and not _put(uri, io.BytesIO(b"2"), only_new=True)
    finally:
        delete(uri)


def _put(uri: str, file: IO[bytes], *, only_new: bool = False) -> bool:
    if is_s3(uri):
        bucket, key = _split(uri)
        with _as_os_error():
            try:
                _client().put_object(Bucket=bucket, Key=key, Body=file, **({"IfNoneMatch": "*"} if only_new else {}))
            except ClientError as error:
                if only_new and error.response["ResponseMetadata"]["HTTPStatusCode"] in (409, 412):
                    return False
                raise
        return True
    target = Path(uri)
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(prefix="._", dir=target.parent)
    try:
        with os.fdopen(descriptor, "wb") as out:
            shutil.copyfileobj(file, out)
            out.flush()
            os.fsync(out.fileno())
        Path(partial).chmod(0o644)
        if only_new:
            with suppress(FileExistsError):
                os.link(partial, target)
                return True
            return False
        Path(partial).replace(target)
    finally:
        Path(partial).unlink(missing_ok=True)
    return True


def download_files(uri: str, sizes: Mapping[str, int], target: Path) -> None:
    """Copy files of a folder by their names to a local folder; other objects beside them are not listed.

    sizes: each file's name, and the most bytes that it may have.

    Raises:
        FileNotFoundError: a file is missing.
        TooLargeError: a file has more bytes.
        ValueError: a name leads out of the target.
    """
    target.mkdir(parents=True, exist_ok=True)
    for name, max_bytes in sizes.items():
        save_chunks(read_whole(join(uri, name)), local_path(target, name), max_bytes)


def save_chunks(chunks: Iterable[bytes], path: Path, max_bytes: int) -> None:
    """Write chunks to a local file, as many bytes as it may have.

    Raises:
        TooLargeError: there are more.
    """
    num_bytes = 0
    with path.open("wb") as out:
        for chunk in chunks:
            num_bytes += len(chunk)
            if num_bytes > max_bytes:
                raise TooLargeError(f"{path.name} has more than {max_bytes} bytes")
            out.write(chunk)


def read_whole(uri: str) -> Iterator[bytes]:
    """Read an object in chunks, whichever it is now."""
    if not is_s3(uri):
        with _on_disk(uri).open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
        return
    bucket, key = _split(uri)
    with _as_os_error():
        yield from _client().get_object(Bucket=bucket, Key=key)["Body"].iter_chunks(CHUNK_BYTES)


def local_path(target: Path, name: str) -> Path:
    """Return the place of a name below a local folder; every name that comes from a listing has to pass here.

    Raises:
        ValueError: an absolute name, one with '..', or one that leads out of the folder by a link.
    """
    path = target / name
    if name.startswith("/") or ".." in name.split("/") or not path.resolve().is_relative_to(target.resolve()):
        raise ValueError("a name leads out of the folder that it is written to")
    return path


def delete(uri: str) -> None:
    """Delete an object; nothing happens where there is none."""
    if not is_s3(uri):
        Path(uri).unlink(missing_ok=True)
        return
    bucket, key = _split(uri)
    with _as_os_error():
        _client().delete_object(Bucket=bucket, Key=key)


def delete_folder(uri: str) -> None:
    """Delete a folder and all below it, if it exists.

    Raises:
        OSError: the store kept some of it.
    """
    if not is_s3(uri):
        shutil.rmtree(uri, ignore_errors=True)
        return
    bucket, prefix = _split(uri.rstrip("/") + "/")
    with _as_os_error():
        client = _client()
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            keys = [{"Key": item["Key"]} for item in page.get("Contents", ())]
            if not keys:
                continue
            answer = client.delete_objects(Bucket=bucket, Delete={"Objects": keys, "Quiet": True})
            if errors := answer.get("Errors"):  # the call as a whole is answered with 200
                code = errors[0].get("Code", "")
                raise OSError(f"{len(errors)} of {len(keys)} objects could not be deleted: {code}")


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """A pyarrow file system for a URI, and the path in it.

    S3 goes through s3fs: pyarrow's own client writes folder markers that some servers keep as files.
    """
    if not is_s3(uri):
        return pafs.LocalFileSystem(), uri
    return pafs.PyFileSystem(pafs.FSSpecHandler(s3fs.S3FileSystem())), uri.removeprefix(S3)


def version_digest(objects: list[ObjectInfo]) -> str:
    """SHA-256 over name, size and ETag or mtime of each object, by name; changes when the listing does."""
    digest = hashlib.sha256()
    for item in sorted(objects, key=lambda item: item.path):
        digest.update(f"{item.path}\0{item.num_bytes}\0{item.version}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


class ContentDigest:
    """SHA-256 over name, size and SHA-256 of each object's bytes, by name, taken as the bytes pass."""

    def __init__(self) -> None:
        self._lines: dict[str, str] = {}

    @property
    def num_objects(self) -> int:
        """Objects that have passed to their end."""
        return len(self._lines)

    def passing(self, path: str, chunks: Iterable[bytes]) -> Iterator[bytes]:
        """The same chunks, noted."""
        digest, num_bytes = hashlib.sha256(), 0
        for chunk in chunks:
            digest.update(chunk)
            num_bytes += len(chunk)
            yield chunk
        self._lines[path] = f"{path}\0{num_bytes}\0{digest.hexdigest()}\n"

    def hexdigest(self) -> str:
        """The digest of all that has passed."""
        lines = "".join(line for _, line in sorted(self._lines.items()))
        return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()


def _split(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix(S3).partition("/")
    if not bucket:
        raise OSError("an s3:// URI needs a bucket: s3://BUCKET/PREFIX")
    return bucket, key


@cache
def _client() -> Any:
    """One client per process; botocore retries and backs off."""
    return boto3.client(
        "s3",
        config=Config(
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=READ_TIMEOUT_S,
            retries={"max_attempts": MAX_ATTEMPTS, "mode": "standard"},
            max_pool_connections=32,
        ),
    )


@contextmanager
def _as_os_error() -> Iterator[None]:
    """Turn botocore's errors into OSError; their text, which quotes keys, is left out."""
    try:
        yield
    except ClientError as error:
        status = int(error.response["ResponseMetadata"]["HTTPStatusCode"])
        if status == 404:
            raise FileNotFoundError("no such object or bucket in the object store") from None
        if error.response["Error"].get("Code") in NO_ACCESS:
            raise AccessError(f"the object store refuses the credentials: {error.response['Error']['Code']}") from None
        raise OSError(f"the object store answered {status} {error.response['Error'].get('Code', '')}") from None
    except (NoCredentialsError, CredentialRetrievalError) as error:
        raise AccessError(f"no credentials for the object store: {type(error).__name__}") from None
    except (BotoCoreError, HTTPError) as error:
        raise OSError(f"the object store does not answer: {type(error).__name__}") from None
