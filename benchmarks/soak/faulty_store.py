"""An HTTP proxy before an S3 server that slows it down, shuts it, or lets it lie."""

import http.client
import threading
import time
from contextlib import suppress
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


ERROR_CODES = {StoreFault.BUSY: (503, "SlowDown"), StoreFault.EXPIRED: (403, "ExpiredToken")}


class FaultyStore:
    """The proxy on a free port of loopback. fault: none passes everything on."""

    def __init__(self, upstream: str) -> None:
        self.fault: StoreFault | None = None
        self.num_affected = 0
        self._counts: dict[str, int] = {}
        self._lock = threading.Lock()
        address = urlsplit(upstream)

        class Handler(_Handler):
            store = self
            upstream = (str(address.hostname), int(address.port or 80))

        self._server = ThreadingHTTPServer((LOOPBACK, 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://{LOOPBACK}:{self._server.server_port}"

    def close(self) -> None:
        """Accept no more connections."""
        self._server.shutdown()
        self._server.server_close()

    def is_turn(self, what: str, every: int) -> bool:
        """Count an event; return whether it is one of those to be affected."""
        with self._lock:
            self._counts[what] = self._counts.get(what, 0) + 1
            is_turn = self._counts[what] % every == 0
            self.num_affected += is_turn
        return is_turn


class _Handler(BaseHTTPRequestHandler):
    """One connection of a client."""

    protocol_version = "HTTP/1.1"
    store: FaultyStore
    upstream: tuple[str, int]

    def _relay(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.store.fault
        if fault == StoreFault.AWAY:
            self.store.is_turn(fault, 1)
            self.close_connection = True
            return
        if fault == StoreFault.EXPIRED or (
            fault == StoreFault.BUSY and self.store.is_turn(fault, 2)
        ):
            self._refuse(*ERROR_CODES[fault])
            return
        if fault == StoreFault.SLOW:
            self.store.is_turn(fault, 1)
            time.sleep(SLOW_REQUEST_S)
        with suppress(OSError, http.client.HTTPException):
            self._answer(body, fault)
            return
        self.close_connection = True  # either side has gone

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _relay  # noqa: N815

    def _answer(self, body: bytes, fault: StoreFault | None) -> None:
        """Ask the server and send on its answer, changed by the fault."""
        connection = http.client.HTTPConnection(*self.upstream, timeout=UPSTREAM_TIMEOUT_S)
        try:
            headers = {k: v for k, v in self.headers.items() if k.lower() not in HOP_BY_HOP}
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            data = answer.read()
        finally:
            connection.close()
        headers = {k: v for k, v in answer.getheaders() if k.lower() not in HOP_BY_HOP}
        if self.command != "HEAD":
            headers["Content-Length"] = str(len(data))
        num_sent = len(data)
        if self.command == "GET" and answer.status in (200, 206) and data:
            headers, num_sent = self._lie(headers, num_sent, fault)
        self._send(answer.status, headers, data[:num_sent], fault)
        self.close_connection |= num_sent < len(data)

    def _lie(
        self, headers: dict[str, str], num_bytes: int, fault: StoreFault | None
    ) -> tuple[dict[str, str], int]:
        """Return the headers and the number of bytes to send of a body."""
        is_object = "ETag" in {name.title().replace("Etag", "ETag") for name in headers}
        if fault == StoreFault.CUT and self.store.is_turn(fault, EVERY_NTH):
            return headers, num_bytes // 2
        if not is_object:
            return headers, num_bytes
        if fault == StoreFault.SHORT and self.store.is_turn(fault, EVERY_NTH):
            half = num_bytes // 2
            return {**headers, "Content-Length": str(half)}, half
        if fault == StoreFault.WRONG_ETAG and self.store.is_turn(fault, EVERY_NTH):
            kept = {k: v for k, v in headers.items() if k.lower() != "etag"}
            return {**kept, "ETag": f'"{"0" * 32}"'}, num_bytes
        return headers, num_bytes

    def _send(
        self, status: int, headers: dict[str, str], data: bytes, fault: StoreFault | None
    ) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if fault == StoreFault.SLOW:
            time.sleep(len(data) / SLOW_BYTES_PER_S)
        self.wfile.write(data)
        self.wfile.flush()

    def _refuse(self, status: int, code: str) -> None:
        self.store.is_turn(code, 1)
        text = "" if self.command == "HEAD" else f"<Error><Code>{code}</Code></Error>"
        headers = {"Content-Type": "application/xml", "Content-Length": str(len(text))}
        self._send(status, headers, text.encode(), None)

    def log_message(self, *args: object) -> None:
        """Log nothing: paths may name a series."""
