"""An HTTP proxy before an S3 server that slows it down, shuts it, or lets it lie."""

import http.client
import threading
import time
from collections import Counter
from collections.abc import Iterable
from enum import StrEnum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from infra.local.services import LOOPBACK

UPSTREAM_TIMEOUT_S = 60
# Of a far store under load.
SLOW_REQUEST_S, SLOW_BYTES_PER_S = 0.15, 500_000
# A store that lies does so now and then: every answer would leave nothing to compare.
EVERY_NTH = 9
# The next request of a connection tells its end from the next one's begin by these.
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "expect"}


class StoreFault(StrEnum):
    """What is wrong with the store."""

    SLOW = "slow store"
    """0.15 s more for each request, and 500 kB/s."""
    BUSY = "503 from the store"
    """503 SlowDown for every second request."""
    AWAY = "store away"
    """Connections are closed without an answer."""
    CUT = "bodies cut off"
    """Every ninth body, of a listing too, ends half-way."""
    SHORT = "bodies short"
    """Every ninth object has half of its bytes, and the header says so."""
    WRONG_ETAG = "wrong ETags"
    """Every ninth object comes with the ETag of another."""
    EXPIRED = "expired credentials"
    """403 ExpiredToken for every request."""


# With these a night may not learn of all that earlier nights did, and screens series once more.
HIDING_FAULTS = (StoreFault.CUT, StoreFault.SHORT)


class FaultyStore:
    """The proxy on a free port of loopback. faults: none passes everything on."""

    def __init__(self, upstream: str) -> None:
        self.faults: set[StoreFault] = set()
        self._affected: Counter[StoreFault] = Counter()
        self._seen: Counter[StoreFault] = Counter()
        self._lock = threading.Lock()
        address = urlsplit(upstream)

        class Handler(_Handler):
            store = self
            upstream = (str(address.hostname), int(address.port or 80))

        self._server = _Server((LOOPBACK, 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://{LOOPBACK}:{self._server.server_port}"

    def close(self) -> None:
        """Accept no more connections."""
        self._server.shutdown()
        self._server.server_close()

    def num_affected(self, fault: StoreFault) -> int:
        """Return how many requests met a fault so far."""
        return self._affected[fault]

    def meets(self, fault: StoreFault, every: int = 1) -> bool:
        """Count a request; return whether the fault is there and it is the request's turn."""
        if fault not in self.faults:
            return False
        with self._lock:
            self._seen[fault] += 1
            is_turn = self._seen[fault] % every == 0
            self._affected[fault] += is_turn
        return is_turn


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *args: object) -> None:
        """Print nothing: a client that is killed resets its connections."""


class _Handler(BaseHTTPRequestHandler):
    """One connection of a client."""

    protocol_version = "HTTP/1.1"
    store: FaultyStore
    upstream: tuple[str, int]

    def _relay(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        meets = self.store.meets
        if meets(StoreFault.AWAY):
            self.close_connection = True
        elif meets(StoreFault.EXPIRED):
            self._refuse(403, "ExpiredToken")
        elif meets(StoreFault.BUSY, 2):
            self._refuse(503, "SlowDown")
        else:
            self._pass_on(body)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _relay  # noqa: N815

    def _pass_on(self, body: bytes) -> None:
        """Ask the server, and send on its answer, or a changed one."""
        bytes_per_s = 0
        if self.store.meets(StoreFault.SLOW):
            bytes_per_s = SLOW_BYTES_PER_S
            time.sleep(SLOW_REQUEST_S)
        try:
            status, headers, data = self._ask(body)
            num_sent = len(data)
            if self.command == "GET" and status in (200, 206) and data:
                headers, num_sent = self._lie(headers, len(data))
            self._send(status, headers, data[:num_sent], bytes_per_s)
            # The client must not take the next answer for the rest of this one.
            self.close_connection |= num_sent < len(data)
        except (OSError, http.client.HTTPException):
            self.close_connection = True  # either side has gone

    def _ask(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body of the server's answer."""
        connection = http.client.HTTPConnection(*self.upstream, timeout=UPSTREAM_TIMEOUT_S)
        try:
            connection.request(self.command, self.path, body, _end_to_end(self.headers.items()))
            answer = connection.getresponse()
            data = answer.read()
        finally:
            connection.close()
        headers = _end_to_end(answer.getheaders())
        if self.command != "HEAD":
            headers["content-length"] = str(len(data))
        return answer.status, headers, data

    def _lie(self, headers: dict[str, str], num_bytes: int) -> tuple[dict[str, str], int]:
        """Return the headers and the number of bytes to send of a body."""
        half, is_object = num_bytes // 2, "etag" in headers
        if self.store.meets(StoreFault.CUT, EVERY_NTH):
            return headers, half
        if is_object and self.store.meets(StoreFault.SHORT, EVERY_NTH):
            return {**headers, "content-length": str(half)}, half
        if is_object and self.store.meets(StoreFault.WRONG_ETAG, EVERY_NTH):
            return {**headers, "etag": f'"{"0" * 32}"'}, num_bytes
        return headers, num_bytes

    def _send(self, status: int, headers: dict[str, str], data: bytes, bytes_per_s: int) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if bytes_per_s:
            time.sleep(len(data) / bytes_per_s)
        self.wfile.write(data)
        self.wfile.flush()

    def _refuse(self, status: int, code: str) -> None:
        text = "" if self.command == "HEAD" else f"<Error><Code>{code}</Code></Error>"
        headers = {"content-type": "application/xml", "content-length": str(len(text))}
        self._send(status, headers, text.encode(), 0)

    def log_message(self, *args: object) -> None:
        """Log nothing: paths may name a series."""


def _end_to_end(headers: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return headers that are not of one connection alone, their names in lower case."""
    return {name.lower(): value for name, value in headers if name.lower() not in HOP_BY_HOP}
