"""URIs of storage: a local path or ``s3://BUCKET/KEY``. Nothing here reads or writes.

Keys are opaque: they are never unquoted or normalised, and joined only with ``/``.
"""

import os
import re
from pathlib import Path

from covtanet.errors import ConfigError

S3 = "s3://"
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,62}")


def is_s3(uri: str) -> bool:
    """Return whether a URI names an object store rather than a local path."""
    return uri.startswith(S3)


def join(root: str, *parts: str) -> str:
    """Append path parts to a root URI."""
    return "/".join([root.rstrip("/"), *parts])


def resolve(root: str, path: str) -> str:
    """Return the URI of a path from the index of a data set.

    An absolute path or an s3:// URI is kept; any other path lies below the root.
    """
    if is_s3(path):
        return path
    if is_s3(root):
        return join(root, path)
    return os.path.normpath(path if path.startswith("/") else join(root, path))


def absolute(uri: str) -> str:
    """Return the URI with an absolute local path and without a trailing slash.

    Raises:
        ConfigError: unsupported scheme, or an s3:// URI with more than bucket and key.
    """
    scheme = SCHEME.match(uri)
    if scheme and scheme[0].lower() not in (S3, "file://"):
        raise ConfigError(f"unsupported scheme {scheme[0]}, expected a path or s3://BUCKET/PREFIX")
    if not is_s3(uri):
        return str(Path(uri.removeprefix("file://")).expanduser().resolve())
    bucket, _, key = uri.removeprefix(S3).partition("/")
    if not BUCKET.fullmatch(bucket) or ".." in key.split("/"):
        raise ConfigError("expected s3://BUCKET/PREFIX without user, port, query or '..'")
    return uri.rstrip("/")


def split_s3(uri: str) -> tuple[str, str]:
    """Return bucket and key of an s3:// URI.

    Raises:
        OSError: the bucket is missing.
    """
    bucket, _, key = uri.removeprefix(S3).partition("/")
    if not bucket:
        raise OSError("an s3:// URI needs a bucket: s3://BUCKET/PREFIX")
    return bucket, key


def local_path(folder: Path, name: str) -> Path:
    """Return the path of a name below a local folder.

    Every name that comes from a listing has to pass here.

    Raises:
        ValueError: an absolute name, one with '..', or one that leads out of the folder by a link.
    """
    path = folder / name
    is_inside = path.resolve().is_relative_to(folder.resolve())
    if name.startswith("/") or ".." in name.split("/") or not is_inside:
        raise ValueError("a name leads out of the folder that it is written to")
    return path
