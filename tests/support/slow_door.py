"""A door in front of a server that lets its answers through slowly, as a store far away or an overloaded one does."""

import socket
import threading
import time
from contextlib import suppress

from services import LOOPBACK, free_ports

CHUNK_BYTES = 1 << 14


class SlowDoor:
    """Passes connections on to a port of loopback.

    bytes_per_s: of one connection's answers; 0 for no limit. is_shut: lets nobody in and nothing through.
    """

    def __init__(self, port: int) -> None:
        self.server_port, (self.port,) = port, free_ports(1)
        self.bytes_per_s, self.is_shut = 0.0, False
        self._listener = socket.create_server((LOOPBACK, self.port))
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Let nobody in any more."""
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                if self.is_shut:
                    client.close()
                    continue
                server = socket.create_connection((LOOPBACK, self.server_port))
                for source, target, is_answer in ((client, server, False), (server, client, True)):
                    threading.Thread(
                        target=self._pass_on, args=(source, target, is_answer), daemon=True
                    ).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, is_answer: bool) -> None:
        with suppress(OSError):
            while data := source.recv(CHUNK_BYTES):
                if self.is_shut:
                    break
                if is_answer and self.bytes_per_s:
                    time.sleep(len(data) / self.bytes_per_s)
                target.sendall(data)
        for each in (source, target):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
