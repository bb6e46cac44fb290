"""Folds and splits of labelled volumes."""

import random

import pytest

from covtanet.data.folds import ALWAYS_TRAINED, Case, assign_folds, split
from covtanet.errors import ConfigError


def cases(num_patients: int) -> list[Case]:
    """Two volumes of every fifth patient; masks for mild ones alone, as MosMedData has them."""
    grades = ("normal", "mild", "severe")
    return [
        Case(
            key=f"{patient}-{k}",
            patient=str(patient),
            grade=grades[patient % 3],
            has_lesion_mask=patient % 3 == 1,
        )
        for patient in range(num_patients)
        for k in range(1 + (patient % 5 == 0))
    ]


def test_folds_keep_patients_whole_and_grades_level() -> None:
    own = cases(90)
    folds = assign_folds(own, 5, seed=0)
    for fold in range(5):
        patients = [int(patient) for patient, number in folds.items() if number == fold]
        assert len(patients) == 18
        assert [sum(patient % 3 == grade for patient in patients) for grade in range(3)] == [
            6,
            6,
            6,
        ]


def test_folds_do_not_depend_on_the_order_of_files() -> None:
    own = cases(50)
    shuffled = random.Random(1).sample(own, len(own))
    folds = assign_folds(own, 5, seed=3)
    assert assign_folds(shuffled, 5, seed=3) == folds
    assert split(shuffled, folds, 2, 0.2, seed=3) == split(own, folds, 2, 0.2, seed=3)
    assert assign_folds(own, 5, seed=4) != folds


def test_split_parts_share_no_patient_and_every_volume_is_tested_once() -> None:
    own = cases(50)
    folds = assign_folds(own, 5, seed=0)
    patient_of = {case.key: case.patient for case in own}
    tested: list[str] = []
    for fold in range(5):
        part = split(own, folds, fold, 0.2, seed=0)
        patients = [
            {patient_of[key] for key in keys} for keys in (part.train, part.validation, part.test)
        ]
        assert not patients[0] & patients[1]
        assert not (patients[0] | patients[1]) & patients[2]
        assert {
            key for key in part.validation if int(patient_of[key]) % 3 == 1
        }  # phase 1 can validate
        tested += part.test
    assert sorted(tested) == sorted(patient_of)


def test_fewer_patients_than_folds_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 patients cannot make 5 folds"):
        assign_folds(cases(3), 5, seed=0)


def test_single_slices_are_trained_in_every_fold_and_never_tested_nor_held_back() -> None:
    single = Case(
        key="slices", patient="slices", grade=None, has_lesion_mask=True, is_continuous=False
    )
    dealt = cases(30)
    folds = assign_folds([*dealt, single], 5, seed=0)
    assert folds.pop("slices") == ALWAYS_TRAINED
    # The others are dealt out as without it.
    assert folds == assign_folds(dealt, 5, seed=0)
    for fold in range(5):
        alone = split(dealt, folds, fold, 0.3, seed=0)
        part = split([*dealt, single], {**folds, "slices": ALWAYS_TRAINED}, fold, 0.3, seed=0)
        assert set(part.train) == {*alone.train, "slices"}
        assert (part.validation, part.test) == (alone.validation, alone.test)


def test_patient_with_a_volume_besides_single_slices_is_tested() -> None:
    """Else the slices of a tested patient would be trained."""
    dealt = cases(30)
    single = Case(key="slices", patient="7", grade=None, has_lesion_mask=True, is_continuous=False)
    assert assign_folds([*dealt, single], 5, seed=0)["7"] >= 0
