"""URIs of storage; nothing here reads or writes.

A local path, ``s3://BUCKET/KEY``, or a DICOMweb server as ``dicomweb+https://HOST/PATH``, which is
an archive to read. Keys are opaque: they are never unquoted or normalised, and joined only with
``/``.
"""

import os
import re
from pathlib import Path
from urllib.parse import urlsplit

from covtanet.environment import allows_plain_http
from covtanet.errors import ConfigError

S3 = "s3://"
DICOMWEB, DICOMWEB_PLAIN = "dicomweb+https://", "dicomweb+http://"
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,62}")
HOST = re.compile(r"([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?")
PATH = re.compile(r"(/[A-Za-z0-9._~-]+)*")


def is_s3(uri: str) -> bool:
    """Return whether a URI names an object store rather than a local path."""
    return uri.startswith(S3)


def is_dicomweb(uri: str) -> bool:
    """Return whether a URI names a DICOMweb server."""
    return uri.startswith((DICOMWEB, DICOMWEB_PLAIN))


def http_url(uri: str) -> str:
    """Return the URL by which HTTP reaches a DICOMweb URI."""
    return uri.removeprefix("dicomweb+")


def split_query(uri: str) -> tuple[str, str]:
    """Return a DICOMweb URI without its query, and the query; other URIs have none."""
    if not is_dicomweb(uri):
        return uri, ""
    root, _, query = uri.partition("?")
    return root, query


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
        ConfigError: unsupported scheme, an s3:// URI with more than bucket and key, a DICOMweb URI
            with more than host and path, or one in clear text to another machine.
    """
    if is_dicomweb(uri):
        return _absolute_dicomweb(uri)
    scheme = SCHEME.match(uri)
    if scheme and scheme[0].lower() not in (S3, "file://"):
        raise ConfigError(
            f"unsupported scheme {scheme[0]}, expected a path, s3://BUCKET/PREFIX or "
            "dicomweb+https://HOST/PATH"
        )
    if not is_s3(uri):
        return str(Path(uri.removeprefix("file://")).expanduser().resolve())
    bucket, _, key = uri.removeprefix(S3).partition("/")
    if not BUCKET.fullmatch(bucket) or ".." in key.split("/"):
        raise ConfigError("expected s3://BUCKET/PREFIX without user, port, query or '..'")
    return uri.rstrip("/")


def _absolute_dicomweb(uri: str) -> str:
    host, slash, path = http_url(uri).partition("://")[2].partition("/")
    path = f"{slash}{path}".rstrip("/")
    # HTTP leaves out a segment that is a dot, so that the path would be another.
    # Not quoted in the message: what does not belong into a URI may be a password.
    if not HOST.fullmatch(host) or not PATH.fullmatch(path) or {".", ".."} & set(path.split("/")):
        raise ConfigError(
            "expected dicomweb+https://HOST[:PORT]/PATH without user and password, which come from "
            "the environment (docs/pacs.md)"
        )
    if uri.startswith(DICOMWEB_PLAIN):
        name = urlsplit(f"//{host}").hostname or ""
        if not allows_plain_http(os.environ, name):
            raise ConfigError(
                f"dicomweb+http to {name}: images and passwords would travel in clear text, "
                "expected dicomweb+https, or loopback"
            )
    scheme = DICOMWEB_PLAIN if uri.startswith(DICOMWEB_PLAIN) else DICOMWEB
    return f"{scheme}{host}{path}"


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
