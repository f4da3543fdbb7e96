"""Benchmarks scored while a run trains: `training.eval_tasks`."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.benchmark_files import problems, write_benchmarks, write_rows
from tests.evaluation.test_harness import wrap
from tests.training.test_run import Kill, comparable
from thoughtbubbles.data import PreparedData
from thoughtbubbles.evaluation.benchmarks import BENCHMARKS, load_benchmark
from thoughtbubbles.evaluation.during_training import task_scores
from thoughtbubbles.evaluation.scoring import run_task
from thoughtbubbles.model.loading import load_model
from thoughtbubbles.recipes.training import Recipe, RecipeError, load_recipe
from thoughtbubbles.support.errors import InputError
from thoughtbubbles.training.run import train

RECIPE = """
task: sft
model:
  num_hidden_layers: 3
  hidden_size: 16
  num_attention_heads: 2
  fork_layers: [1, 2]
  budget: 1.5
data:
  source: {folder}/rows.jsonl
  validation_fraction: 0.2
  prompt: "Question: {{question}}\\nAnswer:"
  completion: " {{answer}}"
  tokenizer: {tokenizer}
  max_length: 120
training:
  output: {folder}/run
  steps: 6
  batch_size: 4
  eval_every: 3
  save_every: 2
  log_every: 1
"""


def recipe(folder: Path, data: PreparedData, *overrides: str, name: str = "") -> Recipe:
    folder = folder / name
    write_benchmarks(folder / "benchmarks")
    write_rows(folder, "rows", problems(20))
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder, tokenizer=data.path / "tokenizer"))
    asked = ["training.eval_tasks=[gsm8k]", f"training.eval_tasks_dir={folder}/benchmarks",
             "training.eval_tasks_documents=2"]  # fmt: skip
    return load_recipe(folder / "recipe.yaml", [*asked, *overrides])


def run(made: Recipe) -> Path:
    train(made, progress=False, callbacks=task_scores(made))
    return Path(made.training.output)


def rows(output: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / name).read_text().splitlines()]


def test_scores_are_those_of_the_model_at_that_step(tmp_path: Path, tiny_data: PreparedData) -> None:
    made = recipe(tmp_path, tiny_data)
    output = run(made)
    first, last = rows(output, "tasks.jsonl")
    assert [first["step"], last["step"]] == [3, 6]
    assert first["gsm8k/gold/solution_loglikelihood"] < last["gsm8k/gold/solution_loglikelihood"] < 0
    assert {"gsm8k/harness/exact_match,strict-match", "gsm8k/gold/answer_loglikelihood_stderr"} <= set(first)
    folder = tmp_path / "benchmarks"
    lm = wrap(load_model(output), tiny_data, batch_size=4)
    loaded = load_benchmark(BENCHMARKS["gsm8k"], folder, 0)
    record = run_task(lm, loaded, lm.model.config.exact_budget(), limit=2)
    gold = record.find("gold", "solution_loglikelihood")
    assert record.scores(gold).estimate == pytest.approx(last["gsm8k/gold/solution_loglikelihood"], abs=1e-3)


def test_training_is_not_changed_by_it(tmp_path: Path, tiny_data: PreparedData) -> None:
    with_ = run(recipe(tmp_path, tiny_data, name="with"))
    without = run(recipe(tmp_path, tiny_data, "training.eval_tasks=null", name="without"))
    assert not (without / "tasks.jsonl").exists()
    assert comparable(with_) == comparable(without)


def test_an_interrupted_run_has_each_row_once(tmp_path: Path, tiny_data: PreparedData) -> None:
    whole = run(recipe(tmp_path, tiny_data, name="whole"))
    made = recipe(tmp_path, tiny_data, name="killed")
    for at in (4, 5):  # after an evaluation that no checkpoint knows of, and after one that the newest knows of
        with pytest.raises(KeyboardInterrupt):
            train(made, progress=False, callbacks=[*task_scores(made), Kill(at=at)])
    assert rows(run(made), "tasks.jsonl") == rows(whole, "tasks.jsonl")


def test_names_and_files_are_checked_before_the_run(tmp_path: Path, tiny_data: PreparedData) -> None:
    with pytest.raises(InputError, match="unknown task gsm9k: did you mean gsm8k"):
        task_scores(recipe(tmp_path, tiny_data, "training.eval_tasks=[gsm9k]"))
    with pytest.raises(InputError, match="expected a folder with the files"):
        task_scores(recipe(tmp_path, tiny_data, "training.eval_tasks_dir=nowhere"))
    with pytest.raises(RecipeError, match=r"training.eval_tasks_documents=0: expected at least 1"):
        recipe(tmp_path, tiny_data, "training.eval_tasks_documents=0")
    assert task_scores(recipe(tmp_path, tiny_data, "training.eval_tasks=null")) == []
