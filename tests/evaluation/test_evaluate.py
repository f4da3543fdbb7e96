"""The whole evaluation: known answers, chance, resumption, comparison, and what the command says of bad input."""

import errno
import json
import math
import random
import runpy
import shutil
import subprocess
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tests.cli.test_commands import fail
from tests.evaluation.benchmark_files import captions, goals, lines, sentence_pairs, write_benchmarks, write_rows
from tests.evaluation.test_harness import make_model, wrap
from tests.helpers import tiny_config
from thoughtbubbles import ThoughtbubblesForCausalLM
from thoughtbubbles.cli import app
from thoughtbubbles.data import PreparedData
from thoughtbubbles.evaluation import evaluate as module
from thoughtbubbles.evaluation.benchmarks import BENCHMARKS, load_benchmark, parse_tasks
from thoughtbubbles.evaluation.evaluate import Options, evaluate
from thoughtbubbles.evaluation.report import ScoreRow, comparison_table, panels_of, rows_of, table_of, write_report
from thoughtbubbles.evaluation.scoring import run_task
from thoughtbubbles.model.budget import budget_text
from thoughtbubbles.support.errors import InputError

ROOT = Path(__file__).parents[2]
EVERYTHING = ",".join(BENCHMARKS)
PASSAGES = 4
OPENING = 12
KNOWN = 0.004  # nats per token


def save(model: ThoughtbubblesForCausalLM, data: PreparedData, folder: Path) -> Path:
    model.save_pretrained(folder)
    shutil.copytree(data.path / "tokenizer", folder, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_benchmarks(tmp_path_factory.mktemp("benchmarks"))


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory, tiny_data: PreparedData) -> Path:
    return save(make_model(tiny_data, max_position_embeddings=256), tiny_data, tmp_path_factory.mktemp("causal"))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory, tiny_data: PreparedData) -> Path:
    model = make_model(tiny_data, routing="none", max_position_embeddings=256)
    return save(model, tiny_data, tmp_path_factory.mktemp("dense"))


def options(tasks: str, files: Path, *budgets: str, **values: Any) -> Options:
    chosen = [Fraction(budget) for budget in budgets] or None
    return Options(parse_tasks(tasks), files, budgets=chosen, **{"num_fewshot": 0, **values})


def scores(rows: Sequence[ScoreRow]) -> dict[tuple[str, str, str], float]:
    return {(row.task, row.protocol, row.metric): row.value for row in rows}


def memorise(texts: Sequence[str], data: PreparedData) -> ThoughtbubblesForCausalLM:
    """A model that knows some texts by heart, each ending with the end of text: trained by its loss, not by a count.

    Each stands after the separator and, as the authors' protocol asks, after nothing.
    """
    config = tiny_config(
        vocab_size=data.manifest.vocab_size,
        hidden_size=48,
        intermediate_size=192,
        budget=1.5,
        eos_token_id=data.tokenizer().eos_token_id,
    )
    model = ThoughtbubblesForCausalLM(config)
    end = int(data.tokenizer().eos_token_id)
    rows = [[*start, *data.tokenizer().encode(text), end] for text in texts for start in ([], [end])]
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    labels = ids.masked_fill(mask == 0, -100)
    endings = labels.masked_fill(torch.arange(length) < OPENING, -100)  # no model can know which text begins
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    for step in range(1000):
        if step % 20 == 0 and model(ids, attention_mask=mask, labels=endings).loss < KNOWN:
            model.eval()
            return model
        model(ids, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    raise AssertionError("not learned by heart after 1,000 steps")


def test_a_model_that_knows_the_answers_scores_all(tmp_path: Path, tiny_data: PreparedData) -> None:
    passages = lines(PASSAGES)
    asked = [{"question": f"{line}?", "answer": f"so {i}.\n#### {i + 3}"} for i, line in enumerate(lines(PASSAGES, 1))]
    solutions = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in asked]
    starts, ends = zip(*(passage.rsplit(" ", 1) for passage in passages), strict=True)
    chooser = random.Random(0)
    chosen = [
        {"ctx": start, "endings": [end if place == label else "zzz zz" for place in range(4)], "label": label}
        for start, end, label in zip(starts, ends, chooser.choices(range(4), k=PASSAGES), strict=True)
    ]
    write_rows(tmp_path, "lambada", [{"text": passage} for passage in passages])
    write_rows(tmp_path, "hellaswag", chosen)
    write_rows(
        tmp_path,
        "blimp",
        [{"uid": "a", "sentence_good": line, "sentence_bad": f"{line[::-1]}"} for line in passages],
    )
    for split in ("train", "test"):
        write_rows(tmp_path, f"gsm8k-{split}", asked)
    model = save(memorise([*passages, *solutions], tiny_data), tiny_data, tmp_path / "model")
    tasks = "lambada,hellaswag,blimp,gsm8k"
    folder = evaluate(str(model), tmp_path / "out", options(tasks, tmp_path, tier="full"), progress=False)
    found = scores(rows_of(folder))
    right = [key for key in found if key[2].partition(",")[0] in ("acc", "acc_norm", "exact_match")]
    assert len(right) == 2 + 3 + 2 + 2
    assert {key: found[key] for key in right} == dict.fromkeys(right, 1.0)
    assert found["lambada", "harness", "perplexity"] < 1.2
    assert found["gsm8k", "gold", "solution_loglikelihood"] > -2
    written = folder.records(["gsm8k", *BENCHMARKS])[0].generations or []
    assert [text.rpartition(" ")[2] for text in written] == [str(i + 3) for i in range(PASSAGES)]


