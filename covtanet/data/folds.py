"""Folds and the validation part, by patient and stratified.

The same volumes give the same folds, in whatever order they come.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from covtanet.data.labels import GRADES
from covtanet.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Case:
    """The values of a volume that the split reads."""

    key: str
    patient: str
    grade: str | None
    """Normal, mild, severe or null."""
    has_lesion_mask: bool
    is_continuous: bool = True
    """Whether successive slices are neighbours in one patient."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """Keys of one fold's volumes, sorted."""

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]


# Fold of patients that are in the training part of every fold.
ALWAYS_TRAINED = -1


def assign_folds(cases: Sequence[Case], num_folds: int, seed: int) -> dict[str, int]:
    """Return the fold of every patient, 0 .. num_folds - 1 or ALWAYS_TRAINED.

    Patients are dealt out within strata of grade and of having a lesion mask, so that every fold
    has its share of each grade and of the volumes that phase 1 can train on. A patient with several
    volumes counts as the worst of them. Stacks of single slices come from patients that the data do
    not name; they are always trained, and no figure is measured on them.

    Raises:
        ConfigError: fewer patients than folds.
    """
    strata = _strata(_tested(cases))
    num_patients = sum(len(patients) for patients in strata.values())
    if num_patients < num_folds:
        raise ConfigError(f"{num_patients} patients cannot make {num_folds} folds")
    folds: dict[str, int] = {}
    for stratum in sorted(strata):
        for patient in sorted(strata[stratum], key=lambda patient: _rank(patient, f"fold {seed}")):
            # Goes on after the last fold of the stratum before, which keeps the folds level.
            folds[patient] = len(folds) % num_folds
    return {case.patient: ALWAYS_TRAINED for case in cases} | folds


def _tested(cases: Sequence[Case]) -> list[Case]:
    """Return the cases of patients that have a volume of neighbouring slices."""
    patients = {case.patient for case in cases if case.is_continuous}
    return [case for case in cases if case.patient in patients]


def split(
    cases: Sequence[Case], folds: dict[str, int], fold: int, validation_share: float, seed: int
) -> Split:
    """Test on one fold; hold back a share of the patients of the other folds for validation.

    Choice: the paper names no validation part; stopping on the test fold would be optimistic. Every
    stratum of at least two patients gives at least one to validation.
    """
    # By patient: no patient is in two parts.
    rest = [case for case in cases if folds[case.patient] != fold]
    held: set[str] = set()
    for patients in _strata(_tested(rest)).values():
        ranked = sorted(patients, key=lambda patient: _rank(patient, f"validation {seed} {fold}"))
        if validation_share and len(ranked) > 1:
            # At least one patient of a stratum.
            held.update(ranked[: max(1, round(validation_share * len(ranked)))])
    return Split(
        train=_keys(case for case in rest if case.patient not in held),
        validation=_keys(case for case in rest if case.patient in held),
        test=_keys(case for case in cases if folds[case.patient] == fold),
    )


def _keys(cases: Iterable[Case]) -> tuple[str, ...]:
    return tuple(sorted(case.key for case in cases))


def _strata(cases: Sequence[Case]) -> dict[tuple[int, bool], list[str]]:
    by_patient: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        by_patient[case.patient].append(case)
    strata: dict[tuple[int, bool], list[str]] = defaultdict(list)
    for patient, volumes in by_patient.items():
        # -1 if no volume has a grade.
        worst = max(GRADES.index(case.grade) if case.grade else -1 for case in volumes)
        strata[worst, any(case.has_lesion_mask for case in volumes)].append(patient)
    return strata


def _rank(patient: str, salt: str) -> bytes:
    return hashlib.sha256(f"{salt}:{patient}".encode()).digest()
