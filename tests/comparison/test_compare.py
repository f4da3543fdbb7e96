import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tests.comparison.conftest import tiny_comparison, write_recipe
from tests.training.test_run import comparable
from thoughtbubbles.cli import app
from thoughtbubbles.comparison import pool
from thoughtbubbles.comparison.compare import carry_out, look
from thoughtbubbles.comparison.measuring import measure_run
from thoughtbubbles.comparison.pages import write_report
from thoughtbubbles.comparison.results import build_report
from thoughtbubbles.comparison.runs import Run, RunPlanner
from thoughtbubbles.data import PreparedData
from thoughtbubbles.recipes.comparison import load_comparison
from thoughtbubbles.recipes.training import RecipeError
from thoughtbubbles.support.errors import InputError, RunError
from thoughtbubbles.support.files import LOCK_NAME, sole_user
from thoughtbubbles.training.run import train


def test_tunes_trains_and_measures_several_at_a_time(
    tmp_path: Path,
    tiny_data: PreparedData,
    other_data: PreparedData,
    monkeypatch: pytest.MonkeyPatch,
    forked_pool: None,
) -> None:
    tuning = f"tuning={{learning_rates: [1e-30, 1e-2], data: {other_data.path}, tokens: 0.5}}"
    variants = "{dense: , causal: {rate_of: dense}}"
    planner = RunPlanner(tiny_comparison(tmp_path, tiny_data.path, tuning, "seeds=[0]", variants=variants))
    done = carry_out(planner, jobs=2, progress=False)
    assert done.tuned["dense"].rate == 1e-2  # the other one learns nothing
    assert {run.label for run in done.finished} == {"dense/seed-0", "causal/seed-0"}
    assert (done.missing, done.failed) == ([], {})
    run = next(run for run in done.finished if run.variant == "causal")
    alone = tmp_path / "alone"
    run.recipe.training.output = str(alone)
    train(run.recipe, progress=False)
    assert comparable(alone) == comparable(run.folder)
    # Nothing is started the second time.
    monkeypatch.setattr(pool, "_start", None)
    again = carry_out(planner, jobs=2, progress=False)
    assert [each.label for each in again.finished] == [each.label for each in done.finished]


@pytest.mark.usefixtures("blank_figures")
def test_a_run_that_cannot_go_on_stops_no_other(tmp_path: Path, tiny_data: PreparedData) -> None:
    variants = "{dense: , wild: {like: dense, training: {learning_rate: 1e36, max_grad_norm: 1e36}}}"
    recipe = write_recipe(tmp_path, tiny_data.path, variants)
    planner = RunPlanner(load_comparison(recipe, ["seeds=[0]"]))
    dense, _ = planner.runs({})
    train(dense.recipe, progress=False)
    measure_run(dense.folder, planner.data, planner.comparison.evaluation)
    (planner.comparison.output / LOCK_NAME).touch()
    made = CliRunner().invoke(app, ["compare", str(recipe), "seeds=[0]", "--quiet"])
    assert isinstance(made.exception, RunError)
    assert "1 runs cannot go on: wild/seed-0: step " in str(made.exception)
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| dense | 768 | 1 |" in report
    assert "Failed: wild/seed-0: step " in report


def test_a_comparison_that_has_changed_is_refused(finished: RunPlanner) -> None:
    folder = finished.comparison.output.parent
    data = Path(finished.comparison.base["data"]["path"])
    changed = tiny_comparison(folder, data, "training.steps=13", variants="[dense, causal]")
    with pytest.raises(RecipeError, match=r"dense/seed-0 holds a run of another recipe: training\.steps: 12 is now 13"):
        look(RunPlanner(changed))


def test_measuring_anew_trains_nothing(finished: RunPlanner, monkeypatch: pytest.MonkeyPatch) -> None:
    run = finished.runs({})[0]
    assert pool.is_done(run, finished.comparison.evaluation)
    assert pool.is_done(run, None)
    folder = finished.comparison.output.parent
    data = Path(finished.comparison.base["data"]["path"])
    other = tiny_comparison(folder, data, "evaluation.blocks=4")
    assert not pool.is_done(run, other.evaluation)


