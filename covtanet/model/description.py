"""Typed parts of a saved model's description: preprocessing, capabilities, readout and engines.

Neither torch nor a network is imported, so that a process that only decodes may read them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Preprocessing that turned volumes into the network's input during training."""

    low_hu: float = -1000.0
    """HU that become intensity 0."""
    high_hu: float = 400.0
    """HU that become intensity 1."""
    size_px: int = 512
    """Side of the square slices."""
    slice_step_mm: float | None = None
    """Smallest distance of the slices that were read; null if the model does not say."""
    intensities: tuple[str, ...] = ("hu",)
    """Kinds of values the network has seen: ``hu``, ``grey8`` or both."""
    crops_to_lungs: bool = False
    """Whether slices are cropped to the box of the lungs."""
    num_neighbours: int = 0
    """Slices on either side that the network reads together with a slice."""

    def __post_init__(self) -> None:
        # JSON has lists, and a hashable value travels between processes unchanged.
        object.__setattr__(self, "intensities", tuple(self.intensities))


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """Outputs of a model that were trained; the others are random and never used."""

    segments: bool
    """Phase 1 was trained: the model marks lesions."""
    diagnoses: bool
    """Phase 2 was trained: the model gives diagnosis and severity."""


@dataclass(frozen=True, kw_only=True)
class BurdenDiagnosis:
    """Probability of infection as a logistic function of the involvement alone.

    For a network whose diagnosis was not trained: two coefficients, fitted on the lesion shares of
    labelled studies.
    """

    intercept: float
    """Log-odds of infection without any lesion."""
    slope: float
    """Increase of the log-odds per unit of involvement, which is in [0, 1]."""

    def p_infected(self, involvement: float) -> float:
        """Return the probability of infection at this involvement."""
        return 1 / (1 + math.exp(-(self.intercept + self.slope * involvement)))


def infected_by_burden(burden: BurdenDiagnosis | None, involvement: float | None) -> float | None:
    """Return the probability of infection by the involvement; null if either is null.

    The involvement is null of a part of the lungs and of implausible lungs: a lobe without lesion
    says nothing about the others.
    """
    if burden is None or involvement is None:
        return None
    return burden.p_infected(involvement)


@dataclass(frozen=True, kw_only=True)
class Readout:
    """How the network's output is read."""

    lesion_threshold: float = 0.5
    """Probability from which a pixel is lesion; fixed before the model was evaluated."""
    burden: BurdenDiagnosis | None = None
    """Diagnosis from the involvement, if the network has none."""


# Bounds within which an engine may replace float32 unasked, far below what readers differ by among
# themselves: two readers of the MedSeg scans agree with a Dice of 0.81 (docs/evaluation.md).
MAX_DICE_LOSS = 0.005
MAX_INVOLVEMENT_DIFFERENCE = 0.005


@dataclass(frozen=True, kw_only=True)
class EngineDifference:
    """Difference of an engine from the same model in float32, on the same labelled volumes.

    Measured by ``covtanet calibrate``, as screening measures; a null was not measurable.
    """

    mean_dice: float | None
    """Mean Dice per volume against the labels."""
    mean_dice_float32: float | None
    """The same in float32."""
    mean_involvement_difference: float | None
    """Mean absolute difference of the involvement, over volumes that have one."""
    max_involvement_difference: float | None
    """Largest of these differences."""
    lesion_volume_ratio: float | None
    """Lesion volume of all volumes over that in float32."""
    num_status_changes: int
    """Volumes whose rejection, diagnosis or severity differs."""
    num_volumes: int
    """Volumes that were compared, none of whose slices was used for calibration."""
    num_slices: int
    """Slices of these volumes that the network read."""
    data: tuple[str, ...]
    """Names of the data sets."""

    def __post_init__(self) -> None:
        # JSON has lists, and a hashable value travels between processes unchanged.
        object.__setattr__(self, "data", tuple(self.data))

    @property
    def dice_loss(self) -> float | None:
        """By how much the mean Dice is lower than in float32; negative if it is higher."""
        if self.mean_dice is None or self.mean_dice_float32 is None:
            return None
        return self.mean_dice_float32 - self.mean_dice

    @property
    def is_within_bounds(self) -> bool:
        """Whether the engine may replace float32 unasked; a difference that is null does not do."""
        if self.dice_loss is None or self.mean_involvement_difference is None:
            return False
        return (
            self.num_status_changes == 0
            # A NaN is not within the bounds either.
            and self.dice_loss <= MAX_DICE_LOSS
            and self.mean_involvement_difference <= MAX_INVOLVEMENT_DIFFERENCE
        )


def read_engines(description: Mapping[str, Any]) -> dict[str, EngineDifference]:
    """Return the measured differences of a model's description by engine; none if it has none.

    Raises:
        KeyError, TypeError: an unknown or missing value.
    """
    measured = dict(description.get("engines", {}))
    return {str(name): EngineDifference(**values) for name, values in measured.items()}


def read_readout(description: Mapping[str, Any]) -> Readout:
    """Return the readout of a model's description; the default if it says nothing of it.

    Raises:
        KeyError, TypeError: an unknown or missing value.
    """
    values = dict(description.get("readout", {}))
    burden = values.pop("burden", None)
    return Readout(**values, burden=burden and BurdenDiagnosis(**burden))


def read_preprocessing(description: Mapping[str, Any], format_version: int) -> Preprocessing:
    """Return the preprocessing of a model's description.

    Raises:
        KeyError, TypeError: version 1 has no window, or either version has an unknown value.
    """
    values = description["preprocessing"]
    if format_version == 1:
        # Version 1 keeps low_hu, high_hu and size_px in an object of their own.
        return Preprocessing(
            **values["window"],
            slice_step_mm=values.get("slice_step_mm"),
            intensities=values.get("intensities", ("hu",)),
        )
    return Preprocessing(**values)


def read_capabilities(description: Mapping[str, Any], format_version: int) -> Capabilities:
    """Return the capabilities of a model's description.

    Raises:
        KeyError, TypeError: version 2 has no capabilities, or an unknown one.
    """
    if format_version == 1:
        # The first models of version 1 were trained in both phases and do not say so.
        provenance = description["provenance"]
        return Capabilities(
            segments=bool(provenance.get("has_segmentation", True)),
            diagnoses=bool(provenance.get("has_diagnosis", True)),
        )
    return Capabilities(**description["capabilities"])
