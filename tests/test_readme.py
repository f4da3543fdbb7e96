"""The README's commands and code do what it says."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from thoughtbubbles.cli import app
from thoughtbubbles.evaluation.benchmarks import BENCHMARKS
from thoughtbubbles.training.callbacks import read_metrics
from thoughtbubbles.training.recipe import load_recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TRAINING = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
INSPECTION = (ROOT / "docs" / "inspection.md").read_text(encoding="utf-8")
COMPARISON = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
EVALUATION = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs_and_prints_what_it_says(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(code, "README.md", "exec"), {})
    assert "torch.Size([2, 32, 1000])" in capsys.readouterr().out


def test_the_guide_to_inspection_runs(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(tiny_run)
    monkeypatch.chdir(tmp_path)
    # The tiny run's vocabulary makes more tokens of a text than its longest row takes.
    code = "\n".join(blocks("python", INSPECTION)).replace("The old man walked slowly.", "the root of gate")
    exec(compile(code.replace("[3, 7]", "[1, 2]"), "inspection.md", "exec"), {})
    assert "Lifetime(stream=3, token=3" in capsys.readouterr().out


def commands(*pages: str) -> list[list[str]]:
    texts = [block for page in pages for block in blocks("sh", page)]
    lines = [line for block in texts for line in block.splitlines() if line.startswith("thoughtbubbles ")]
    return [shlex.split(line, comments=True)[1:] for line in lines]


@pytest.mark.parametrize(
    "command", commands(README, TRAINING, COMPARISON, EVALUATION, INSPECTION), ids=lambda command: command[0]
)
def test_commands_are_understood(command: list[str]) -> None:
    """Options and commands exist: asking for help with them parses the rest."""
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0, result.output
    options = {word for word in command if word.startswith("--")}
    assert all(option in result.output for option in options)


@pytest.mark.parametrize("page", [README, TRAINING], ids=["README", "training"])
def test_training_commands_override_real_keys(page: str) -> None:
    found = [command for command in commands(page) if command[0] == "train" and len(command) > 2]
    assert found
    for command in found:
        recipe = load_recipe(ROOT / command[1], [word for word in command[2:] if "=" in word])
        assert recipe.training.steps == 500


def test_tasks_tiers_and_files_of_the_guide_are_those_that_there_are() -> None:
    table = [line.split("|")[1:-1] for line in EVALUATION.partition("## Tasks")[2].partition("## ")[0].splitlines()]
    rows = {row[0].strip(" `"): row[1:] for row in table if row}
    for name, benchmark in BENCHMARKS.items():
        task, documents, headline, _ = (cell.strip() for cell in rows[name])
        assert task.startswith(f"`{benchmark.task}` ")
        smoke, small = (int(count.replace(",", "")) for count in documents.split(", ")[:2])
        assert (smoke, small) == benchmark.documents
        assert headline == f"`{benchmark.headline.partition(',')[0]}`"
        for stem in benchmark.files:
            assert f"`{stem}`" in EVALUATION


@pytest.mark.parametrize("text", blocks("yaml", TRAINING))
def test_recipes_of_the_guide_have_real_keys(tmp_path: Path, text: str) -> None:
    needed = "" if "training:" in text else "training: {output: o, steps: 1}\n"
    (tmp_path / "recipe.yaml").write_text(text + needed)
    load_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("name", ["step", "tokens", "flops", "loss", "perplexity", "learning_rate", "grad_norm"])
def test_metrics_that_the_guide_names_are_written(tiny_run: Path, name: str) -> None:
    rows = read_metrics(tiny_run / "metrics.jsonl")
    assert f"`{name}`" in TRAINING
    assert name in rows[0]
    forks = {key.replace("/1/", "/L/") for key in rows[0] if key.startswith("forks/1/")}
    assert {key for key in forks if "_q" not in key} | {"forks/L/log_score_q05"} <= set(
        re.findall(r"`(.+?)`", TRAINING)
    )


@pytest.mark.parametrize("target", re.findall(r"^make ([\w-]+)", README, re.MULTILINE))
def test_make_targets_exist(target: str) -> None:
    assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE)
    assert README.index("make demo") < README.index("## ")
