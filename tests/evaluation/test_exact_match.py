"""Exact match by difficulty and budget."""

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from typer.testing import CliRunner

from tests.cli.test_commands import fail, run
from tests.helpers import random_model
from tests.support.test_plots import legend_of
from thoughtbubbles import ThoughtbubblesConfig, ThoughtbubblesForCausalLM
from thoughtbubbles.cli import app
from thoughtbubbles.data.feed.examples import collate_examples
from thoughtbubbles.data.feed.sft import Example
from thoughtbubbles.data.procedural.tasks import TASKS
from thoughtbubbles.data.procedural.vocabulary import word_tokenizer
from thoughtbubbles.data.tokenizer import save_tokenizer
from thoughtbubbles.evaluation.answering import Question, QuestionBatch, answer_questions, make_batches, read_questions
from thoughtbubbles.evaluation.exact_match import measure_exact_match
from thoughtbubbles.recipes.training import load_recipe
from thoughtbubbles.support import plots
from thoughtbubbles.support.errors import InputError

RECIPES = sorted((Path(__file__).parents[2] / "recipes" / "tasks").glob("*.yaml"))
TOKENIZER = word_tokenizer(TASKS["arithmetic"].words)
ROWS = [
    ("1+2=", "3", 1),
    ("4*5=", "20", 1),
    ("7-9=", "-2", 1),
    ("(1+2)*3=", "9", 2),
    ("4-(5+6)=", "-7", 2),
    ("(9*9)-1=", "80", 2),
    ("2*(6-8)=", "-4", 2),
    ("(1+1)+(1+1)=", "4", 3),
    ("((1+2)*3)-4=", "5", 3),
    ("8-(7-(6-5))=", "2", 3),
]


def config(**overrides: Any) -> ThoughtbubblesConfig:
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "fork_layers": [1, 2], "budget": 2}
    tokens = {"vocab_size": len(TOKENIZER), "max_position_embeddings": 24, "bos_token_id": 0, "eos_token_id": 0}
    return ThoughtbubblesConfig(**{**shape, **tokens, **overrides})


def questions(rows: list[tuple[str, str, int]] = ROWS) -> list[Question]:
    return [Question(number, *row) for number, row in enumerate(rows, start=1)]


def batches(rows: list[tuple[str, str, int]] = ROWS, batch_size: int = 64) -> list[QuestionBatch]:
    return make_batches(TOKENIZER, questions(rows), "rows", 24, batch_size)


def encode(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False))


def save(model: ThoughtbubblesForCausalLM, folder: Path) -> Path:
    model.save_pretrained(folder)
    save_tokenizer(TOKENIZER, folder)
    return folder


