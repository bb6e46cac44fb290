"""The messages between the sandbox and its child, over two pipes: both sides of one format.

A request is a line of JSON and objects: for each a 1, its chunks after their lengths, and a length
of 0; a 0 ends them all. An answer is a line of JSON, which repeats the request's nonce, and the
bytes that it announces.

Choice: written here. ``send_bytes`` of ``multiprocessing.connection`` cannot time out, and its
``recv_bytes`` joins a message of up to 1 GiB from copies.
"""

import json
from collections.abc import Iterable, Iterator
from typing import IO, Any

from covtanet.errors import REJECTION_REASONS, DecoderError, Reason, StudyError

PIPE_BYTES = 1 << 20
HEADER_BYTES = 1 << 16
LENGTH_BYTES = 4
OBJECT_FOLLOWS, REQUEST_ENDS = b"\x01", b"\x00"
MAX_MESSAGE_CHARACTERS, MAX_LOCATION_CHARACTERS = 300, 200


def frame_request(
    request: dict[str, Any], objects: Iterable[Iterable[bytes]]
) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a request in pieces that fit in a pipe. objects: each in chunks."""
    yield json.dumps(request).encode() + b"\n"
    for chunks in objects:
        yield OBJECT_FOLLOWS
        for chunk in chunks:
            for piece in _pieces(chunk):
                yield len(piece).to_bytes(LENGTH_BYTES, "little")
                yield piece
        yield bytes(LENGTH_BYTES)
    yield REQUEST_ENDS


def receive_objects(requests: IO[bytes]) -> Iterator[bytes]:
    """Yield the objects after a request's line.

    No reference to an object is held here while it is decoded: it may be 1 GiB.
    """
    while requests.read(1) == OBJECT_FOLLOWS:
        yield _receive_object(requests)


def send_answer(answers: IO[bytes], header: dict[str, Any], *buffers: Any) -> None:
    """Write a line of JSON and buffers."""
    answers.write(json.dumps(header).encode() + b"\n")
    for buffer in buffers:
        answers.write(buffer)
    answers.flush()


def parse_header(line: bytes) -> dict[str, Any] | None:
    """Parse the line of an answer; None if it is anything but a JSON object."""
    try:
        header = json.loads(line or b"null")
    except (ValueError, RecursionError):
        return None
    return header if isinstance(header, dict) else None


def parse_refusal(header: dict[str, Any]) -> Exception | None:
    """Return the error that an answer stands for.

    Its text is not trusted: it is cut, and characters that cannot be printed are replaced.
    """
    reason = header.get("reason")
    if reason in REJECTION_REASONS:
        return StudyError(Reason(reason), _printable(header.get("message"), MAX_MESSAGE_CHARACTERS))
    if "internal" in header:
        return DecoderError(_printable(header["internal"], MAX_LOCATION_CHARACTERS))
    return None


def read_exactly(pipe: IO[bytes], num_bytes: int) -> bytearray:
    """Read the bytes that an answer's header announces.

    Raises:
        StudyError: ``decode_crash`` if fewer come.
    """
    data = bytearray(num_bytes)
    view = memoryview(data)
    num_read = 0
    while num_read < num_bytes:
        count = pipe.readinto(view[num_read:])  # type: ignore[attr-defined]
        if not count:
            raise StudyError(Reason.DECODE_CRASH, "the decoder died in the middle of its answer")
        num_read += count
    return data


def _receive_object(requests: IO[bytes]) -> bytes:
    chunks = []
    while length := int.from_bytes(requests.read(LENGTH_BYTES), "little"):
        chunks.append(requests.read(length))
    return b"".join(chunks)


def _pieces(chunk: bytes) -> Iterator[memoryview]:
    view = memoryview(chunk)
    for start in range(0, len(view), PIPE_BYTES):
        yield view[start : start + PIPE_BYTES]


def _printable(text: object, num_characters: int) -> str:
    return "".join(c if c.isprintable() else " " for c in str(text)[:num_characters])
