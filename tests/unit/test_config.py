"""Configuration files and the recipes that ship with the package."""

from pathlib import Path

import pytest

from covtanet.config import find_recipe, load_config, load_screening
from covtanet.errors import ConfigError


def test_recipe_is_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe(Path("mosmed")).name == "mosmed.toml"
    assert find_recipe(Path("recipes/mosmed.toml")).parent.name == "recipes"
    assert load_config(Path("mosmed")).training.dataset == "mosmed"


def test_file_precedes_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mosmed").write_text('[training]\ndataset = "stacks"\n')
    assert load_config(Path("mosmed")).training.dataset == "stacks"


@pytest.mark.parametrize("path", ["unknown", "elsewhere/mosmed.toml"])
def test_missing_configuration_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(Path(path))


def test_screening_table_alone_is_read(tmp_path: Path) -> None:
    path = tmp_path / "screening.toml"
    path.write_text("[screening]\nslice_step_mm = 5.0\n")
    assert load_screening(path).slice_step_mm == 5.0


def test_screening_file_with_other_tables_is_checked_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "both.toml"
    path.write_text("[screening]\nslice_step_mm = 5.0\n[training]\nno_such_setting = 1\n")
    with pytest.raises(ConfigError, match=r"training\.no_such_setting"):
        load_screening(path)
