"""A TCP proxy before an S3 server that counts requests by method and kind of object."""

import re
import socket
import threading
from collections import Counter
from contextlib import suppress

from infra.local.services import LOOPBACK

REQUEST = re.compile(rb"(GET|PUT|HEAD|POST|DELETE) (/\S*) HTTP/1\.1\r\n")
# Longer than any request line of the benchmark.
MAX_LINE_BYTES = 4096


class CountingProxy:
    """Passes connections on to a port of loopback; ``requests`` has each method and path."""

    def __init__(self, port: int) -> None:
        self.requests: Counter[tuple[str, str]] = Counter()
        self._server_port = port
        self._lock = threading.Lock()
        self._listener = socket.create_server((LOOPBACK, 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Accept no more connections."""
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):  # the listener is closed
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection((LOOPBACK, self._server_port))
                for arguments in ((client, server, True), (server, client, False)):
                    threading.Thread(target=self._pass_on, args=arguments, daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, counts: bool) -> None:
        rest = b""
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if counts:
                    rest = self._count(rest + data)
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _count(self, data: bytes) -> bytes:
        """Count the request lines; return the bytes that may begin another one."""
        end = 0
        for line in REQUEST.finditer(data):
            with self._lock:
                self.requests[line[1].decode(), line[2].decode()] += 1
            end = line.end()
        return data[end:][-MAX_LINE_BYTES:]
