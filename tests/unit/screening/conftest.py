"""Fixtures of the tests of screening."""

from pathlib import Path

import pytest

from covtanet.inference.predictor import Predictor
from covtanet.model.saved_model import load_model


@pytest.fixture(scope="module")
def predictor(model_folder: Path) -> Predictor:
    return Predictor(load_model(model_folder), engine="eager", max_batch_slices=8)
