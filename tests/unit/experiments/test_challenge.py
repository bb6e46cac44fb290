"""Comparison of challenger and champion: fair volumes, failures, refusals."""

from dataclasses import replace
from typing import Any

import pytest
from saved_models import small_model

from covtanet.data.datasets import DataSource
from covtanet.data.prepared import PreparedVolume
from covtanet.errors import ConfigError
from covtanet.evaluation.pipeline import Evaluated
from covtanet.evaluation.promotion import Margins
from covtanet.evaluation.rows import EVALUATION_SCHEMA
from covtanet.experiments import challenge
from covtanet.experiments.challenge import Contender, compare_models
from covtanet.experiments.model_evaluation import PreparedData
from covtanet.model.description import BurdenDiagnosis, Capabilities, Readout

GRADES = ("normal", "mild", "severe")
SOURCE = DataSource(name="manifest", volumes=(), root="")


def volumes(version: str) -> list[PreparedVolume]:
    """Two volumes of each grade; a model's keys are its own, source digests are shared."""
    return [
        PreparedVolume(
            key=f"{version}-{grade}{number}",
            volume_path=grade,
            patient=f"{grade}{number}",
            intensity="hu",
            source_digest=f"{grade}{number}".ljust(64, "0"),
            slices=(0,),
            lesion_px=(5,),
        )
        for grade in GRADES
        for number in range(2)
    ]


def contender(version: str, *seen: str, says: bool = True) -> Contender:
    model = small_model()
    if says:
        model.provenance["seen_sources"] = [name.ljust(64, "0")[:16] for name in seen]
    return Contender(
        version=version,
        model=model,
        data=PreparedData(source=SOURCE, volumes=volumes(version), refused=[]),
    )


def row(volume: PreparedVolume, dice_px: int) -> dict[str, Any]:
    grade = volume.volume_path
    return {
        **dict.fromkeys(EVALUATION_SCHEMA.names),
        "volume": volume.key,
        "patient": volume.patient,
        "source_digest": volume.source_digest,
        "network": "V7",
        "fold": None,
        "grade": grade,
        "p_infected": {"normal": 0.1, "mild": 0.8, "severe": 0.9}[grade],
        "p_severe": 0.9 if grade == "severe" else 0.1,
        "slice": [0],
        "tp": [dice_px],
        "fp": [10 - dice_px],
        "fn": [10 - dice_px],
        "tn": [80],
    }


@pytest.fixture
def predicted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys of the volumes that were predicted. The champion fails on mild0."""
    keys: list[str] = []

    def predict(model: Any, chosen: list[PreparedVolume], *locations: Any) -> Evaluated:
        keys.extend(volume.key for volume in chosen)
        failed = {volume.key for volume in chosen if volume.key == "1-mild0"}
        # The challenger's Dice is 0.1 on mild0 and 0.8 elsewhere.
        rows = [
            row(volume, 1 if volume.key == "2-mild0" else 8)
            for volume in chosen
            if volume.key not in failed
        ]
        return Evaluated(rows=rows, failures=dict.fromkeys(failed, "storage: OSError"))

    monkeypatch.setattr(challenge, "predict", predict)
    return keys


def test_models_are_compared_on_volumes_unseen_by_both(predicted: list[str]) -> None:
    compare_models(contender("2", "normal0"), contender("1", "severe1"), "", Margins())
    names = {key.partition("-")[2] for key in predicted}
    assert names == {"normal1", "mild0", "mild1", "severe0"}
    assert len(predicted) == 8


def test_volume_that_one_model_fails_on_counts_for_neither(predicted: list[str]) -> None:
    compared, failures = compare_models(contender("2"), contender("1"), "", Margins())
    (dice,) = [comparison for comparison in compared if comparison.metric == "dice"]
    assert dice.challenger == pytest.approx(0.8)
    assert dice.champion == pytest.approx(0.8)
    assert failures == {"storage": 1}
    # Five volumes of five patients, on which both models are equal.
    assert dice.interval is not None
    assert (dice.interval.low, dice.interval.high) == (0.0, 0.0)
    assert dice.interval.num_patients == 5
    assert "5 patients, fewer than 20: the interval is wide" in str(dice)


def test_model_that_names_no_training_volumes_is_refused(predicted: list[str]) -> None:
    with pytest.raises(ConfigError, match="version 1 does not say what it was trained on"):
        compare_models(contender("2"), contender("1", says=False), "", Margins())


def test_data_that_was_seen_as_a_whole_is_refused(predicted: list[str]) -> None:
    seen = [f"{grade}{number}" for grade in GRADES for number in range(2)]
    with pytest.raises(ConfigError, match="no volume is left that neither model was trained on"):
        compare_models(contender("2", *seen), contender("1"), "", Margins())
    assert not predicted


def test_evaluation_set_without_a_grade_is_refused(predicted: list[str]) -> None:
    seen = ("severe0", "severe1")
    with pytest.raises(ConfigError, match="gives the champion no normal_vs_severe_auc"):
        compare_models(contender("2", *seen), contender("1"), "", Margins())


def test_champion_with_a_diagnosis_by_burden_needs_no_auc_of_severity(
    predicted: list[str],
) -> None:
    """Its rows have no probability of a severe infection."""
    champion = contender("1", "severe0", "severe1")
    burden = BurdenDiagnosis(intercept=-2.0, slope=90.0)
    model = replace(
        champion.model,
        capabilities=Capabilities(segments=True, diagnoses=False),
        readout=Readout(burden=burden),
    )
    with pytest.raises(ConfigError, match="gives the champion no normal_vs_severe_auc;"):
        compare_models(contender("2"), replace(champion, model=model), "", Margins())
