"""All tables of a TOML file; beside ``config``, since the settings of a training import torch."""

from dataclasses import dataclass, field

from covtanet.screening.config import ScreeningConfig
from covtanet.training.config import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class Places:
    """Locations as paths or s3:// URIs; options of the commands override them."""

    data: str = ""
    """Data set of a training; empty if the option gives it."""
    storage: str = ""
    """Folder for everything a training keeps; empty if the option gives it."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that a TOML file may set, one table per field."""

    places: Places = field(default_factory=Places)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    screening: ScreeningConfig = field(default_factory=ScreeningConfig)
