"""Configuration files and the recipes that ship with the package."""

from pathlib import Path

import pytest

from covtanet.config import find_recipe, load_config
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
