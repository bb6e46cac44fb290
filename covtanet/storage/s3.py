"""The store of s3:// URIs, on boto3.

Endpoint and credentials come from the standard AWS variables.
"""

import io
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import IO, Any

import boto3
import pyarrow.fs as pafs
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    NoCredentialsError,
)
from urllib3.exceptions import HTTPError

from covtanet.errors import AccessError, ObjectChangedError
from covtanet.storage.store import CHUNK_BYTES, Folder, ObjectInfo, check_count
from covtanet.storage.uri import S3, split_s3

CONNECT_TIMEOUT_S = 10
# Of one attempt: a read that fails is tried again, by botocore and by ``read_chunks``.
READ_TIMEOUT_S = 60
MAX_ATTEMPTS = 5
# Before a broken stream is resumed; the pause doubles with each attempt.
FIRST_PAUSE_S = 0.25
MAX_CONNECTIONS = 32
# One PUT takes 5 GB at most, and a large one that breaks off begins anew. Choice: four parts of 16
# MiB in memory; a file of more than 10,000 of them is sent in larger ones.
MULTIPART = TransferConfig(
    multipart_threshold=64 << 20, multipart_chunksize=16 << 20, max_concurrency=4
)
ALWAYS_MULTIPART = TransferConfig(multipart_threshold=1)
# Argument of a PUT, and of the request that joins parts, that replaces nothing.
CREATE = {"IfNoneMatch": "*"}
# HTTP.
NOT_FOUND, CONFLICT, PRECONDITION_FAILED, RANGE_NOT_SATISFIABLE = 404, 409, 412, 416
# Error codes of refused credentials: no other object can be read with them either.
NO_ACCESS = {
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
}


