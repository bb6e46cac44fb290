"""Equality of ledgers within their tolerances."""

from dataclasses import replace
from datetime import date
from typing import Any

import pyarrow as pa
from ledger_rows import record, series

from covtanet.ledger.diff import differences
from covtanet.ledger.finished_rows import complete_row
from covtanet.ledger.run import Run
from covtanet.ledger.schema import LEDGER_SCHEMA


def rows_of(run: Run, **values: Any) -> Any:
    table = pa.Table.from_pylist(
        [
            complete_row(
                run, record(series("a"), status="screened", reason=None, p_infected=0.5, **values)
            )
        ],
        schema=LEDGER_SCHEMA,
    )
    return table


def test_ledgers_are_equal_within_their_tolerances(run: Run) -> None:
    one = rows_of(run, involvement=0.2, decode_s=1.0)
    later = replace(run, run_date=date(2026, 11, 24))
    assert differences(one, rows_of(later, involvement=0.2001, decode_s=2.0)) == []
    assert len(differences(one, rows_of(run, involvement=0.21))) == 1
    assert len(differences(one, rows_of(run, involvement=None))) == 1
    assert len(differences(one, one.slice(0, 0))) == 1
    assert differences(one, pa.concat_tables([one, one])) == ["a series has more than one row"]
