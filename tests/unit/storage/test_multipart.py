"""Multipart answers: parts as they come, and answers that break off."""

import pytest

from covtanet.storage.multipart import boundary_of, read_parts

BODY = (
    b"preamble\r\n--b\r\nContent-Type: application/dicom\r\nContent-Length: 4\r\n\r\n\r\n-x\r\n"
    b"--b\r\ncontent-length: 0\r\n\r\n\r\n--b\r\n\r\nsecond\r\n--b--\r\n"
)
PARTS = [b"\r\n-x", b"", b"second"]


def cut(content: bytes, size: int) -> list[bytes]:
    return [content[start : start + size] for start in range(0, len(content), size)]


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_parts_are_whole_whatever_the_chunks(size: int) -> None:
    body = BODY.removeprefix(b"preamble\r\n")
    parts = [b"".join(part.read()) for part in read_parts(cut(body, size), "b")]
    assert parts == PARTS


def test_part_that_is_not_read_is_skipped() -> None:
    parts = list(read_parts([BODY.removeprefix(b"preamble\r\n")], "b"))
    assert [part.num_bytes for part in parts] == [4, 0, None]


def test_answer_that_breaks_off_anywhere_raises() -> None:
    body = BODY.removeprefix(b"preamble\r\n")
    # The closing boundary is known by its first hyphens.
    for num_bytes in range(body.rindex(b"--\r\n")):
        with pytest.raises(OSError, match="breaks off"):
            list(read_parts([body[:num_bytes]], "b"))


def test_part_of_another_length_than_promised_raises() -> None:
    body = b"--b\r\nContent-Length: 5\r\n\r\nfour\r\n--b--\r\n"
    with pytest.raises(OSError, match="a part has 4 bytes, expected 5"):
        list(read_parts([body], "b"))


def test_answer_without_boundaries_raises() -> None:
    with pytest.raises(OSError, match="no sound multipart"):
        list(read_parts([b"<html>login</html>"], "b"))


@pytest.mark.parametrize(
    "content_type",
    [
        "",
        "text/html",
        "multipart/related",
        "multipart/form-data; boundary=b",
        "multipart/related; boundary=",
    ],
)
def test_other_content_type_is_refused(content_type: str) -> None:
    with pytest.raises(OSError, match="multipart/related with a boundary"):
        boundary_of(content_type)


def test_boundary_is_read_with_and_without_quotes() -> None:
    quoted = 'multipart/related; type="application/dicom"; boundary="a b"'
    assert boundary_of(quoted) == "a b"
    assert boundary_of("Multipart/Related; boundary=ab; type=application/dicom") == "ab"
