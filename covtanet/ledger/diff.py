"""Comparison of two ledgers."""

from typing import Any

import pyarrow as pa

from covtanet.ledger.schema import LEDGER_SCHEMA

# The schema's version says which software wrote the row, not what it found.
NOT_COMPARED = ("schema_version", "run_id", "run_date", "screened_at", "decode_s", "predict_s")
# First schema version with the column ``engine``.
ENGINE_SINCE = 2
PROBABILITIES = ("p_infected", "p_severe")
MEASUREMENTS = ("lesion_volume_ml", "lung_volume_ml", "involvement")
# Another number of threads adds up in another order: probabilities move in the sixth digit, volumes
# by a voxel.
PROBABILITY_TOLERANCE = 1e-4
MEASUREMENT_TOLERANCE = 1e-3


def differences(left: pa.Table, right: pa.Table) -> list[str]:
    """Return one line for each series and column that differ; an empty list for equal ledgers.

    Probabilities may differ by 1e-4, volumes and involvement by 0.1 %; identity and times of a run
    are not compared. The engine is, unless a row was written before the ledger had that column.
    """
    left_rows = {row["series_key"]: row for row in left.to_pylist()}
    right_rows = {row["series_key"]: row for row in right.to_pylist()}
    lines = [f"{key}: in one ledger only" for key in sorted(left_rows.keys() ^ right_rows.keys())]
    if left.num_rows != len(left_rows) or right.num_rows != len(right_rows):
        lines.append("a series has more than one row")
    for key in sorted(left_rows.keys() & right_rows.keys()):
        for name in _compared_columns(left_rows[key], right_rows[key]):
            left_value, right_value = left_rows[key][name], right_rows[key][name]
            if not _is_equal(name, left_value, right_value):
                lines.append(f"{key}: {name} is {left_value} and {right_value}")
    return lines


def _compared_columns(left: dict[str, Any], right: dict[str, Any]) -> list[str]:
    names = [name for name in LEDGER_SCHEMA.names if name not in NOT_COMPARED]
    oldest = min(left["schema_version"], right["schema_version"])
    # A null of version 1 says nothing about the engine.
    return [name for name in names if name != "engine" or oldest >= ENGINE_SINCE]


def _is_equal(name: str, left: Any, right: Any) -> bool:
    # A missing number is null and equals null only.
    if left is None or right is None:
        return left is right
    if name in PROBABILITIES:
        return bool(abs(left - right) <= PROBABILITY_TOLERANCE)
    if name in MEASUREMENTS:
        # Relative, since volumes range from millilitres to litres.
        return bool(abs(left - right) <= MEASUREMENT_TOLERANCE * max(abs(left), abs(right)))
    return bool(left == right)