def test_random_scores_give_chance(tmp_path: Path, tiny_data: PreparedData, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 300
    write_rows(tmp_path, "hellaswag", [{**row, "endings": lines(4, i)} for i, row in enumerate(captions(250))])
    write_rows(tmp_path, "piqa", goals(count))
    write_rows(
        tmp_path, "blimp", [{**row, "uid": f"paradigm {i % 20}"} for i, row in enumerate(sentence_pairs(1, 100))]
    )
    lm = wrap(make_model(tiny_data), tiny_data)
    chooser = random.Random(5)

    def draw(requests: Sequence[Any], *_: Any, **__: Any) -> list[tuple[float, bool]]:
        return [(len(tokens) * chooser.uniform(-9, -1), False) for _, _, tokens in requests]

    monkeypatch.setattr(lm, "_loglikelihood_tokens", draw)
    for name, chance in (("hellaswag", 0.25), ("piqa", 0.5), ("blimp", 0.5)):
        record = run_task(lm, load_benchmark(BENCHMARKS[name], tmp_path), Fraction(1), limit=None)
        assert len(record.documents) >= 100
        for metric in record.metrics:
            drawn = record.scores(metric)
            assert 0 < drawn.standard_error < 0.06
            assert abs(drawn.estimate - chance) < 3 * drawn.standard_error, (name, metric.metric)


@pytest.mark.parametrize(("routing", "tasks"), [("causal", EVERYTHING), ("topk", "piqa,gsm8k")])
def test_no_result_depends_on_the_batch(
    tmp_path: Path, files: Path, tiny_data: PreparedData, routing: str, tasks: str
) -> None:
    model = save(make_model(tiny_data, routing=routing, max_position_embeddings=160), tiny_data, tmp_path / "model")
    folders = [
        evaluate(str(model), tmp_path / str(size), options(tasks, files, limit=2, batch_size=size), progress=False)
        for size in (1, 8)
    ]
    alone, together = (folder.records(tuple(BENCHMARKS)) for folder in folders)
    assert {each.task for each in alone} == set(tasks.split(","))
    for one, other in zip(alone, together, strict=True):
        assert (one.documents, one.generations, one.clusters) == (other.documents, other.generations, other.clusters)
        for first, second in zip(one.metrics, other.metrics, strict=True):
            assert first.metric == second.metric
            assert first.values == pytest.approx(second.values, abs=2e-3)
            generated = first.metric.startswith("exact_match")
            assert first.leaks == (routing == "topk" and not generated)
    table = write_report(folders[0])
    assert ("leaks: with routing `topk`" in table) == (routing == "topk")


@pytest.mark.parametrize("task", ["gsm8k", "blimp", "lambada", "piqa", "wikitext"])
def test_texts_longer_than_the_row_are_cut_on_the_left_and_counted(
    tmp_path: Path, files: Path, tiny_data: PreparedData, task: str
) -> None:
    model = save(make_model(tiny_data, max_position_embeddings=8), tiny_data, tmp_path / "model")
    folder = evaluate(str(model), tmp_path / "out", options(task, files, limit=2), progress=False)
    (record,) = folder.records([task])
    assert record.truncated > 0 or task == "wikitext"  # which is read in windows
    assert all(math.isfinite(value) for metric in record.metrics for value in metric.values)


def test_cache_on_and_off_give_the_same(tmp_path: Path, files: Path, causal: Path) -> None:
    found = []
    for cached in (True, False):
        chosen = options("gsm8k", files, limit=2, use_cache=cached)
        (record,) = evaluate(str(causal), tmp_path / str(cached), chosen, progress=False).records(["gsm8k"])
        found.append((record.generations, [metric.values for metric in record.metrics]))
    assert found[0] == found[1]
    assert len(set(found[0][0])) > 1


def test_an_evaluation_goes_on_where_it_stopped(
    tmp_path: Path, files: Path, causal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, Fraction]] = []
    run = run_task

    def counted(lm: Any, loaded: Any, budget: Fraction, *rest: Any) -> Any:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append((loaded.benchmark.name, budget))
        return run(lm, loaded, budget, *rest)

    monkeypatch.setattr(module, "run_task", counted)
    chosen = options("piqa,blimp", files, "1", "3/2")
    with pytest.raises(KeyboardInterrupt):
        evaluate(str(causal), tmp_path / "out", chosen, progress=False)
    monkeypatch.setattr(module, "run_task", run)
    first = (tmp_path / "out/documents/piqa-budget-1.json").stat().st_mtime_ns
    folder = evaluate(str(causal), tmp_path / "out", chosen, progress=False)
    assert (tmp_path / "out/documents/piqa-budget-1.json").stat().st_mtime_ns == first
    whole = evaluate(str(causal), tmp_path / "whole", chosen, progress=False)
    assert rows_of(folder) == rows_of(whole)
    assert [(record.task, record.budget) for record in folder.records(tuple(BENCHMARKS))] == [
        ("blimp", "1"), ("blimp", "1.5"), ("piqa", "1"), ("piqa", "1.5")]  # fmt: skip
    more = evaluate(str(causal), tmp_path / "out", options("lambada", files, "2"), progress=False)
    assert len(more.records(tuple(BENCHMARKS))) == 5


