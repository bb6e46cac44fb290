"""Fixtures of the tests of the ledger."""

from datetime import date
from pathlib import Path

import pytest

from covtanet.ledger.run import Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(
        archive="/archive",
        ledger=str(tmp_path / "ledger"),
        run_date=date(2026, 11, 23),
        model_name="covtanet",
        model_version="1",
        model_digest="d" * 64,
        config_digest="c" * 64,
        software_version="0.1.0",
    )
