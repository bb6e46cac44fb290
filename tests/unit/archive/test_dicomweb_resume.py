"""The rest of an instance whose first bytes were read before."""

import hashlib

import pytest

from covtanet.archive.dicomweb_series import _behind
from covtanet.storage import ObjectChangedError

CONTENT = b"0123456789"
DIGEST_OF_FOUR = hashlib.sha256(CONTENT[:4]).digest()


@pytest.mark.parametrize("size", [1, 3, 4, 5, 10])
def test_bytes_behind_the_first_ones_are_yielded(size: int) -> None:
    chunks = [CONTENT[start : start + size] for start in range(0, len(CONTENT), size)]
    assert b"".join(_behind(iter(chunks), 4, DIGEST_OF_FOUR)) == CONTENT[4:]


def test_other_first_bytes_are_refused() -> None:
    with pytest.raises(ObjectChangedError, match="changed while"):
        list(_behind(iter([b"01x3456789"]), 4, DIGEST_OF_FOUR))


def test_shorter_instance_is_refused() -> None:
    with pytest.raises(ObjectChangedError, match="shorter"):
        list(_behind(iter([b"01", b"2"]), 4, DIGEST_OF_FOUR))