def write_rows(path: Path, rows: list[tuple[Any, Any, Any]]) -> Path:
    fields = ("prompt", "answer", "difficulty")
    path.write_text("".join(json.dumps(dict(zip(fields, row, strict=True))) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def memorised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was taught ten rows, at two budgets, until it knew them."""
    torch.manual_seed(0)
    model = ThoughtbubblesForCausalLM(config())
    examples = []
    for prompt, answer, _ in ROWS:
        tokens = [0, *encode(prompt), *encode(answer), 0]
        taught = np.arange(len(tokens)) > len(encode(prompt))
        examples.append(Example(np.array(tokens, dtype=np.int32), taught))
    batch = collate_examples(examples, pad=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(400):
        loss = model(**batch, budget=1 + step % 2).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss.item() < 0.01:
            break
    assert loss.item() < 0.05
    return save(model, tmp_path_factory.mktemp("memorised"))


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(random_model(config()), tmp_path_factory.mktemp("untrained"))


@pytest.mark.parametrize("budgets", [None, [Fraction(1), Fraction(2)]])
def test_a_model_that_knows_all_rows_gets_all_right(memorised: Path, budgets: list[Fraction] | None) -> None:
    found = measure_exact_match(str(memorised), questions(), "rows", budgets, progress=False)
    expected = ["2"] if budgets is None else ["1", "2"]
    assert found.budgets == expected
    scores = [(score.budget, score.difficulty, score.n, score.value) for score in found.scores()]
    assert scores == [(each, level, n, 1.0) for each in expected for level, n in ((1, 3), (2, 4), (3, 3), (None, 10))]
    assert [answer.written for answer in found.answers] == [answer for _, answer, _ in ROWS] * len(expected)


def test_shares_and_errors_are_those_of_the_rows(memorised: Path) -> None:
    wrong = {0: "4", 4: "-71", 5: "8"}
    rows = [(prompt, wrong.get(place, answer), level) for place, (prompt, answer, level) in enumerate(ROWS)]
    scores = measure_exact_match(str(memorised), questions(rows), "rows", progress=False).scores()
    assert [score.value for score in scores] == pytest.approx([2 / 3, 0.5, 1, 0.7])
    # Standard deviation / sqrt(n), as of any mean.
    errors = [math.sqrt(2 / 9 * 3 / 2 / 3), math.sqrt(0.25 * 4 / 3 / 4), 0, math.sqrt(0.21 * 10 / 9 / 10)]
    assert [score.stderr for score in scores] == pytest.approx(errors)
    single = measure_exact_match(str(memorised), questions(ROWS[:1]), "rows", progress=False).scores()
    assert [score.stderr for score in single] == [None, None]


@pytest.mark.parametrize("budget", [Fraction(1), Fraction(3, 2)])
def test_answers_are_the_argmax_of_each_prefix_in_any_batch(memorised: Path, budget: Fraction) -> None:
    model = ThoughtbubblesForCausalLM.from_pretrained(memorised).eval()
    others = [("0*(3-9)=", "0", 2), ("8=", "-8", 1), ("9+9=", "18", 1), ("((4*2)-1)-(7+8)=", "-8", 4)]
    expected = []
    for prompt, _, _ in ROWS + others:
        ids = [0, *encode(prompt)]
        start = len(ids)
        # The longest answer has two tokens, and one more ends it.
        while len(ids) < start + 3 and 0 not in ids[start:]:
            ids.append(int(model(torch.tensor([ids]), budget=budget).logits[0, -1].argmax()))
        expected.append(TOKENIZER.decode(ids[start:-1]) if ids[-1] == 0 else None)
    assert len(set(expected)) > 2
    for batch_size in (1, 3, 64):
        answers = answer_questions(model, TOKENIZER, batches(ROWS + others, batch_size), budget)
        assert [answer.written for answer in answers] == expected


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_answers_stop_at_the_rows_end_in_any_batch(
    memorised: Path, batch_size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*ROWS[:2], ("1+" * 10 + "1=", "11", 9), ("1+" * 9 + "1=", "10", 9), ("2+" * 9 + "2=", "20", 9)]
    model = ThoughtbubblesForCausalLM.from_pretrained(memorised)
    alone = answer_questions(model, TOKENIZER, batches(rows, batch_size=1), Fraction(1))
    found = measure_exact_match(str(memorised), questions(rows), "rows", [Fraction(1)], batch_size)
    assert [(each.written, each.question.prompt) for each in found.answers] == [
        (each.written, each.question.prompt) for each in alone
    ]
    assert not any(each.cut for each in found.answers[:2])
    assert found.answers[2].cut  # a prompt of 23 tokens leaves room for one
    said = [line for line in capsys.readouterr().err.splitlines() if "longest row" in line]
    assert said == [f"{found.to_dict()['cut']} answers were cut at the end of the longest row: 24 tokens"]


def test_an_answer_without_an_end_is_wrong() -> None:
    model = ThoughtbubblesForCausalLM(config()).eval()
    model.lm_head.register_forward_hook(
        lambda _, __, logits: F.one_hot(torch.tensor(encode("3")), logits.shape[-1]).expand_as(logits).float()
    )
    (answer,) = answer_questions(model, TOKENIZER, batches(ROWS[:1]), Fraction(1))
    assert (answer.written, answer.right) == (None, False)


def test_progress_counts_questions(untrained: Path) -> None:
    model = ThoughtbubblesForCausalLM.from_pretrained(untrained).eval()
    counts: list[int] = []
    answers = answer_questions(model, TOKENIZER, batches(batch_size=4), Fraction(1), counts.append)
    assert counts == [4, 4, 2]
    assert [answer.question.row for answer in answers] == list(range(1, 11))


def test_a_dense_model_has_one_budget(tmp_path: Path) -> None:
    folder = save(random_model(config(routing="none")), tmp_path / "dense")
    found = measure_exact_match(str(folder), questions(), "rows", [Fraction(1), Fraction(2)], progress=False)
    assert (found.budgets, found.routing, len(found.answers)) == (["1"], "none", 10)


def test_a_limit_takes_as_many_of_each_difficulty(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    assert [question.row for question in read_questions(path)] == list(range(1, 11))
    assert [question.row for question in read_questions(path, 2)] == [1, 2, 4, 6, 8, 9]
    columns = dict(zip(("prompt", "answer", "difficulty"), map(list, zip(*ROWS, strict=True)), strict=True))
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    assert read_questions(tmp_path / "rows.parquet") == read_questions(path)


def test_the_command_writes_what_it_found(tmp_path: Path, memorised: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    save_figure = plots.save_figure

    def keep(figure: Figure, path: Path) -> None:
        figures.append(figure)
        save_figure(figure, path)

    monkeypatch.setattr(plots, "save_figure", keep)
    rows = write_rows(tmp_path / "rows.jsonl", [("1+2=", "4", 1), *ROWS[1:]])
    out = run("exact-match", memorised, rows, "--budget", "1,2", "--output", tmp_path / "out", "--batch-size", 4)
    assert out.splitlines() == [
        "| difficulty | questions | budget 1 | budget 2 |",
        "| --- | ---: | ---: | ---: |",
        "| 1 | 3 | 66.7% ± 33.3 | 66.7% ± 33.3 |",
        "| 2 | 4 | 100.0% ± 0.0 | 100.0% ± 0.0 |",
        "| 3 | 3 | 100.0% ± 0.0 | 100.0% ± 0.0 |",
        "| all | 10 | 90.0% ± 10.0 | 90.0% ± 10.0 |",
    ]
    result = json.loads((tmp_path / "out" / "exact_match.json").read_text())
    assert (result["routing"], result["source"], len(result["scores"])) == ("causal", str(rows), 8)
    assert result["scores"][0] == {
        "budget": "1",
        "difficulty": 1,
        "n": 3,
        "value": pytest.approx(2 / 3),
        "stderr": pytest.approx(1 / 3),
    }
    assert {"commit", "torch", "device"} <= set(result["made_with"])
    answers = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert [row["right"] for row in answers] == ([False] + 9 * [True]) * 2
    assert (answers[0]["written"], answers[0]["answer"], answers[10]["budget"]) == ("3", "4", "2")
    (axes,) = figures[0].axes
    assert axes.get_xlabel() == "difficulty"
    assert legend_of(figures[0]) == ["budget 1", "budget 2"]
    assert " ".join(figures[0].get_suptitle().split()) == f"{memorised.name}: {tmp_path.name}/rows.jsonl"
    line: Any = axes.containers[0]
    assert list(line.lines[0].get_xdata()) == [1, 2, 3]
    assert list(line.lines[0].get_ydata()) == pytest.approx([2 / 3, 1, 1])
    assert (tmp_path / "out" / "exact_match.png").read_bytes().startswith(b"\x89PNG")
    again = json.loads(run("exact-match", memorised, rows, "--budget", "1,2", "--json"))
    assert again["scores"] == result["scores"]
    few = json.loads(run("exact-match", memorised, rows, "--limit", 1, "--json"))
    assert [(score["difficulty"], score["n"]) for score in few["scores"]] == [(1, 1), (2, 1), (3, 1), (None, 3)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("1+2=", "", 1), "row 2: answer='': expected some text"),
        (("1+2=", 3, 1), "row 2: answer=3: expected text"),
        ((None, "3", 1), "row 2: prompt=None: expected text"),
        (("1+2=", "3", "1"), "row 2: difficulty='1': expected a whole number"),
        (("1+2=", "3", True), "row 2: difficulty=True: expected a whole number"),
        (("1/2=", "3", 1), "row 2: '1/2=3': expected words of the model's tokenizer alone"),
        (
            ("1+" * 11 + "1=", "12", 1),
            "row 2: prompt of 25 tokens: expected at most 23, since the model's longest row has 24",
        ),
    ],
)
def test_bad_rows_are_one_line(
    tmp_path: Path,
    untrained: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    row: tuple[Any, Any, Any],
    message: str,
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [ROWS[0], row])
    assert message in fail(capsys, monkeypatch, "exact-match", untrained, path)


def test_rows_of_other_fields_or_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+2=", "answer": "3"}\n')
    with pytest.raises(InputError, match="has no field 'difficulty': it has 'prompt', 'answer'"):
        read_questions(tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(InputError, match="has no rows"):
        read_questions(tmp_path / "rows.jsonl")
    with pytest.raises(InputError, match="does not exist"):
        read_questions(tmp_path / "nowhere.jsonl")


def test_bad_options_are_one_line(
    tmp_path: Path, untrained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    call = ("exact-match", untrained, rows)
    assert "budget='0.5': expected a number of streams" in fail(capsys, monkeypatch, *call, "--budget", "1,0.5")
    assert f"--output {rows}: expected a folder" in fail(capsys, monkeypatch, *call, "--output", rows)
    assert "expected a folder with config.json" in fail(capsys, monkeypatch, "exact-match", tmp_path, rows)
    assert "unknown task arithmetics: did you mean arithmetic?" in fail(
        capsys, monkeypatch, "make-task", "arithmetics", tmp_path / "out"
    )
    assert "--max-difficulty=10: expected 1 to 9, for recall" in fail(
        capsys, monkeypatch, "make-task", "recall", tmp_path / "out", "--max-difficulty", 10
    )


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains_a_new_model_on_a_made_task(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(path)
    folder = Path(str(recipe.data.source)).parent
    task = path.stem.partition("-")[0]
    assert folder.name.partition("-")[0] == task
    run("make-task", task, folder, "--examples", 200, "--test-examples", 3, "--max-difficulty", 2, "--quiet")
    overrides = ["training.steps=2", "training.eval_every=2", "training.batch_size=4", "model.num_hidden_layers=2"]
    overrides += ["model.fork_layers=[1]", "model.hidden_size=16"]
    result = CliRunner().invoke(app, ["train", str(path), *overrides, "--quiet"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    output = recipe.training.output
    scores = json.loads(run("exact-match", output, folder / "test.jsonl", "--budget", "1,2", "--json"))["scores"]
    assert [(score["budget"], score["difficulty"]) for score in scores] == [
        (budget, level) for budget in ("1", "2") for level in (1, 2, None)
    ]
    model = ThoughtbubblesForCausalLM.from_pretrained(Path(output) / "model")
    assert model.config.vocab_size == 2 + len(TASKS[task].words)
    assert model.config.eos_token_id == 0


def test_there_is_a_recipe_for_each_task() -> None:
    assert {path.stem.partition("-")[0] for path in RECIPES} == set(TASKS)