def test_a_folder_belongs_to_one_model_and_setting(tmp_path: Path, files: Path, causal: Path, dense: Path) -> None:
    output = tmp_path / "out"
    evaluate(str(causal), output, options("piqa", files), progress=False)
    with pytest.raises(InputError, match=r"other settings: documents: tier small is now limit 3$"):
        evaluate(str(causal), output, options("piqa", files, limit=3), progress=False)
    with pytest.raises(
        InputError, match=r"other settings: config_hash: .*; weights_hash: .*; routing: causal is now none"
    ):
        evaluate(str(dense), output, options("piqa", files), progress=False)
    other = write_benchmarks(tmp_path / "other", count=15)
    with pytest.raises(InputError, match="is of other files of piqa: expected another --output"):
        evaluate(str(causal), output, options("piqa", other), progress=False)
    moved = tmp_path / "moved"
    shutil.copytree(causal, moved)
    evaluate(str(moved), output, options("piqa", files), progress=False)


def test_results_say_what_they_are_of(tmp_path: Path, files: Path, causal: Path) -> None:
    folder = evaluate(str(causal), tmp_path / "out", options("blimp,wikitext", files, "1", "4/3"), progress=False)
    table = write_report(folder)
    content = json.loads((folder.path / "results.json").read_text())
    assert {"model", "config_hash", "weights_hash", "routing", "own_budget", "documents"} <= set(content)
    assert {"commit", "lm_eval", "torch", "batch_size"} <= set(content["made_with"])
    blimp = next(row for row in content["results"] if (row["task"], row["budget"]) == ("blimp", "4/3"))
    assert (blimp["version"], blimp["n"], blimp["clusters"], blimp["metric"]) == ("2.0", 10, 5, "acc")
    assert (folder.path / "table.md").read_text() == table
    assert table.startswith("| task | n | protocol | metric | budget 1 | budget 4/3 |")
    assert "| blimp | 10 in 5 | authors | acc ↑ |" in table
    assert "| wikitext | 10 | harness | word_perplexity ↓ |" in table
    evaluation_table = runpy.run_path(str(ROOT / "scripts" / "results.py"))["evaluation_table"]
    assert evaluation_table(content).startswith(table)
    assert "trained at budget 2; tier small. Commit" in evaluation_table(content)
    panels = panels_of(rows_of(folder))
    assert set(panels) == {"blimp", "wikitext"}
    assert [point[0] for point in panels["blimp"]["authors, acc"]] == [1, pytest.approx(4 / 3)]


