"""Reading a TOML file into the dataclasses of the settings.

An unknown name is an error. Defaults stand in those dataclasses alone.
"""

import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from covtanet.errors import ConfigError
from covtanet.screening.config import ScreeningConfig

if TYPE_CHECKING:
    from covtanet.run_config import RunConfig

T = TypeVar("T")
# Of a checkout, and of an installed package.
RECIPES = (
    Path(__file__).resolve().parents[1] / "recipes",
    Path(sys.prefix) / "share" / "covtanet" / "recipes",
)


@dataclass(frozen=True, kw_only=True)
class ScreeningFile:
    """A TOML file with the settings of a screening alone."""

    screening: ScreeningConfig = field(default_factory=ScreeningConfig)


def load_screening(path: Path | None) -> ScreeningConfig:
    """Read the [screening] table of a TOML file or a recipe; without either, return its defaults.

    Other tables are checked as ``load_config`` checks them.

    Raises:
        ConfigError: as ``load_config``.
    """
    if path is None:
        return ScreeningConfig()
    path = find_recipe(path)
    # The settings of a training import torch, which takes seconds of the start of a screening.
    if set(_read_tables(path)) <= {"screening"}:
        return read_toml(path, ScreeningFile).screening
    return load_config(path).screening


def load_config(path: Path | None) -> "RunConfig":
    """Read a TOML file or a recipe; without either, return the defaults of every table.

    Raises:
        ConfigError: missing file, not TOML, an unknown name or a value out of range.
    """
    from covtanet.run_config import RunConfig

    return RunConfig() if path is None else read_toml(find_recipe(path), RunConfig)


def find_recipe(path: Path) -> Path:
    """Return a file that exists, or the recipe of that name that ships with the package.

    Raises:
        ConfigError: neither exists.
    """
    if path.exists():
        return path
    name = path.name if path.suffix else f"{path.name}.toml"
    is_name = path.parent in (Path(), Path("recipes"))
    for folder in RECIPES:
        if is_name and (folder / name).exists():
            return folder / name
    raise ConfigError(f"the configuration {path} cannot be read")


def read_toml(path: Path, kind: type[T]) -> T:
    """Read a TOML file into a dataclass, which may hold others.

    Raises:
        ConfigError: missing file, not TOML, an unknown name or a value out of range.
    """
    values = _read_tables(path)
    # A configuration given for a list holds for the plain dataclasses in it, at every depth.
    adapter: TypeAdapter[list[T]] = TypeAdapter(list[kind], config=ConfigDict(extra="forbid"))  # type: ignore[valid-type]
    try:
        return adapter.validate_python([values])[0]
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"][1:])
        raise ConfigError(f"{path}: {name}: {first['msg']}") from error


def _read_tables(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the configuration {path} cannot be read") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
