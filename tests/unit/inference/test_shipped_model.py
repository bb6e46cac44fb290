"""The shipped model: small, whole, described by its card, and able to screen."""

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
        "benchmarks.train_gpu",
        "jobs/evaluate.py",
    )
    assert [word for word in wanted if word not in card] == []
    assert not re.search(r"/(root|work|tmp|home)/", (folder / "model.json").read_text() + card)


@pytest.mark.parametrize("folder", MODELS, ids=lambda folder: folder.name)
def test_shipped_model_segments_and_diagnoses_by_burden(folder: Path) -> None:
    model = load_model(folder)
    predictor = Predictor(model, engine="eager")
    size = predictor.window.size_px
    found = predictor.predict(np.zeros((2, size, size), np.uint16))
    assert found.lesion_levels.shape == (2, size, size)
    assert (found.p_infected, found.p_severe) == (None, None)
    assert model.readout.burden is not None
    # Scattered false marks are no infection, a lesion of a tenth of the lungs is.
    assert model.readout.burden.p_infected(0.006) < 0.5
    assert model.readout.burden.p_infected(0.1) > 0.99


@pytest.mark.parametrize("folder", MODELS, ids=lambda folder: folder.name)
def test_card_gives_the_model_s_own_numbers(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    readout = load_model(folder).readout
    assert readout.burden is not None
    for number in (readout.lesion_threshold, readout.burden.intercept, readout.burden.slope):
        assert f"{number:g}" in card, number


def test_repository_ships_a_model() -> None:
    assert MODELS


@pytest.mark.parametrize("folder", MODELS, ids=lambda folder: folder.name)
def test_shipped_model_marks_no_lesion_in_air(folder: Path) -> None:
    model = load_model(folder)
    predictor = Predictor(model, engine="eager")
    size = predictor.window.size_px
    # -1000 HU within the window.
    span = predictor.window.high_hu - predictor.window.low_hu
    air = round(65535 * (-1000 - predictor.window.low_hu) / span)
    prediction = predictor.predict(np.full((2, size, size), air, np.uint16))
    assert prediction.lesion_levels.max() < 254 * model.readout.lesion_threshold
