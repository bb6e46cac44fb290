"""An answer of several parts: the rows as JSON, then DICOM objects."""

import json
import secrets
from collections.abc import Iterator
from email.message import Message
from typing import Any

from fastapi.responses import StreamingResponse

from serve.results import Results

MEDIA_TYPE = 'multipart/related; type="application/dicom"'
JSON, DICOM = "application/json", "application/dicom"


def accepts_dicom(accept: str) -> bool:
    """Return whether an ``Accept`` header asks for DICOM objects."""
    return any(map(_is_multipart_dicom, accept.split(",")))


def _is_multipart_dicom(media_range: str) -> bool:
    message = Message()
    message["content-type"] = media_range.strip()
    return message.get_content_type() == "multipart/related" and message.get_param("type") == DICOM


def multipart_answer(content: dict[str, Any], results: Results) -> StreamingResponse:
    """Return an answer that streams the parts, and closes the results at its end."""
    boundary = secrets.token_hex(16)
    body = json.dumps(content).encode()
    sizes = [(JSON, len(body)), *((DICOM, size) for size in results.sizes)]
    heads = [_head(boundary, kind, size) for kind, size in sizes]
    end = f"\r\n--{boundary}--\r\n".encode()
    num_bytes = sum(map(len, heads)) + sum(size for _, size in sizes) + len(end)

    def parts() -> Iterator[bytes]:
        try:
            yield heads[0]
            yield body
            for head, (_, chunks) in zip(heads[1:], results.objects(), strict=True):
                yield head
                yield from chunks
            yield end
        finally:
            results.close()

    headers = {"Content-Length": str(num_bytes)}
    return StreamingResponse(
        parts(), headers=headers, media_type=f"{MEDIA_TYPE}; boundary={boundary}"
    )


def _head(boundary: str, kind: str, num_bytes: int) -> bytes:
    """Return the lines before a part; the line break that ends the part before is one of them."""
    lines = f"\r\n--{boundary}\r\nContent-Type: {kind}\r\nContent-Length: {num_bytes}\r\n\r\n"
    return lines.encode()
