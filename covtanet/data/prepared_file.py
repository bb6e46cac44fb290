"""A prepared volume as one Parquet file: a row per slice, the volume's description as metadata."""

import json
from dataclasses import asdict
from io import BytesIO
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from covtanet import storage
from covtanet.data.prepared import PreparedVolume, Samples

DESCRIPTION = b"covtanet.prepared"

SLICE_SCHEMA = pa.schema([
    pa.field("volume", pa.string(), nullable=False),
    pa.field("slice", pa.int32(), nullable=False),
    pa.field("levels", pa.binary(), nullable=False),
    pa.field("lesion", pa.binary()),
    pa.field("lesion_px", pa.int32()),
])  # fmt: skip


def file_uri(prepared_uri: str, key: str) -> str:
    """Return the location of a prepared volume in the folder of all of them."""
    return storage.join(prepared_uri, f"{key}.parquet")


def description_uri(prepared_uri: str, key: str) -> str:
    """Return the location of a prepared volume's description."""
    return storage.join(prepared_uri, f"{key}.json")


def to_parquet(volume: PreparedVolume, samples: Samples | None) -> bytes:
    """Return a prepared volume as one file; a refused volume has no rows."""
    table = SLICE_SCHEMA.empty_table() if samples is None else _table(volume, samples)
    described = table.replace_schema_metadata({DESCRIPTION: to_json(volume).encode()})
    buffer = BytesIO()
    pq.write_table(described, buffer, compression="zstd", compression_level=1)
    return buffer.getvalue()


def _table(volume: PreparedVolume, samples: Samples) -> pa.Table:
    num_slices = len(samples.levels)
    lesion: list[bytes | None] = [None] * num_slices
    if samples.lesion is not None:
        lesion = [np.packbits(mask).tobytes() for mask in samples.lesion]
    rows: dict[str, list[Any]] = {
        "volume": [volume.key] * num_slices,
        "slice": list(volume.slices),
        "levels": [level.tobytes() for level in samples.levels],
        "lesion": lesion,
        "lesion_px": list(volume.lesion_px or [None] * num_slices),
    }
    return pa.Table.from_pydict(rows, schema=SLICE_SCHEMA)


def describe(data: bytes) -> PreparedVolume:
    """Return the description of the volume in a prepared file."""
    return from_json(pq.read_schema(BytesIO(data)).metadata[DESCRIPTION])


def to_json(volume: PreparedVolume) -> str:
    """Return a description as text."""
    return json.dumps(asdict(volume))


def from_json(text: str | bytes) -> PreparedVolume:
    """Return the description that ``to_json`` wrote."""
    values = json.loads(text)
    for name in ("slices", "lesion_px", "spacing_mm"):
        if values[name] is not None:
            values[name] = tuple(values[name])
    return PreparedVolume(**values)


def read_samples(data: bytes) -> Samples:
    """Return all slices of a prepared file."""
    return samples_of(pq.read_table(BytesIO(data)), describe(data).size_px)


def samples_of(table: pa.Table, size_px: int) -> Samples:
    """Return rows of SLICE_SCHEMA as arrays.

    Either every row has a lesion mask or none has.
    """
    shape = (size_px, size_px)
    levels = np.empty((table.num_rows, *shape), np.uint16)
    for index, packed in enumerate(table["levels"]):
        levels[index] = np.frombuffer(packed.as_buffer(), np.uint16).reshape(shape)
    if table["lesion"].null_count:
        return Samples(levels=levels, lesion=None)
    lesion = np.empty((table.num_rows, *shape), np.uint8)
    for index, packed in enumerate(table["lesion"]):
        bits = np.frombuffer(packed.as_buffer(), np.uint8)
        lesion[index] = np.unpackbits(bits, count=size_px * size_px).reshape(shape)
    return Samples(levels=levels, lesion=lesion)
