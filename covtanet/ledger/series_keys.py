"""Series keys as arrays of bytes: 32 bytes for each, a fifth of what strings in a set take."""

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

MAX_KEY_BYTES = 32
KEY_DTYPE = f"S{MAX_KEY_BYTES}"

SeriesKeys = NDArray[np.bytes_]


def keys_of(table: pa.Table | pa.RecordBatch) -> SeriesKeys:
    """Return the column ``series_key`` as an array.

    Raises:
        ValueError: a key is longer than 32 ASCII characters.
    """
    keys = table.column("series_key").cast(pa.binary())
    if table.num_rows and pc.max(pc.binary_length(keys)).as_py() > MAX_KEY_BYTES:
        raise ValueError(f"a series key of more than {MAX_KEY_BYTES} bytes")
    return np.array(keys.to_pylist(), KEY_DTYPE)


def position_of(keys: SeriesKeys, known: SeriesKeys) -> NDArray[np.int64]:
    """Return the index of each key among sorted known ones, -1 for a key that is not known."""
    if not len(known):
        return np.full(len(keys), -1)
    indices = np.searchsorted(known, keys)
    indices[indices == len(known)] = 0
    return np.where(known[indices] == keys, indices, -1)


def sort_distinct(keys: SeriesKeys) -> SeriesKeys:
    """Return the distinct keys, sorted.

    Sorts the given array itself: copies of a million keys, as ``numpy.unique`` makes, take 100 MB.
    """
    keys.sort()
    is_first = np.ones(len(keys), bool)
    is_first[1:] = keys[1:] != keys[:-1]
    return keys if is_first.all() else keys[is_first]


def join_keys(tables: Iterable[pa.Table | pa.RecordBatch]) -> SeriesKeys:
    """Return the series keys of several tables in their order."""
    return np.concatenate([np.empty(0, KEY_DTYPE), *map(keys_of, tables)])
