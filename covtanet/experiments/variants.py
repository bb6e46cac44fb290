"""Variants of a training's configuration: the networks that one command trains."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from covtanet.data.prepared import PreparedVolume
from covtanet.errors import ConfigError
from covtanet.model.registry import CLASSIFIERS, SEGMENTERS
from covtanet.model.table_i import SWITCHES
from covtanet.training.config import TrainingConfig

ALL = "all"
# The names of Tables II and III for rows of Table I.
ALIASES = {"TA-SegNet": "V7", "Unet": "V1"}
# Rows whose segmentation the diagnosis is trained on.
IN_BOTH_PHASES = ("V7", "V8")
# Choices of the command line.
ABLATION_ROWS = (*SWITCHES, ALL)
NETWORKS = (*ALIASES, "V8", *SEGMENTERS, *CLASSIFIERS, ALL)


def change(config: TrainingConfig, **values: Any) -> TrainingConfig:
    """Return the configuration with values that the command line asks for.

    Raises:
        ConfigError: the configuration does not allow them.
    """
    try:
        return replace(config, **values)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def ablation_variants(config: TrainingConfig, row: str) -> list[TrainingConfig]:
    """Return a row of Table I, or all rows, in phase 1."""
    rows = SWITCHES if row == ALL else (row,)
    return [change(config, network=name, phases=(1,)) for name in rows]


def network_variants(
    config: TrainingConfig, networks: Sequence[str], volumes: Iterable[PreparedVolume]
) -> list[TrainingConfig]:
    """Return rows of Tables II to IV.

    ``all`` is every network that the data set has truth for: masks for the segmentation, grades
    for the diagnosis unless the configuration leaves phase 2 out.
    """
    volumes = list(volumes)
    has_masks = any(volume.lesion_px is not None for volume in volumes)
    has_grades = 2 in config.phases and any(volume.grade for volume in volumes)
    names = [ALIASES.get(network, network) for network in dict.fromkeys(networks)]
    if ALL in networks:
        names = _all_networks(has_masks, has_grades)
    if networks == [ALL] and not names:
        raise ConfigError("nothing to train: the data set has neither masks nor grades")
    return [
        change(config, network=name, phases=_phases(name, has_grades, config)) for name in names
    ]


def _all_networks(has_masks: bool, has_grades: bool) -> list[str]:
    names = []
    if has_masks:
        names += ["V7", "V1", *SEGMENTERS]
    if has_grades:
        names += CLASSIFIERS
    return names


def _phases(name: str, has_grades: bool, config: TrainingConfig) -> tuple[int, ...]:
    if name in CLASSIFIERS:
        return (2,)
    if config.phase1_model and name in IN_BOTH_PHASES:
        return (2,)
    if name in IN_BOTH_PHASES and has_grades:
        return (1, 2)
    return (1,)