def test_metrics_are_what_the_harness_reports(
    tmp_path: Path, files: Path, causal: Path, tiny_data: PreparedData
) -> None:
    from lm_eval.evaluator import evaluate as run_harness

    folder = evaluate(str(causal), tmp_path / "out", options(EVERYTHING, files, limit=3), progress=False)
    lm = wrap(make_model(tiny_data, max_position_embeddings=256), tiny_data)
    for record in folder.records(tuple(BENCHMARKS)):
        loaded = load_benchmark(BENCHMARKS[record.task], files, num_fewshot=0)
        # For errors of perplexities it would draw in processes of its own.
        iterations = int(record.metrics[0].kind == "mean")
        tasks = {"tasks": dict(loaded.tasks)}
        results = run_harness(lm, tasks, samples=loaded.samples(3), bootstrap_iters=iterations)["results"]
        for metric in record.metrics:
            if metric.protocol != "harness":
                continue
            name = metric.metric if "," in metric.metric else f"{metric.metric},none"
            expected = results[BENCHMARKS[record.task].task]
            drawn = record.scores(metric)
            assert drawn.estimate == pytest.approx(expected[name], rel=1e-4)
            if metric.kind == "mean" and record.clusters is None and record.metrics[0].kind == "mean":
                assert drawn.standard_error == pytest.approx(expected[name.replace(",", "_stderr,")], rel=1e-6)


def test_a_dense_model_has_one_budget_and_is_compared_at_it(
    tmp_path: Path, files: Path, causal: Path, dense: Path
) -> None:
    ours = evaluate(str(causal), tmp_path / "ours", options("piqa,lambada", files, "1", "2"), progress=False)
    theirs = evaluate(str(dense), tmp_path / "theirs", options("piqa,lambada", files, "1", "2"), progress=False)
    assert {record.budget for record in theirs.records(tuple(BENCHMARKS))} == {"1"}
    table = write_report(ours, theirs)
    content = json.loads((ours.path / "results.json").read_text())["against"]["results"]
    assert len(content) == 2 * (3 + 3)
    row = next(
        each for each in content if (each["task"], each["metric"], each["budget"]) == ("lambada", "perplexity", "2")
    )
    assert row["difference"] == pytest.approx(row["value"] - row["other_value"])
    assert row["low"] < row["difference"] < row["high"]
    assert f"| lambada | harness | perplexity | 2 / 1 | {row['value']:,.2f} |" in table
    assert comparison_table([]).count("\n") == 2


