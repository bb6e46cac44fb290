"""A study whose screener is closed meanwhile."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from encoded_ct import as_nifti
from stage_rows import CONFIG, WINDOW

from covtanet.errors import SandboxClosedError
from covtanet.inference.predictor import Predictor
from covtanet.model.saved_model import load_model
from covtanet.phantoms.phantom import Phantom
from covtanet.screening.study import Screener


@pytest.fixture(scope="module")
def predictor(model_folder: Path) -> Predictor:
    return Predictor(load_model(model_folder), engine="eager", max_batch_slices=8)


@pytest.fixture
def screener(predictor: Predictor) -> Iterator[Screener]:
    found = Screener(predictor, WINDOW, CONFIG, "digest")
    yield found
    found.close()


@pytest.fixture
def study(tmp_path: Path, mild: Phantom) -> str:
    """Two series."""
    for name in ("a.nii", "b.nii"):
        (tmp_path / name).write_bytes(as_nifti(mild))
    return str(tmp_path)


def test_closed_screener_raises_sandbox_closed_error(screener: Screener, study: str) -> None:
    rows = screener(study)
    assert next(rows)["status"] == "screened"
    screener.close()
    with pytest.raises(SandboxClosedError, match="the sandbox is closed"):
        next(rows)
