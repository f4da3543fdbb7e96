"""The README's commands and code do what it says."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from thoughtbubbles.cli import app
from thoughtbubbles.data import PreparedData
from thoughtbubbles.training.recipe import load_recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs_and_prints_what_it_says(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(code, "README.md", "exec"), {})
    assert "torch.Size([2, 32, 1000])" in capsys.readouterr().out


def commands() -> list[list[str]]:
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("thoughtbubbles ")]
    return [shlex.split(line, comments=True)[1:] for line in lines]


@pytest.mark.parametrize("command", commands(), ids=lambda command: command[0])
def test_commands_are_understood(command: list[str]) -> None:
    """Options and commands exist: asking for help with them parses the rest."""
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0, result.output
    options = {word for word in command if word.startswith("--")}
    assert all(option in result.output for option in options)


def test_training_command_overrides_real_keys(tiny_data: PreparedData) -> None:
    (train,) = [command for command in commands() if command[0] == "train"]
    recipe = load_recipe(ROOT / train[1], [word for word in train[2:] if "=" in word])
    assert recipe.training.steps == 500


@pytest.mark.parametrize("target", re.findall(r"^make ([\w-]+)", README, re.MULTILINE))
def test_make_targets_exist(target: str) -> None:
    assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE)
    assert README.index("make demo") < README.index("## ")
