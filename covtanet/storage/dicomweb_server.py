"""HTTP to a DICOMweb server: credentials, TLS, retries, and its refusals as errors of storage.

The environment of every process that reads or writes names the credentials, as it does for S3:

COVTANET_DICOMWEB_USER      name of basic authentication
COVTANET_DICOMWEB_PASSWORD  its password, or COVTANET_DICOMWEB_PASSWORD_FILE
COVTANET_DICOMWEB_TOKEN     a bearer token instead, or COVTANET_DICOMWEB_TOKEN_FILE
COVTANET_DICOMWEB_CA_FILE   certificates of a private authority

Files are read for every request, so that a token may be renewed during a run. Nothing else of the
environment counts: no proxy, no .netrc. No error has the server's text or a URL in it, which may
name a patient.
"""

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import requests
from requests.adapters import HTTPAdapter
from requests.auth import AuthBase, _basic_auth_str
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    MaxRetryError,
    NewConnectionError,
)
from urllib3.util import Retry

from covtanet.errors import AccessError, ConfigError, UnreachableError
from covtanet.storage.uri import http_url

PREFIX = "COVTANET_DICOMWEB_"
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 10, 60
# A server that trickles ends an answer here; a watchdog ends its worker after 30 minutes.
ANSWER_TIMEOUT_S = 900.0
CHUNK_BYTES = 1 << 18
# Pauses of 0, 1, 2, 4, 8 and 16 s: a server may restart within half a minute, and close connections
# until then.
MAX_RETRIES, BACKOFF_S, MAX_RETRY_AFTER_S = 6, 0.5, 60
RETRIED = (429, 502, 503, 504)
# Connections of one process.
MAX_CONNECTIONS = 8
# A page of 500 series or the instances of a series have a few MB.
MAX_JSON_BYTES = 64 << 20
DICOM_JSON = "application/dicom+json"

# Values of the query, in order; a name may stand twice.
Query = Sequence[tuple[str, str]]
Attributes = dict[str, Any]
"""A data set as DICOM JSON (PS3.18, F.2): elements by their tag in eight hex digits."""


class DicomwebServer:
    """One server, with a pool of connections that threads share.

    Every method raises:
        AccessError: it refuses the credentials.
        UnreachableError: it cannot be reached, after retries.
        FileNotFoundError: it has no such study, series or instance.
        OSError: it refuses otherwise, or its answer breaks off.
    """

    def __init__(
        self,
        root: str,
        environment: Mapping[str, str],
        *,
        max_retries: int = MAX_RETRIES,
        read_timeout_s: float = READ_TIMEOUT_S,
    ) -> None:
        """Open no connection yet. root: URI without query; see ``storage.absolute``."""
        self.url = http_url(root)
        self.read_timeout_s = read_timeout_s
        # Its warnings about retries quote the path, which names studies and series.
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
        self.session = open_session(
            environment,
            max_retries=max_retries,
            backoff_s=BACKOFF_S,
            max_retry_after_s=int(min(MAX_RETRY_AFTER_S, read_timeout_s)),
        )
        self.session.auth = Credentials(environment)

    def get_json(self, path: str, query: Query = ()) -> list[Attributes]:
        """Return the data sets of a search or of metadata; none for 204."""
        with self.get(path, DICOM_JSON, query) as response:
            content = _read_bounded(response, MAX_JSON_BYTES)
        # Nothing is found: 204, or a success without a body.
        return parse_json(content) if content else []

    def get_bytes(self, path: str, accept: str, query: Query, max_bytes: int) -> bytes:
        """Return a whole answer."""
        with self.get(path, accept, query) as response:
            return _read_bounded(response, max_bytes)

    @contextmanager
    def get(self, path: str, accept: str, query: Query = ()) -> Iterator[requests.Response]:
        """Open an answer whose status is a success; ``read_answer`` yields its bytes."""
        with self._request("GET", path, accept, query=query) as response:
            check_status(response.status_code)
            yield response

    @contextmanager
    def post(self, path: str, content_type: str, body: bytes) -> Iterator[requests.Response]:
        """Send a body; the caller checks the status."""
        with self._request(
            "POST", path, DICOM_JSON, body=body, content_type=content_type
        ) as response:
            yield response

    @contextmanager
    def _request(
        self,
        method: str,
        path: str,
        accept: str,
        *,
        query: Query = (),
        body: bytes | None = None,
        content_type: str | None = None,
    ) -> Iterator[requests.Response]:
        headers = {"Accept": accept}
        if content_type:
            headers["Content-Type"] = content_type
        # Orthanc 1.10 keeps an encoded comma, as urlencode would make it, for part of a name.
        text = "&".join(f"{name}={_quote(value)}" for name, value in query)
        url = f"{self.url}/{path}?{text}" if text else f"{self.url}/{path}"
        with errors_as_os_error():
            response = self.session.request(
                method,
                url,
                headers=headers,
                data=body,
                stream=True,
                timeout=(CONNECT_TIMEOUT_S, self.read_timeout_s),
                # Another host would get the credentials.
                allow_redirects=False,
            )
            with response:
                yield response


