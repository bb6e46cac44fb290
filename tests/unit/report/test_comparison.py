"""Two ledgers side by side."""

import re

import pyarrow as pa
import pytest
from worklist_rows import ledger, row

from covtanet.ledger.read import for_spreadsheet
from covtanet.ledger.schema import LEDGER_SCHEMA
from covtanet.report.comparison import compare


def test_a_ledger_agrees_with_itself() -> None:
    found = compare(ledger(), ledger())
    assert (found.num_compared, found.flips, found.kappa) == (4, [], 1.0)
    assert (found.only_before, found.only_after) == (0, 0)
    assert set(found.p_shift) == {0.0}


def test_flips_shifts_and_what_one_ledger_lacks() -> None:
    after = pa.Table.from_pylist(
        [
            row("b", p_infected=0.75, diagnosis="infected", severity="mild", involvement=0.1),
            row(
                "c",
                p_infected=0.98,
                diagnosis="infected",
                severity="mild",
                p_severe=0.4,
                involvement=0.2,
            ),
            row("d", status="rejected", reason="truncated"),
            row("e", p_infected=0.8, diagnosis="infected", severity="mild", p_severe=0.2),
        ],
        LEDGER_SCHEMA,
    )
    found = compare(ledger(), after)
    assert (found.only_before, found.only_after) == (2, 0)
    assert found.flips == [("b" * 32, "normal", "mild"), ("c" * 32, "severe", "mild")]
    assert found.statuses["screened", "rejected"] == 1
    assert found.p_shift == pytest.approx([0.3, -0.01, 0.0], abs=1e-6)
    assert found.involvement_shift == pytest.approx([0.1, -0.2])
    assert found.kappa == pytest.approx(0.0)
    text, page = found.as_table("one and other"), found.as_html("<one> & other")
    assert re.search(r"^same grade +1 / 3$", text, re.MULTILINE)
    assert re.search(r"^normal to mild +1$", text, re.MULTILINE)
    assert re.search(r"^status screened to rejected +1$", text, re.MULTILINE)
    assert "<one>" not in page
    assert "b" * 32 in page


def test_a_spreadsheet_runs_nothing_of_a_ledger() -> None:
    table = pa.Table.from_pylist(
        [row("a", reason="=1+1", qc_flags=["-x", "y"], involvement=None)], LEDGER_SCHEMA
    )
    found = for_spreadsheet(table).to_pylist()[0]
    assert (found["reason"], found["qc_flags"], found["involvement"]) == ("'=1+1", "'-x y", None)