class S3Store:
    """Objects of an S3 server."""

    def walk(self, root: str, max_objects: float, leaves_root: bool) -> Iterator[Folder]:
        """Group a flat listing by folder. A bucket has no links: ``leaves_root`` changes nothing.

        Keys come in order: a folder is complete once a key does not begin with it.
        """
        bucket, prefix = split_s3(root.rstrip("/") + "/")
        open_folders: list[Folder] = []
        for num_objects, item in enumerate(_list_objects(bucket, prefix), start=1):
            check_count(num_objects, max_objects)
            path = str(item["Key"])[len(prefix) :]
            folder = path[: path.rfind("/") + 1]
            # Deeper folders stand above their parents on the stack and are complete first.
            while open_folders and not folder.startswith(open_folders[-1][0]):
                yield open_folders.pop()
            if not open_folders or open_folders[-1][0] != folder:
                open_folders.append((folder, []))
            open_folders[-1][1].append(ObjectInfo(path, int(item["Size"]), _etag(item)))
        while open_folders:
            yield open_folders.pop()

    def list_names(self, folder: str) -> list[str]:
        """Return the names directly below a prefix, those of deeper prefixes included."""
        bucket, prefix = split_s3(folder.rstrip("/") + "/")
        names: set[str] = set()
        with errors_as_os_error():
            for page in _pages(Bucket=bucket, Prefix=prefix, Delimiter="/"):
                keys = [item["Key"] for item in page.get("Contents", ())]
                keys += [item["Prefix"] for item in page.get("CommonPrefixes", ())]
                names |= {key[len(prefix) :].strip("/") for key in keys}
        return sorted(names - {""})

    def describe(self, uri: str) -> ObjectInfo | None:
        """Return one object as a listing shows it; None for a whole bucket."""
        bucket, key = split_s3(uri)
        if not key:
            return None
        try:
            with errors_as_os_error():
                answer = client().head_object(Bucket=bucket, Key=key)
        except FileNotFoundError:
            return None
        return ObjectInfo(uri.rpartition("/")[2], int(answer["ContentLength"]), _etag(answer))

    def read(self, uri: str, max_bytes: int | None) -> bytes:
        """Read an object, or only its first bytes; once more if the answer breaks off."""
        bucket, key = split_s3(uri)
        extra = {} if max_bytes is None else {"Range": f"bytes=0-{max_bytes - 1}"}
        with errors_as_os_error():
            for attempt in range(MAX_ATTEMPTS):
                try:
                    body = client().get_object(Bucket=bucket, Key=key, **extra)["Body"]
                except ClientError as error:
                    if _status(error) == RANGE_NOT_SATISFIABLE:  # an empty object has no first byte
                        return b""
                    raise
                # botocore retries requests, but not a body that breaks off while it is read.
                try:
                    return bytes(body.read())
                except (BotoCoreError, HTTPError):
                    if attempt == MAX_ATTEMPTS - 1:
                        raise
                    time.sleep(FIRST_PAUSE_S * 2**attempt)
        raise AssertionError("every attempt returns or raises")

    def read_chunks(self, uri: str, expected: ObjectInfo | None) -> Iterator[bytes]:
        """Read an object in chunks; resume a broken stream of a listed object."""
        bucket, key = split_s3(uri)
        if expected is None:
            with errors_as_os_error():
                body = client().get_object(Bucket=bucket, Key=key)["Body"]
                yield from body.iter_chunks(CHUNK_BYTES)
            return
        num_read = 0
        # botocore retries requests, but not a body that breaks off while it is read.
        for attempt in range(MAX_ATTEMPTS):
            try:
                for chunk in _read_from(bucket, key, num_read, expected):
                    num_read += len(chunk)
                    yield chunk
                return
            # Final answers: another attempt gets the same.
            except (FileNotFoundError, ObjectChangedError, AccessError):
                raise
            except OSError:
                # With all bytes read there is no range left to ask for.
                if attempt == MAX_ATTEMPTS - 1 or num_read == expected.num_bytes:
                    raise
                time.sleep(FIRST_PAUSE_S * 2**attempt)

    def put(self, uri: str, file: IO[bytes], *, only_new: bool) -> bool:
        """Write an object: a small one by one PUT, a large one in parts that are joined at the end.

        With ``only_new`` the PUT, or the request that joins the parts, is conditional
        (If-None-Match).
        """
        return self._put(uri, file, only_new, MULTIPART)

    def _put(self, uri: str, file: IO[bytes], only_new: bool, multipart: TransferConfig) -> bool:
        bucket, key = split_s3(uri)
        with errors_as_os_error():
            try:
                if _num_bytes(file) >= multipart.multipart_threshold:
                    _upload_in_parts(bucket, key, file, only_new, multipart)
                else:
                    condition = CREATE if only_new else {}
                    client().put_object(Bucket=bucket, Key=key, Body=file, **condition)
            except ClientError as error:
                # Another PUT at the same time, or before.
                if only_new and _status(error) in (CONFLICT, PRECONDITION_FAILED):
                    return False
                raise
        return True

    def honours_create(self, folder: str) -> bool:
        """Return whether the server keeps ``only_new`` from replacing an object.

        Some servers ignore the condition, or that of uploads in parts: objects of a few bytes show
        it.
        """
        uri = f"{folder.rstrip('/')}/_probe-{uuid.uuid4().hex}"
        try:
            is_written = self._put(uri, io.BytesIO(b"1"), True, MULTIPART)
            if not is_written or self._put(uri, io.BytesIO(b"2"), True, MULTIPART):
                return False
            return not self._put(uri, io.BytesIO(b"3"), True, ALWAYS_MULTIPART)
        finally:
            self.delete(uri)

    def delete(self, uri: str) -> None:
        """Delete an object, if it exists."""
        bucket, key = split_s3(uri)
        with errors_as_os_error():
            client().delete_object(Bucket=bucket, Key=key)

    def delete_folder(self, uri: str) -> None:
        """Delete everything below a prefix.

        Raises:
            OSError: some objects could not be deleted.
        """
        bucket, prefix = split_s3(uri.rstrip("/") + "/")
        with errors_as_os_error():
            for page in _pages(Bucket=bucket, Prefix=prefix):
                keys = [{"Key": item["Key"]} for item in page.get("Contents", ())]
                if not keys:
                    continue
                request = {"Objects": keys, "Quiet": True}
                answer = client().delete_objects(Bucket=bucket, Delete=request)
                # The call is answered with 200 even if objects stay.
                if errors := answer.get("Errors"):
                    code = errors[0].get("Code", "")
                    raise OSError(
                        f"{len(errors)} of {len(keys)} objects could not be deleted: {code}"
                    )

    def filesystem(self, uri: str) -> tuple[pafs.FileSystem, str]:
        """Return s3fs as a pyarrow file system.

        The client of pyarrow itself writes folder markers, which some servers keep.
        """
        # Its import takes as long as that of all else here, and few processes need it.
        import s3fs

        return pafs.PyFileSystem(pafs.FSSpecHandler(s3fs.S3FileSystem())), uri.removeprefix(S3)