def open_session(
    environment: Mapping[str, str], *, max_retries: int, backoff_s: float, max_retry_after_s: int
) -> requests.Session:
    """Return a session that retries, trusts the certificates of the environment and nothing else.

    A request that changes something must be one that may be sent twice.
    """
    session = requests.Session()
    # A proxy or a .netrc of the user would get the hospital's requests or give them a password.
    session.trust_env = False
    # Bytes are read as they come: nothing inflates what the server chose to deflate.
    session.headers["Accept-Encoding"] = "identity"
    ca_file = environment.get(f"{PREFIX}CA_FILE")
    if ca_file:
        session.verify = ca_file
    retry = Retry(
        total=max_retries,
        # Such as a certificate that is not trusted: once more is the same.
        other=0,
        backoff_factor=backoff_s,
        status_forcelist=RETRIED,
        allowed_methods=("GET", "POST", "PUT"),
        retry_after_max=max_retry_after_s,
        redirect=0,
        raise_on_status=False,
    )
    adapter = HTTPAdapter(
        pool_maxsize=MAX_CONNECTIONS,
        max_retries=retry,
        # Threads wait for a connection instead of opening more than the server should have.
        pool_block=True,
    )
    for scheme in ("http://", "https://"):
        session.mount(scheme, adapter)
    return session


class Credentials(AuthBase):
    """The ``Authorization`` header of every request, by the environment."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """Check the files once.

        Raises:
            ConfigError: a file is missing or can be read by every user, or a user has no password.
        """
        self._environment = dict(environment)
        self.header()

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """Add the header."""
        if header := self.header():
            request.headers["Authorization"] = header
        return request

    def header(self) -> str:
        """Return the header; empty without credentials."""
        if token := self._secret("TOKEN"):
            return f"Bearer {token}"
        user = self._environment.get(f"{PREFIX}USER", "")
        if not user:
            return ""
        password = self._secret("PASSWORD")
        if not password:
            raise ConfigError(f"{PREFIX}USER is set, expected {PREFIX}PASSWORD or _PASSWORD_FILE")
        return _basic_auth_str(user.encode(), password.encode())

    def _secret(self, name: str) -> str:
        path = self._environment.get(f"{PREFIX}{name}_FILE")
        if not path:
            return self._environment.get(f"{PREFIX}{name}", "")
        try:
            mode = Path(path).stat().st_mode
            text = Path(path).read_text().strip()
        except OSError:
            raise ConfigError(f"the file of {PREFIX}{name}_FILE cannot be read") from None
        # A group may read it: Kubernetes gives secrets to the group of a pod.
        if mode & 0o007:
            raise ConfigError(
                f"the file of {PREFIX}{name}_FILE can be read by every user, expected mode 0600"
            )
        return text


@cache
def dicomweb_server(root: str) -> DicomwebServer:
    """Return this process's connections to a server."""
    return DicomwebServer(root, os.environ)


def read_answer(response: requests.Response) -> Iterator[bytes]:
    """Yield the bytes of an answer.

    Raises:
        OSError: it breaks off, or takes too long.
    """
    started = time.monotonic()
    with errors_as_os_error():
        for chunk in response.raw.stream(CHUNK_BYTES, decode_content=False):
            if time.monotonic() - started > ANSWER_TIMEOUT_S:
                raise OSError(f"an answer takes more than {ANSWER_TIMEOUT_S:g} s")
            yield chunk


def _read_bounded(response: requests.Response, max_bytes: int) -> bytes:
    content = bytearray()
    for chunk in read_answer(response):
        content += chunk
        if len(content) > max_bytes:
            raise OSError(f"an answer has more than {max_bytes} bytes")
    return bytes(content)


def parse_json(content: bytes) -> list[Attributes]:
    """Return the data sets of an answer in DICOM JSON.

    Raises:
        OSError: it is not a list of them.
    """
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        values = None
    if isinstance(values, dict):  # one data set, as STOW-RS answers
        values = [values]
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise OSError("the answer is no DICOM JSON")
    return values


def check_status(status: int) -> None:
    """Refuse an answer that is no success.

    Raises:
        AccessError, FileNotFoundError, OSError: see ``DicomwebServer``.
    """
    if status == requests.codes.unauthorized:
        raise AccessError(f"the DICOMweb server refuses the credentials: {status}")
    if status in (requests.codes.not_found, requests.codes.gone):
        raise FileNotFoundError("the DICOMweb server has no such study, series or instance")
    if not 200 <= status < 300:
        raise OSError(f"the DICOMweb server answered {status}")


@contextmanager
def errors_as_os_error() -> Iterator[None]:
    """Turn errors of HTTP into OSError; their text, which quotes the URL, is left out."""
    try:
        yield
    except requests.exceptions.SSLError:
        raise UnreachableError("the certificate of the DICOMweb server is not trusted") from None
    except (requests.RequestException, HTTPError) as error:
        cause = _cause_of(error)
        name = type(cause).__name__
        # No connection at all; one that breaks, or an answer that is late, may be the fault of a
        # single series.
        if isinstance(cause, NewConnectionError | ConnectTimeoutError):
            raise UnreachableError(f"the DICOMweb server does not answer: {name}") from None
        raise OSError(f"the DICOMweb server breaks off: {name}") from None


def _cause_of(error: Exception) -> Exception:
    """Return what went wrong with the last retry of a request; the error itself without one."""
    inner = error.args[0] if error.args else None
    if isinstance(inner, MaxRetryError) and inner.reason is not None:
        return inner.reason
    return error


def _quote(value: str) -> str:
    return quote(value, safe=",*-._~")
