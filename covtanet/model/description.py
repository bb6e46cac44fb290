"""Typed parts of a saved model's description: its preprocessing and its capabilities.

Neither torch nor a network is imported, so that a process that only decodes may read them.
"""

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
