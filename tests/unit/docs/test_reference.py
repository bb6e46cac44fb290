"""Reference pages that are generated from the code."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("page", "function"),
    [("ledger.md", "ledger_page"), ("configuration.md", "configuration_page")],
)
def test_generated_page_is_up_to_date(page: str, function: str) -> None:
    generate = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    expected = generate[function]()
    assert (ROOT / "docs" / page).read_text() == expected, "run make docs"
