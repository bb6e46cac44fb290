"""Flags of the commands: scripts of hospitals call them."""

import json
import re
from importlib import import_module
from pathlib import Path

import pytest

from covtanet.__main__ import COMMANDS, main
from covtanet.runtime import ExitCode

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "flags.json"
SUBCOMMANDS = {"ledger": ("view", "runs", "run", "diff")}


def flags_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Flags that ``--help`` shows."""
    command = import_module(f"covtanet.commands.{arguments[0]}")
    with pytest.raises(SystemExit, match="0"):
        command.main([*arguments[1:], "--help"])
    options = capsys.readouterr().out.partition("options:")[2]
    return sorted(set(re.findall(r"^  (?:-h, )?(--[a-z-]+)", options, re.MULTILINE)))


@pytest.mark.parametrize("name", COMMANDS)
def test_flags_of_command_are_frozen(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    expected = json.loads(GOLDEN.read_text())
    assert flags_of([name], capsys) == expected[name]
    for subcommand in SUBCOMMANDS.get(name, ()):
        arguments = [name, "LEDGER", subcommand]
        assert flags_of(arguments, capsys) == expected[f"{name} {subcommand}"]


def test_program_without_command_is_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == main(["unknown"]) == ExitCode.USAGE
    assert "covtanet COMMAND" in capsys.readouterr().err
    assert main(["--help"]) == ExitCode.DONE
    assert "screen an archive" in capsys.readouterr().out
