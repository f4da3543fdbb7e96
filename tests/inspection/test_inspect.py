"""`thoughtbubbles inspect` as a user runs it."""

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from tests.cli.test_commands import fail, run
from tests.run_fixtures import RECIPE
from thoughtbubbles import BubbleTrace
from thoughtbubbles.cli import app
from thoughtbubbles.data import PreparedData
from thoughtbubbles.inspection.bubbles import shade_bubbles
from thoughtbubbles.recipes.training import load_recipe
from thoughtbubbles.training.run import train

pytestmark = pytest.mark.usefixtures("blank_figures")
TEXT = "the root of"


@pytest.fixture(scope="module")
def dense_run(tmp_path_factory: pytest.TempPathFactory, tiny_data: PreparedData) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(data=tiny_data.path, output=folder / "run"))
    train(load_recipe(recipe, ["model.routing=none", "training.steps=2"]), progress=False)
    return folder / "run"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def pictures(*titles: str) -> set[str]:
    return {f"{title}.{kind}" for title in titles for kind in ("png", "svg")}


def test_a_text_is_marked_and_drawn(tmp_path: Path, tiny_run: Path) -> None:
    out = run("inspect", tiny_run, "--text", TEXT, "--budget", 2, "--output", tmp_path / "new" / "out")
    assert "⟨" in out
    assert "budget 2" in out
    assert "changes its surprisal most at token" in out
    folder = tmp_path / "new" / "out"
    assert names(folder) == {"trace.json", "trace.parquet"} | pictures("streams", "scores", "tree", "ablation")
    trace = BubbleTrace.load(folder / "trace.parquet")
    content = json.loads((folder / "trace.json").read_text())
    assert content.items() >= trace.to_dict().items()
    assert "".join(trace.tokens[1:]) == TEXT


def test_a_text_as_json(tiny_run: Path) -> None:
    content = json.loads(run("inspect", tiny_run, "--text", TEXT, "--budget", 2, "--json"))
    assert len(content["entropy"]) == len(content["tokens"]) == len(content["surprisal"]) + 1
    assert content["ablation"]["tokens"]
    assert content["tokens_cut"] == 0
    assert content["streams"]["log_score"][0] == 0


def test_a_long_text_is_cut_with_a_message(tiny_run: Path) -> None:
    assert "causal, budget 1.5: " in run("inspect", tiny_run, "--text", "the root of " * 30)
    content = json.loads(run("inspect", tiny_run, "--text", "the root of " * 30, "--json"))
    assert len(content["tokens"]) == 16
    assert content["tokens_cut"] > 30


def test_the_message_of_a_cut_names_both_lengths(tiny_run: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", str(tiny_run), "--text", "zq " * 40, "--json"])
    assert re.search(r"text of 1\d\d tokens: cut to the first 16, all that fit", result.stderr)
    assert len(json.loads(result.stdout)["tokens"]) == 16


def test_an_empty_text_is_its_separator(tiny_run: Path) -> None:
    assert len(json.loads(run("inspect", tiny_run, "--text", "", "--json"))["tokens"]) == 1
    assert "streams per token" in run("inspect", tiny_run, "--text", "")


def test_a_corpus_is_summed_up_and_drawn(
    tmp_path: Path, tiny_run: Path, tiny_data: PreparedData, dense_run: Path
) -> None:
    arguments = ("inspect", tiny_run, "--data", tiny_data.path, "--blocks", 6, "--reference", dense_run)
    out = run(*arguments, "--output", tmp_path)
    for part in ("6 blocks", "loss of the reference model", "streams in block 2", "first piece", "0 tokens before"):
        assert part in out
    assert names(tmp_path) == {"statistics.json"} | pictures("uncertainty", "overview", "ablation")
    content = json.loads((tmp_path / "statistics.json").read_text())
    assert content == json.loads(run(*arguments, "--json"))
    assert (content["blocks"], content["routing"]) == (6, "causal")


def test_a_dense_model_can_be_inspected(tmp_path: Path, dense_run: Path, tiny_data: PreparedData) -> None:
    run("inspect", dense_run, "--text", TEXT, "--output", tmp_path / "text")
    assert names(tmp_path / "text") == {"trace.json", "trace.parquet"} | pictures("streams", "scores", "tree")
    run("inspect", dense_run, "--data", tiny_data.path, "--blocks", 2, "--output", tmp_path / "data")
    assert names(tmp_path / "data") == {"statistics.json"} | pictures("uncertainty", "overview")


def test_terminals_show_shades_and_a_legend() -> None:
    text = shade_bubbles([" a", "b\n", "\n", "c"], [1, 3, 3, 9])
    assert text.plain == " ab\n\nc\n\nstreams of the token:  1  3  9 "
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans if span.style}
    assert set(styles) == {"b", "c", " 3 ", " 9 "}
    assert styles["b"] == styles[" 3 "] != styles["c"]
    shown = io.StringIO()
    Console(file=shown, force_terminal=True, color_system="256").print(text)
    assert "\x1b[30;48;5;153mb" in shown.getvalue()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--text, --data: expected exactly one"),
        (["--text", "a", "--data", "{data}"], "--text, --data: expected exactly one"),
        (["--text", "a", "--blocks", "3"], "--blocks=3: expected it with --data alone"),
        (["--text", "a", "--reference", "{run}"], "expected it with --data alone"),
        (["--data", "{data}", "--token", "2"], "--token=2: expected it with --text alone"),
        (["--text", "the", "--token", "99"], "token 99: expected one from 0 to"),
        (["--text", "a", "--budget", "x"], "budget='x': expected"),
        (["--data", "{tmp}"], "manifest.json"),
        (["--data", "{data}", "--reference", "{run}"], "routing is causal, expected a dense model"),
        (["--data", "{data}", "--reference", "{tmp}"], "expected a folder with config.json"),
        (["--text", "a", "--output", "{tmp}/file"], "expected a folder, it is a file"),
    ],
)
def test_bad_input(
    tmp_path: Path,
    tiny_run: Path,
    tiny_data: PreparedData,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    (tmp_path / "file").touch()
    filled = [part.format(tmp=tmp_path, run=tiny_run, data=tiny_data.path) for part in arguments]
    assert message in fail(capsys, monkeypatch, "inspect", tiny_run, *filled)