@cache
def client() -> Any:
    """Return this process's client."""
    return _new_client()


def _new_client() -> Any:
    """Return a client that retries and backs off."""
    return boto3.client(
        "s3",
        config=Config(
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=READ_TIMEOUT_S,
            retries={"max_attempts": MAX_ATTEMPTS, "mode": "standard"},
            max_pool_connections=MAX_CONNECTIONS,
        ),
    )


def _upload_in_parts(
    bucket: str, key: str, file: IO[bytes], only_new: bool, multipart: TransferConfig
) -> None:
    """Upload by boto3's transfer, which sends parts side by side and removes them if one fails."""
    uploader = client()
    if only_new:
        # The transfer takes no condition, so that a client of its own adds it to the last request.
        uploader = _new_client()
        event = "provide-client-params.s3.CompleteMultipartUpload"
        uploader.meta.events.register(event, lambda params, **_: {**params, **CREATE})
    uploader.upload_fileobj(file, bucket, key, Config=multipart)


def _num_bytes(file: IO[bytes]) -> int:
    start = file.tell()
    num_bytes = file.seek(0, io.SEEK_END) - start
    file.seek(start)
    return num_bytes


@contextmanager
def errors_as_os_error() -> Iterator[None]:
    """Turn botocore's errors into OSError; their text, which quotes keys, is left out."""
    try:
        yield
    except ClientError as error:
        code = str(error.response["Error"].get("Code", ""))
        if _status(error) == NOT_FOUND:
            # "from None": the error's text would quote the key, which may name a patient.
            raise FileNotFoundError("the object or bucket is missing in the object store") from None
        if code in NO_ACCESS:
            raise AccessError(f"the object store refuses the credentials: {code}") from None
        raise OSError(f"the object store answered {_status(error)} {code}") from None
    except (NoCredentialsError, CredentialRetrievalError) as error:
        raise AccessError(f"no credentials for the object store: {type(error).__name__}") from None
    except (BotoCoreError, HTTPError) as error:
        raise OSError(f"the object store does not answer: {type(error).__name__}") from None


def _pages(**request: str) -> Iterator[dict[str, Any]]:
    """Yield the pages of a listing."""
    yield from client().get_paginator("list_objects_v2").paginate(**request)


def _list_objects(bucket: str, prefix: str) -> Iterator[dict[str, Any]]:
    """Yield the entries of a flat listing, without the markers that stand for folders."""
    with errors_as_os_error():
        for page in _pages(Bucket=bucket, Prefix=prefix):
            for item in page.get("Contents", ()):
                # Markers of folders are objects without content, which some clients write.
                if not str(item["Key"]).endswith("/"):
                    yield item


def _read_from(bucket: str, key: str, start: int, expected: ObjectInfo) -> Iterator[bytes]:
    """Read a listed object from the byte ``start`` to its end.

    Raises:
        ObjectChangedError: size or ETag differ from the listing.
    """
    extra = {"Range": f"bytes={start}-"} if start else {}
    with errors_as_os_error():
        # Not If-Match: some servers ignore it (rclone), so that size and ETag are compared here.
        answer = client().get_object(Bucket=bucket, Key=key, **extra)
        num_bytes = int(answer["ContentLength"]) + start
        if (num_bytes, _etag(answer)) != (expected.num_bytes, expected.version):
            raise ObjectChangedError("an object differs from its entry in the listing")
        yield from answer["Body"].iter_chunks(CHUNK_BYTES)


def _etag(answer: dict[str, Any]) -> str:
    # S3 puts an ETag in quotation marks.
    return str(answer.get("ETag", "")).strip('"')


def _status(error: ClientError) -> int:
    return int(error.response["ResponseMetadata"]["HTTPStatusCode"])
