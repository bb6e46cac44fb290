"""A TCP proxy that slows a server down, as a far or overloaded store does, cuts it, or shuts it."""

import socket
import ssl
import threading
import time
from contextlib import suppress
from pathlib import Path

from infra.local.services import LOOPBACK, free_ports

CHUNK_BYTES = 1 << 14
BUSY = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class SlowDoor:
    """Pass connections on to a port of loopback.

    bytes_per_s: limit of one connection's answers; 0 for no limit. is_shut: accept no connection
    and pass nothing on. cut_after_bytes: close a connection behind so many bytes of its answers,
    the first ``num_cuts`` times that one has more. busy_answers: answer so many requests with 503,
    or with ``busy_answer``.
    certificate: PEM file with a certificate and its key; clients must speak TLS.
    """

    def __init__(self, port: int, listen_on: int = 0, certificate: Path | None = None) -> None:
        self.server_port = port
        self.port = listen_on or free_ports(1)[0]
        self.bytes_per_s = 0.0
        self.is_shut = False
        self.cut_after_bytes = 0
        self.num_cuts = 0
        self.busy_answers = 0
        self.busy_answer = BUSY
        self.num_connections = 0
        self._tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH) if certificate else None
        if self._tls is not None:
            self._tls.load_cert_chain(str(certificate))
        self._listener = socket.create_server((LOOPBACK, self.port))
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Accept no more connections."""
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):  # the listener is closed
            while True:
                client, _ = self._listener.accept()
                self.num_connections += 1
                if self.busy_answers:
                    self.busy_answers -= 1
                    threading.Thread(target=self._answer_busy, args=(client,), daemon=True).start()
                    continue
                if self.is_shut:
                    client.close()
                    continue
                threading.Thread(target=self._connect, args=(client,), daemon=True).start()

    def _answer_busy(self, client: socket.socket) -> None:
        with client, suppress(OSError):
            client.recv(CHUNK_BYTES)
            client.sendall(self.busy_answer)

    def _connect(self, client: socket.socket) -> None:
        with suppress(OSError):  # the client does not trust the certificate, or the server is away
            if self._tls is not None:
                client = self._tls.wrap_socket(client, server_side=True)
            server = socket.create_connection((LOOPBACK, self.server_port))
            arguments = (client, server, False)
            threading.Thread(target=self._pass_on, args=arguments, daemon=True).start()
            self._pass_on(server, client, True)
            return
        client.close()

    def _pass_on(self, source: socket.socket, target: socket.socket, is_answer: bool) -> None:
        num_passed = 0
        with suppress(OSError):
            while data := source.recv(CHUNK_BYTES):
                if self.is_shut:
                    break
                num_passed += len(data)
                if is_answer and self.num_cuts and num_passed > self.cut_after_bytes:
                    self.num_cuts -= 1
                    break
                if is_answer and self.bytes_per_s:
                    time.sleep(len(data) / self.bytes_per_s)
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
