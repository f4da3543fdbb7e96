"""The command as a user runs it, in processes of its own where the exit code matters."""

import json
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from tests.run_fixtures import RECIPE
from thoughtbubbles.cli import app, main
from thoughtbubbles.data import PreparedData
from thoughtbubbles.data.tokenizer import save_tokenizer, train_tokenizer
from thoughtbubbles.recipes.options import PlanOptions, Preparation
from thoughtbubbles.support.errors import InputError

COMMAND = (sys.executable, "-c", "from thoughtbubbles_command import main; main()")
COMMANDS = (
    *("prepare", "train", "compare", "perplexity", "generate", "evaluate", "inspect", "plan", "demo"),
    *("make-task", "exact-match", "serve"),
)


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def fail(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    """Standard error of a call that must exit with 2 and one line."""
    monkeypatch.setattr(sys, "argv", ["thoughtbubbles", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "━" not in line]
    assert len(lines) == 1, lines
    return lines[0]


def test_help_and_version_answer_without_torch() -> None:
    """Whatever the process is called: it is the entry point that tells the package who imports it."""
    code = """
import sys
from thoughtbubbles_command import main

for arguments in [[], ["--version"], ["--help"], *([command, "--help"] for command in sys.argv[1:])]:
    sys.argv = ["any-name", *arguments]
    try:
        main()
    except SystemExit as end:
        assert end.code == (0 if arguments else 2), (arguments, end.code)
heavy = {"torch", "transformers", "datasets", "matplotlib", "numpy", "pyarrow"} & set(sys.modules)
assert not heavy, heavy
"""
    command = [sys.executable, "-c", code, *COMMANDS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(f" {command} [OPTIONS]" in done.stdout for command in COMMANDS)


@pytest.mark.parametrize(("command", "section"), [("prepare", Preparation), ("plan", PlanOptions)])
def test_every_field_is_an_option_with_its_default(
    command: str, section: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    text = " ".join(run(command, "--help").split())
    for each in fields(section):
        if each.name != "sources":
            assert f"--{each.name.replace('_', '-')} " in text
        if isinstance(each.default, int | float):
            assert f"{each.metadata['help']} [default: {each.default}]" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(command: str) -> None:
    assert "--help" in run(command, "--help")


def test_the_whole_path(tmp_path: Path) -> None:
    text = tmp_path / "corpus"
    text.mkdir()
    for index in range(12):
        (text / f"{index}.txt").write_text(f"document {index}: " + "forks and roots and gates " * (20 + index))
    data, recipe = tmp_path / "data", tmp_path / "recipe.yaml"
    out = run("prepare", data, text, "--vocab-size", 280, "--block-size", 16, "--quiet")
    assert "train" in out
    assert "validation" in out
    recipe.write_text(RECIPE.format(data=data, output=tmp_path / "run"))
    assert "validation loss" in run("train", recipe, "training.steps=4", "training.eval_every=2", "--quiet")
    assert "perplexity" in run("perplexity", tmp_path / "run", data, "--budget", "2")
    assert run("generate", tmp_path / "run", "--prompt", "forks", "--max-new-tokens", "4").startswith("forks")


def test_perplexity_prints_json(tiny_run: Path, tiny_data: PreparedData) -> None:
    out = run("perplexity", tiny_run, tiny_data.path, "--blocks", 3, "--mode", "prefix", "--json")
    (result,) = json.loads(out)
    assert (result["mode"], result["blocks"], result["budget"], result["leaks"]) == ("prefix", 3, "3/2", False)


def test_perplexity_of_topk_prints_both_modes_and_the_leak(tmp_path: Path, tiny_data: PreparedData) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(data=tiny_data.path, output=tmp_path / "run"))
    out = run("train", recipe, "model.routing=topk", "training.steps=2", "--quiet")
    assert "leaks" in out
    out = run("perplexity", tmp_path / "run", tiny_data.path, "--blocks", 4)
    assert [line.split()[0] for line in out.splitlines()] == ["blockwise", "per", "leaks:", "prefix", "per"]


def test_perplexity_reads_a_text_file(tmp_path: Path, tiny_run: Path) -> None:
    (tmp_path / "text.txt").write_text("the gate of the root " * 30)
    out = run("perplexity", tiny_run, tmp_path / "text.txt", "--json")
    (result,) = json.loads(out)
    assert result["blocks"] > 5
    assert 1 < result["byte_perplexity"] < result["perplexity"] < result["word_perplexity"]


def test_plan_prints_tables(tiny_run: Path) -> None:
    out = run("plan", tiny_run, "--memory", "1GB", "--device-flops", "1e12", "--mfu", 0.3, "--tokens", "1e6")
    for text in ("Parameters", "layers 1 to 2", "tokens a second", "Run: 3,907 steps of 16 rows", "1.00 GB: a micro"):
        assert text in out


def test_plan_prints_json(tmp_path: Path, tiny_data: PreparedData) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(data=tiny_data.path, output=tmp_path / "run"))
    plan = json.loads(run("plan", recipe, "--budget", "2", "--batch-size", 8, "--precision", "float32", "--json"))
    assert (plan["budget"], plan["batch_size"], plan["precision"], plan["length"]) == ("2", 8, "float32", 16)
    assert plan["run"]["tokens"] == 12 * 8 * 16
    assert plan["model"]["streams_per_token"] == [1.0, 2.0, 2.0]
    assert plan["fit"] is None


def test_generate_repeats_for_a_seed(tiny_run: Path) -> None:
    arguments = ("generate", tiny_run, "--prompt", "the", "--max-new-tokens", 8, "--temperature", 1)
    assert run(*arguments, "--seed", 5) == run(*arguments, "--seed", 5)


def test_generate_reads_a_file_and_standard_input(tmp_path: Path, tiny_run: Path) -> None:
    (tmp_path / "prompt.txt").write_text("the root")
    common = ("generate", str(tiny_run), "--max-new-tokens", "4", "--temperature", "0")
    texts = [run(*common, "--prompt", "the root"), run(*common, "--file", tmp_path / "prompt.txt")]
    texts.append(CliRunner().invoke(app, common, input="the root").stdout)
    assert texts[0].startswith("the root")
    assert texts[0] == texts[1] == texts[2]


def test_generate_asks_until_the_input_ends(tiny_run: Path) -> None:
    arguments = ["generate", str(tiny_run), "--interactive", "--max-new-tokens", "2"]
    result = CliRunner().invoke(app, arguments, input="the\nroot\n", catch_exceptions=False)
    assert result.exit_code == 0
    assert result.stdout.count("> ") == 3


def test_a_prompt_that_does_not_fit_ends_no_session_at_a_terminal(
    tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["generate", str(tiny_run), "--interactive", "--max-new-tokens", "2"]
    typed = "the\n" + "zq " * 20 + "\nroot\n"
    piped = CliRunner().invoke(app, arguments, input=typed)
    assert isinstance(piped.exception, InputError)
    assert piped.stdout.count("> ") == 2
    monkeypatch.setattr(
        "thoughtbubbles.cli.generation.sys", SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: True))
    )
    result = CliRunner().invoke(app, arguments, input=typed, catch_exceptions=False)
    assert result.exit_code == 0
    assert result.stdout.count("> ") == 4
    assert "tokens: expected at most 15" in result.stderr


@pytest.mark.parametrize("option", [[], ["--interactive"]], ids=str)
def test_standard_input_that_is_no_text(tiny_run: Path, option: list[str]) -> None:
    result = CliRunner().invoke(app, ["generate", str(tiny_run), *option], input=b"the \xff\n")
    assert isinstance(result.exception, InputError)
    assert "standard input is not UTF-8: " in str(result.exception)


def test_generate_prints_json_with_bubbles(tiny_run: Path) -> None:
    made = json.loads(run("generate", tiny_run, "--prompt", "the", "--json", "--show-bubbles", "--budget", "2"))
    assert made["prompt"] == "the"
    assert len(made["bubbles"]) == len(made["ids"])
    assert max(made["bubbles"]) > 1


def test_generate_marks_bubbles(tiny_run: Path) -> None:
    assert "⟨" in run("generate", tiny_run, "--prompt", "the", "--show-bubbles", "--budget", "2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "{run}", "--prompt", "a", "--interactive"], "expected at most one of them"),
        (["generate", "{run}", "--file", "{tmp}/none.txt"], "none.txt"),
        (["generate", "{run}", "--prompt", "zq zq zq zq zq zq zq zq zq zq"], "expected at most 15"),
        (["prepare", "{tmp}/out", "{tmp}/nowhere"], "nowhere"),
        (["prepare", "{tmp}/out", ""], "source '' does not exist"),
        (["prepare", "{tmp}/out", "--vocab-size", "5"], "5"),
        (["prepare", "{tmp}/out", "{tmp}/rows.jsonl", "--text-field", "body"], "no field 'body': it has 'text'"),
        (["prepare", "{tmp}/out", "{tmp}/empty.txt"], "has no documents"),
        (["prepare", "{tmp}/out", "{tmp}/rows.jsonl", "--quiet"], "too few for one block of 512"),
        (["prepare", "{tmp}/out", "{tmp}/rows.jsonl", "--tokenizer", "{tmp}"], "cannot be loaded by AutoTokenizer"),
        (["prepare", "{tmp}/out", "hf:{tmp}?splt=x"], "unknown key 'splt', expected some of config, split"),
        (["prepare", "{tmp}/out", "--recipe", "{tmp}/tiny.yaml"], "unknown key"),
        (["train", "{tmp}/none.yaml"], "none.yaml: no such file"),
        (["train", "{tmp}/tiny.yaml", "training.stepps=3"], "did you mean training.steps?"),
        (["train", "{tmp}/tiny.yaml", "model.vocab_size=100"], "model.vocab_size=100: expected at least 300"),
        (["train", "{tmp}/tiny.yaml", "data.path={tmp}/nowhere"], "nowhere does not exist"),
        (["train", "{tmp}/tiny.yaml", "training.output={run}", "training.steps=13"], "training.steps: 12 is now 13"),
        (["train", "{tmp}/tiny.yaml", "task=sft"], "unknown key data.path"),
        (["train", "{tmp}/tiny.yaml", "training.report_to=[wandb]"], "pip install wandb"),
        (["perplexity", "{stranger}", "{data}"], "tokenised with another tokenizer than that of the model"),
        (["perplexity", "{tmp}", "{data}"], "expected a folder with config.json"),
        (["perplexity", "{run}", "{tmp}"], "manifest.json"),
        (["perplexity", "{run}", "{data}", "--budget", "0.5"], "budget='0.5': expected"),
        (["perplexity", "{run}", "{data}", "--mode", "x"], "mode='x': expected one of blockwise, prefix"),
        (["generate", "{run}", "--budget", "lots"], "budget='lots': expected"),
        (["generate", "{tmp}"], "expected a folder with config.json"),
        (["plan", "155m"], "config '155m': expected a preset (nano, micro, mini, 150m,"),
        (["plan", "{tmp}"], "expected a folder with config.json"),
        (["plan", "{tmp}/none.yaml"], "none.yaml: no such file"),
        (["plan", "150m", "--memory", "lots"], "memory='lots': expected an amount such as 80GB"),
        (["plan", "150m", "--budget", "0.5"], "budget='0.5': expected"),
        (["plan", "150m", "--mfu", "0.5"], "mfu=0.5: expected device_flops with it"),
        (["plan", "{run}", "--length", "17"], "length=17: expected at most 16"),
        (["plan", "{tmp}/tiny.yaml", "--batch-size", "0"], "batch_size=0: expected more than 0"),
    ],
    ids=lambda value: "-".join(value)[:40] if isinstance(value, list) else None,
)
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path,
    tiny_run: Path,
    tiny_data: PreparedData,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{"text": "three"}\n')
    (tmp_path / "empty.txt").touch()
    (tmp_path / "tiny.yaml").write_text(RECIPE.format(data=tiny_data.path, output=tmp_path / "out"))
    stranger = tmp_path / "stranger"
    if "{stranger}" in arguments:
        shutil.copytree(tiny_run / "model", stranger)
        save_tokenizer(train_tokenizer(["another text"], 257), stranger)
    filled = [part.format(tmp=tmp_path, run=tiny_run, data=tiny_data.path, stranger=stranger) for part in arguments]
    assert message in fail(capsys, monkeypatch, *filled)
    assert not (tmp_path / "out").exists()


def test_help_recipe_describes_every_section() -> None:
    text = run("train", "--help-recipe")
    for section in ("model:", "data (task: pretrain):", "data (task: sft):", "training:"):
        assert f"\n{section}" in text


def test_a_signal_ends_the_module_run_as_the_command_with_exit_code_0_and_a_checkpoint(
    tmp_path: Path, tiny_data: PreparedData
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(data=tiny_data.path, output=tmp_path / "run"))
    command = [sys.executable, "-m", "thoughtbubbles", "train", str(recipe), "training.steps=100000"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if "step " in line:
                process.send_signal(signal.SIGTERM)
                break
        messages = process.stderr.read()
    assert process.returncode == 0, messages
    assert re.search(
        r"^thoughtbubbles: stopped by SIGTERM after step \d+, saved; start again to go on$", messages, re.M
    )
    assert list((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))


def test_a_run_that_cannot_go_on_is_one_line_and_exit_code_1(
    tmp_path: Path, tiny_data: PreparedData, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(data=tiny_data.path, output=tmp_path / "run"))
    monkeypatch.setattr(sys, "argv", ["thoughtbubbles", "train", "--quiet", str(recipe), "training.learning_rate=1e30"])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("thoughtbubbles: step ")
