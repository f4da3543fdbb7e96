"""scripts/tasks.py: the tables of docs/bubbles.md."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from tests.test_readme import ROOT
from thoughtbubbles.training.folder import RunSummary


def finished(run: Path, right: dict[str, list[bool]], flops: int) -> None:
    """A run of whose questions some were answered right, by budget."""
    (run / "exact-match").mkdir(parents=True)
    rows = [{"budget": budget, "right": each} for budget, answers in right.items() for each in answers]
    (run / "exact-match" / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    RunSummary(100, 8, 1000, flops, 10.0, 1.0, 2.7, {}, False, "causal", "2").write(run)


def tabulate(folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> list[str]:
    """The lines of table.md."""
    monkeypatch.setattr(sys, "argv", ["tasks.py", "kinship", "--output", str(folder), "--variants", *options])
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "scripts" / "tasks.py"), run_name="__main__")
    return (folder / "table.md").read_text().splitlines()


@pytest.fixture
def forks(tmp_path: Path) -> Path:
    """A folder with rows and a run with forks."""
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "task.json").write_text('{"examples": 300}')
    right = {"1": [False] * 4, "1.5": [True, False, False, False], "2": [True, True, True, False]}
    finished(tmp_path / "forks-1", right, 20)
    return tmp_path


def test_a_table_of_what_is_finished(forks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished(forks / "dense-0", {"1": [True, False, False, False]}, 10)
    finished(forks / "dense-1", {"1": [True, True, False, False]}, 10)
    lines = tabulate(forks, monkeypatch)
    assert lines[0] == "|  | seeds | training FLOPs | budget 1 | budget 1.5 | budget 2 | minus dense's |"
    assert lines[2] == "| dense | 2 | 10 | 37.5 |  |  |  |"
    # Against dense with the same seed alone: one question of four more.
    assert lines[3].startswith("| causal, roots whole | 1 | 20 | 0.0 | 25.0 | 75.0 | +25.0 (")
    assert len([line for line in lines if line.startswith("|")]) == 4


def test_a_table_without_the_baseline(forks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tabulate(forks, monkeypatch)[2] == "| causal, roots whole | 1 | 20 | 0.0 | 25.0 | 75.0 |  |"


def test_other_rows_than_those_there_are_refused(
    forks: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tabulate(forks, monkeypatch, "--rows", "300")
    with pytest.raises(SystemExit):
        tabulate(forks, monkeypatch, "--rows", "400")
    assert f"--rows 400: {forks / 'rows'} has 300; expected as many" in capsys.readouterr().err
