"""Series keys as arrays of bytes."""

import numpy as np

from covtanet.ledger.series_keys import KEY_DTYPE, sort_distinct


def test_keys_are_sorted_and_repeated_ones_left_out() -> None:
    keys = np.array(["c", "a", "b", "a", "c", "a"], KEY_DTYPE)
    assert sort_distinct(keys).tolist() == [b"a", b"b", b"c"]


def test_no_key_stays_none() -> None:
    assert len(sort_distinct(np.empty(0, KEY_DTYPE))) == 0
