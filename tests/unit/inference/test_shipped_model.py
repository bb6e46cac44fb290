"""The shipped model: small, whole, described by its card, and able to screen."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from repository import ROOT

from covtanet.inference.predictor import Predictor
from covtanet.model.saved_model import load_model

MODELS = sorted(path.parent for path in (ROOT / "models").glob("*/model.json"))
MAX_BYTES = 25 << 20


@pytest.mark.parametrize("folder", MODELS, ids=lambda folder: folder.name)
def test_card_names_digest_data_licence_and_command(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    model = load_model(folder)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= MAX_BYTES
    assert model.digest in card
    wanted = (
        "Non-commercial",
        "share alike",
        "CC BY-NC-SA",
        "Research use only",
        "jobs/train.py",
        "jobs/evaluate.py",
    )
    assert [word for word in wanted if word not in card] == []
    assert json.loads((folder / "model.json").read_text())["provenance"]["has_diagnosis"] is False
    assert not re.search(r"/(root|work|tmp|home)/", (folder / "model.json").read_text() + card)


@pytest.mark.parametrize("folder", MODELS, ids=lambda folder: folder.name)
def test_shipped_model_segments_and_does_not_diagnose(folder: Path) -> None:
    predictor = Predictor(load_model(folder), engine="eager")
    size = predictor.window.size_px
    found = predictor.predict(np.zeros((2, size, size), np.uint16))
    assert found.lesion_levels.shape == (2, size, size)
    assert (found.p_infected, found.p_severe) == (None, None)


def test_repository_ships_a_model() -> None:
    assert MODELS
