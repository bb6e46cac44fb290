"""The parts of a multipart/related answer, as they come.

Memory holds one chunk of the answer and the data that it contains, never a whole part.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from email.message import Message

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser

MULTIPART = "multipart/related"


@dataclass
class Part:
    """One part; its chunks can be read once, before the next part is asked for."""

    chunks: Iterator[bytes]
    num_bytes: int | None = None
    """Bytes that the part's own header promises."""
    _seen: int = field(default=0, repr=False)

    def read(self) -> Iterator[bytes]:
        """Yield the chunks.

        Raises:
            OSError: the answer breaks off, or the part has another length than its header says.
        """
        for chunk in self.chunks:
            self._seen += len(chunk)
            yield chunk
        if self.num_bytes is not None and self._seen != self.num_bytes:
            raise OSError(f"a part has {self._seen} bytes, expected {self.num_bytes}")


def boundary_of(content_type: str) -> str:
    """Return the boundary of a multipart content type.

    Raises:
        OSError: it is another type, or the boundary is missing.
    """
    message = Message()
    message["content-type"] = content_type
    boundary = message.get_param("boundary")
    if message.get_content_type() != MULTIPART or not isinstance(boundary, str) or not boundary:
        raise OSError(f"the answer is not {MULTIPART} with a boundary")
    return boundary


def read_parts(chunks: Iterable[bytes], boundary: str) -> Iterator[Part]:
    """Yield the parts of an answer; what is left unread of a part is skipped.

    Raises:
        OSError: the answer breaks off before its closing boundary, or is no multipart.
    """
    events = _Events(boundary)
    source = iter(chunks)
    while (event := events.next(source)) is not None:
        if isinstance(event, _Beginning):
            part = Part(_data_of_part(events, source), event.num_bytes)
            yield part
            for _ in part.read():
                pass


def _data_of_part(events: "_Events", source: Iterator[bytes]) -> Iterator[bytes]:
    while True:
        event = events.next(source)
        if not isinstance(event, bytes):  # the end of the part
            return
        yield event


_END = object()


@dataclass
class _Beginning:
    num_bytes: int | None


class _Events:
    """Beginnings, data and ends of parts, in the order in which they come."""

    def __init__(self, boundary: str) -> None:
        # A chunk may hold several parts: each beginning keeps the length from its own header.
        self._queue: deque[object] = deque()
        self._num_bytes: int | None = None
        self._name = bytearray()
        self._value = bytearray()
        self._is_complete = False
        self._parser = MultipartParser(
            boundary.encode("latin-1"),
            {
                "on_part_begin": self._begin_part,
                "on_header_field": lambda data, start, end: self._name.extend(data[start:end]),
                "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
                "on_header_end": self._end_header,
                "on_headers_finished": self._end_headers,
                "on_part_data": lambda data, start, end: self._queue.append(data[start:end]),
                "on_part_end": lambda: self._queue.append(_END),
                "on_end": self._complete,
            },
        )

    def next(self, source: Iterator[bytes]) -> object | None:
        """Return the next event, None after the closing boundary.

        Raises:
            OSError: the answer ends before it, or is no multipart.
        """
        while not self._queue:
            if self._is_complete:
                return None
            chunk = next(source, None)
            if chunk is None:
                raise OSError("the answer breaks off before its closing boundary")
            try:
                self._parser.write(chunk)
            except FormParserError:
                raise OSError("the answer is no sound multipart") from None
        return self._queue.popleft()

    def _begin_part(self) -> None:
        self._num_bytes = None

    def _end_header(self) -> None:
        if self._name.lower() == b"content-length" and self._value.strip().isdigit():
            self._num_bytes = int(self._value)
        self._name.clear()
        self._value.clear()

    def _end_headers(self) -> None:
        self._queue.append(_Beginning(self._num_bytes))

    def _complete(self) -> None:
        self._is_complete = True