def test_only_the_same_documents_are_compared(tmp_path: Path, files: Path, causal: Path) -> None:
    ours = evaluate(str(causal), tmp_path / "ours", options("piqa", files), progress=False)
    fewer = evaluate(str(causal), tmp_path / "fewer", options("piqa", files, limit=4), progress=False)
    with pytest.raises(InputError, match=r"piqa was evaluated on other documents \(documents: 10 and 4\)"):
        write_report(ours, fewer)
    others = evaluate(str(causal), tmp_path / "others", options("blimp", files), progress=False)
    with pytest.raises(InputError, match="expected an evaluation on some of the same tasks and budgets"):
        write_report(ours, others)


@pytest.mark.parametrize(("budget", "text"), [("1.5", "1.5"), ("2", "2"), ("4/3", "4/3"), ("1.25", "1.25")])
def test_budgets_are_written_as_people_write_them(budget: str, text: str) -> None:
    assert budget_text(Fraction(budget)) == text


def test_a_single_document_has_no_error() -> None:
    row = ScoreRow("piqa", "1.0", "1", 0, "harness", "acc", 1.0, float("nan"), 1, None, True, False)
    assert "| 1.0000 |" in table_of([row])


def test_the_command_evaluates_compares_and_plots(tmp_path: Path, files: Path, causal: Path) -> None:
    command = ["evaluate", str(causal), "--tasks", "piqa,blimp", "--data-dir", str(files), "--limit", "4", "--quiet",
               "--num-fewshot", "0", "--no-cache"]  # fmt: skip
    result = CliRunner().invoke(app, [*command, "--output", str(tmp_path / "a"), "--budget", "1,1.5"])
    assert result.exit_code == 0, result.output
    assert "| piqa | 4 | harness | acc ↑ |" in result.stdout
    assert (tmp_path / "a" / "scores.png").stat().st_size > 1000
    settings = json.loads((tmp_path / "a" / "settings.json").read_text())
    assert (settings["use_cache"], settings["documents"]) == (False, "limit 4")
    again = CliRunner().invoke(
        app, [*command, "--output", str(tmp_path / "b"), "--budget", "1", "--against", str(tmp_path / "a")]
    )
    assert again.exit_code == 0, again.output
    assert "| piqa | harness | acc | 1 / 1 |" in again.stdout
    assert not (tmp_path / "b" / "scores.png").exists()


def test_the_command_asks_nothing(tmp_path: Path, files: Path, causal: Path) -> None:
    """In a process of its own, in which nothing has registered the model's class before."""
    assert (causal / "modeling.py").exists()  # code that transformers would offer to run
    command = [sys.executable, "-m", "thoughtbubbles", "evaluate", causal, "--tasks", "piqa", "--data-dir", files,
               "--output", tmp_path / "out", "--quiet"]  # fmt: skip
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, input="", timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("| task |")
    assert done.stderr == ""


def test_prompts_follow_what_precedes_a_text(
    tmp_path: Path, files: Path, causal: Path, tiny_data: PreparedData
) -> None:
    (found,) = evaluate(str(causal), tmp_path / "out", options("gsm8k", files, limit=3), False).records(["gsm8k"])
    model, tokenizer = make_model(tiny_data, max_position_embeddings=256), tiny_data.tokenizer()
    row = json.loads((files / "gsm8k-test.jsonl").read_text().split("\n")[0])
    prompt = f"Question: {row['question']}\nAnswer:"
    ids = torch.tensor([[0, *tokenizer.encode(f"{prompt} {row['answer']}")]])
    losses = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
    expected = -losses[len(tokenizer.encode(prompt)) :].sum().item()
    assert found.find("gold", "solution_loglikelihood").values[0] == pytest.approx(expected, abs=1e-3)


def spoil(folder: Path, model: Path, what: str) -> Path:
    shutil.copytree(model, folder)
    if what == "weights":
        (folder / "model.safetensors").unlink()
    elif what == "vocabulary":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 50}))
    elif what == "tokenizer":
        (folder / "tokenizer.json").unlink()
    return folder


