"""Reference pages that are generated from the code."""

import re
import runpy
from pathlib import Path

import pytest

from covtanet.errors import FAILURE_REASONS, REJECTION_REASONS, QcFlag

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("page", "function"),
    [("ledger.md", "ledger_page"), ("configuration.md", "configuration_page")],
)
def test_generated_page_is_up_to_date(page: str, function: str) -> None:
    generate = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    expected = generate[function]()
    assert (ROOT / "docs" / page).read_text() == expected, "run make docs"


def test_input_page_lists_rejection_reasons_in_their_order() -> None:
    page = (ROOT / "docs" / "input.md").read_text()
    codes = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert [code for code in codes if code in REJECTION_REASONS] == list(REJECTION_REASONS)
    assert [code for code in codes if code in FAILURE_REASONS] == list(FAILURE_REASONS)
    assert set(codes) == {*REJECTION_REASONS, *FAILURE_REASONS, *QcFlag}
