"""Comparison of two runs: flips, shifts, agreement."""

import re

import pyarrow as pa
import pytest
from worklist_rows import ledger, row

from covtanet.ledger.read import for_spreadsheet
from covtanet.ledger.schema import LEDGER_SCHEMA
from covtanet.report.comparison import compare


def test_ledger_compared_with_itself_has_no_flips() -> None:
    comparison = compare(ledger(), ledger())
    assert (comparison.num_compared, comparison.flips, comparison.kappa) == (4, [], 1.0)
    assert (comparison.only_before, comparison.only_after) == (0, 0)
    assert set(comparison.p_shift) == {0.0}


def test_comparison_counts_flips_shifts_and_series_of_one_ledger() -> None:
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
    comparison = compare(ledger(), after)
    assert (comparison.only_before, comparison.only_after) == (2, 0)
    assert comparison.flips == [("b" * 32, "normal", "mild"), ("c" * 32, "severe", "mild")]
    assert comparison.statuses["screened", "rejected"] == 1
    assert comparison.p_shift == pytest.approx([0.3, -0.01, 0.0], abs=1e-6)
    assert comparison.involvement_shift == pytest.approx([0.1, -0.2])
    assert comparison.kappa == pytest.approx(0.0)
    text, page = comparison.as_table("one and other"), comparison.as_html("<one> & other")
    assert re.search(r"^same grade +1 / 3$", text, re.MULTILINE)
    assert re.search(r"^normal to mild +1$", text, re.MULTILINE)
    assert re.search(r"^status screened to rejected +1$", text, re.MULTILINE)
    assert "<one>" not in page
    assert "b" * 32 in page


def test_spreadsheet_has_no_formula() -> None:
    table = pa.Table.from_pylist(
        [row("a", reason="=1+1", qc_flags=["-x", "y"], involvement=None)], LEDGER_SCHEMA
    )
    cells = for_spreadsheet(table).to_pylist()[0]
    assert (cells["reason"], cells["qc_flags"], cells["involvement"]) == ("'=1+1", "'-x y", None)
