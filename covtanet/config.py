"""A run's TOML file to the dataclasses of those who own the settings. An unknown name is an error; no defaults here."""

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from covtanet.errors import ConfigError
from covtanet.screening.config import ScreeningConfig
from covtanet.training.config import TrainingConfig

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where things are, as paths or s3:// URIs; flags of the jobs win. Empty for what the flags give."""

    data: str = ""
    storage: str = ""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything a job's TOML file may set, one table per part."""

    places: Places = field(default_factory=Places)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    screening: ScreeningConfig = field(default_factory=ScreeningConfig)


def load_config(path: Path | None) -> RunConfig:
    """Read a TOML file; without one, the defaults of every part.

    Raises:
        ConfigError: no such file, no TOML, an unknown name or a value out of range.
    """
    return RunConfig() if path is None else read_toml(path, RunConfig)


def read_toml(path: Path, kind: type[T]) -> T:
    """A TOML file to a dataclass, which may hold others.

    Raises:
        ConfigError: no such file, no TOML, an unknown name or a value out of range.
    """
    try:
        values = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the configuration {path} cannot be read") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is no TOML: {error}") from error
    # A configuration given for a list holds for the plain dataclasses in it, at every depth.
    adapter: TypeAdapter[list[T]] = TypeAdapter(list[kind], config=ConfigDict(extra="forbid"))  # type: ignore[valid-type]
    try:
        return adapter.validate_python([values])[0]
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        raise ConfigError(f"{path}: {where}: {first['msg']}") from error