@pytest.mark.parametrize("name", ["measurements.json", "summary.json", "run.json"])
def test_a_record_that_is_damaged_is_named(
    tmp_path: Path, tiny_data: PreparedData, finished: RunPlanner, name: str
) -> None:
    shutil.copytree(finished.comparison.output, tmp_path / "out")
    record = tmp_path / "out" / "runs" / "dense" / "seed-0" / name
    text = record.read_text()
    for content in ("", text[: len(text) // 2], "[]", '{"settings": 1}'):
        record.write_text(content)
        with pytest.raises(InputError, match=rf"dense/seed-0/{name} is damaged: ") as caught:
            write_report(
                build_report(planner := RunPlanner(tiny_comparison(tmp_path, tiny_data.path)), look(planner)), tmp_path
            )
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("output", ["{folder}/file", "/proc/x"])
def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path, tiny_data: PreparedData, output: str) -> None:
    (tmp_path / "file").write_text("mine")
    output = output.format(folder=tmp_path)
    with pytest.raises(InputError, match=rf"^output={output}: .*expected a folder to write to"):
        carry_out(RunPlanner(tiny_comparison(tmp_path, tiny_data.path, f"output={output}")), progress=False)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.usefixtures("blank_figures")
def test_a_report_that_cannot_be_written_is_a_line(tmp_path: Path, finished: RunPlanner) -> None:
    (tmp_path / "plots").write_text("mine")
    with pytest.raises(RunError, match=r"^report in .*: .*; the runs are whole"):
        write_report(build_report(finished, look(finished)), tmp_path)


def test_memory_that_runs_out_when_measuring_is_a_line(finished: RunPlanner, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(pool, "measure_run", fail)
    with pytest.raises(RunError, match=r"when measuring: evaluation\.batch_size=16, expected a smaller one"):
        pool._measure(finished.runs({})[0], finished.comparison.evaluation)


def test_two_comparisons_do_not_share_a_folder(finished: RunPlanner) -> None:
    with (
        sole_user(finished.comparison.output / ".lock"),
        pytest.raises(InputError, match="is in use by another comparison"),
    ):
        carry_out(finished, progress=False)


@pytest.mark.usefixtures("blank_figures")
def test_the_command_reports_what_is_finished(finished: RunPlanner) -> None:
    recipe = finished.comparison.output.parent / "compare.yaml"
    variants = "variants=[dense, budget-1, copy-root, topk, causal, causal-half]"
    made = CliRunner().invoke(app, ["compare", str(recipe), variants, "--report-only"])
    assert made.exit_code == 0, made.output
    assert "11 runs, 1 missing; report in" in made.output
    assert (finished.comparison.output / "report.html").exists()


def test_the_command_says_what_it_would_train(finished: RunPlanner) -> None:
    recipe = finished.comparison.output.parent / "compare.yaml"
    made = CliRunner().invoke(app, ["compare", str(recipe), "variants=[dense, causal-half, causal]", "--dry-run"])
    assert made.output.splitlines()[1].startswith("causal-half: 6 steps, 384 tokens, ")


def test_nothing_finished_is_no_report(tmp_path: Path, tiny_data: PreparedData) -> None:
    recipe = write_recipe(tmp_path, tiny_data.path)
    made = CliRunner().invoke(app, ["compare", str(recipe), "--report-only"])
    assert isinstance(made.exception, RunError)
    assert "no run is finished" in str(made.exception)


LONG_RUN = ("training.steps=1500", "training.save_every=20", "training.eval_every=1500", "seeds=[0]")


def start(recipe: Path, *overrides: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "thoughtbubbles", "compare", str(recipe), *overrides, "--jobs", "2"]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def under_way(runs: list[Run]) -> bool:
    return all(list(run.folder.glob("checkpoints/checkpoint-*/seal.json")) for run in runs)


def free(run: Run) -> bool:
    with sole_user(run.folder / ".lock") as alone:
        return alone


@pytest.mark.long
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize("number", ["SIGTERM", "SIGKILL"])
def test_whatever_stops_a_comparison_its_runs_are_saved_and_go_on(
    tmp_path: Path, tiny_data: PreparedData, number: str
) -> None:
    recipe = write_recipe(tmp_path, tiny_data.path, "[dense, causal]")
    runs = RunPlanner(tiny_comparison(tmp_path, tiny_data.path, *LONG_RUN, variants="[dense, causal]")).runs({})
    process = start(recipe, *LONG_RUN)
    wait_for(lambda: under_way(runs))
    os.kill(process.pid, getattr(signal, number))
    _, said = process.communicate(timeout=120)
    if number == "SIGTERM":
        assert process.returncode == 0
        assert "stopped by SIGTERM, every run is saved" in said
    wait_for(lambda: all(free(run) for run in runs))
    again = start(recipe, *LONG_RUN)
    _, said = again.communicate(timeout=400)
    assert again.returncode == 0, said
    log = (runs[0].folder.parent / "seed-0.log").read_text()
    assert "going on after step" in log