@pytest.mark.parametrize(
    ("what", "arguments", "message"),
    [
        ("", ["--tasks", "lambda"], "unknown task lambda: did you mean lambada?"),
        ("", ["--tier", "smal"], "unknown tier smal: did you mean small?"),
        ("", ["--budget", "1,none"], "--budget='none': expected a number of streams per token"),
        ("", ["--data-dir", "nowhere"], "--data-dir nowhere: expected a folder with the files of the tasks"),
        ("", ["--against", "nowhere"], "nowhere: expected the folder of an evaluation"),
        ("weights", [], "expected weights, a file *.safetensors, beside config.json"),
        ("tokenizer", [], "expected tokenizer.json beside it"),
        ("vocabulary", [], "its tokenizer has 300 tokens, expected at most the 50 of its vocab_size"),
    ],
)
def test_bad_input_is_one_line(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    files: Path,
    causal: Path,
    what: str,
    arguments: list[str],
    message: str,
) -> None:
    model = spoil(tmp_path / "model", causal, what)
    output = tmp_path / "out"
    command = ["evaluate", model, "--tasks", "piqa", "--data-dir", files, "--output", output, *arguments]
    assert message in fail(capsys, monkeypatch, *command)
    assert not output.exists()


def test_a_missing_field_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, causal: Path
) -> None:
    write_rows(tmp_path / "files", "piqa", [{"goal": "g", "sol1": "a", "label": 0}])
    line = fail(
        capsys, monkeypatch, "evaluate", causal, "--tasks", "piqa", "--data-dir", tmp_path / "files",
        "--output", tmp_path / "out",
    )  # fmt: skip
    assert line.endswith("piqa.jsonl, row 1 has no field 'sol2': it has 'goal', 'sol1', 'label'")


def test_other_things_at_the_output_are_left_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: Path, causal: Path
) -> None:
    (tmp_path / "notes").write_text("mine")
    for name in ("notes", "settings.json"):  # an editor's settings are called so too
        (tmp_path / name).write_text('{"editor.tabSize": 4}')
        line = fail(
            capsys, monkeypatch, "evaluate", causal, "--tasks", "piqa", "--data-dir", files, "--output", tmp_path
        )
        message = "expected a new or empty folder, or that of an earlier call: something else is in it"
        assert line.endswith(f"--output {tmp_path}: {message}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "settings.json"]


@pytest.mark.parametrize("record", ["", '{"task": "pi', "[]", '{"metrics": [1]}', "[" * 100_000])
def test_a_damaged_record_is_named(
    tmp_path: Path,
    files: Path,
    causal: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    record: str,
) -> None:
    folder = evaluate(str(causal), tmp_path / "out", options("piqa", files, "1", limit=2), progress=False)
    path = folder.file("piqa", "1")
    path.write_text(record)
    line = fail(
        capsys, monkeypatch, "evaluate", causal, "--tasks", "piqa", "--data-dir", files, "--limit", 2,
        "--num-fewshot", 0, "--budget", 1, "--output", tmp_path / "out",
    )  # fmt: skip
    assert f"{path} is damaged: " in line
    assert line.endswith("; remove it, and `evaluate` measures it again")


def test_a_full_disk_leaves_no_evaluation_that_nothing_came_of(
    tmp_path: Path, files: Path, causal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("thoughtbubbles.evaluation.evaluate.run_task", full)
    with pytest.raises(OSError, match="No space left"):
        evaluate(str(causal), tmp_path / "new" / "out", options("piqa", files, "1"), progress=False)
    assert not list(tmp_path.iterdir())
    for output in ("/proc/x", tmp_path / "file" / "below"):
        (tmp_path / "file").touch()
        with pytest.raises(InputError, match=f"--output {output}: cannot be written: "):
            evaluate(str(causal), Path(output), options("piqa", files, "1"), progress=False)


def test_the_command_without_the_harness_says_how_to_get_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: Path, causal: Path
) -> None:
    monkeypatch.setattr("thoughtbubbles.evaluation.harness.find_spec", lambda name: None)
    line = fail(
        capsys, monkeypatch, "evaluate", causal, "--tasks", "piqa", "--data-dir", files, "--output", tmp_path / "out"
    )
    assert line.endswith("pip install 'thoughtbubbles[eval]'")
    assert "lm_eval" in sys.modules  # it is there all the same
