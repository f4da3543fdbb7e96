"""The commands and the code of README and guides do what they say."""

import ast
import inspect
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.run import get_args_parser
from typer.testing import CliRunner

from tests.model.test_conversion import released_state_dict
from tests.run_fixtures import sentences
from thoughtbubbles import ThoughtbubblesConfig, ThoughtbubblesForCausalLM
from thoughtbubbles.cli import app
from thoughtbubbles.data.procedural.tasks import TASKS
from thoughtbubbles.data.procedural.vocabulary import word_tokenizer
from thoughtbubbles.data.sources.corpora import resolve_source
from thoughtbubbles.evaluation.benchmarks import BENCHMARKS
from thoughtbubbles.model import accounting
from thoughtbubbles.model.configuration import PRESETS
from thoughtbubbles.recipes.comparison import load_comparison
from thoughtbubbles.recipes.preparation import load_preparation
from thoughtbubbles.recipes.training import load_recipe
from thoughtbubbles.support.metrics import read_metrics

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TRAINING = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
INSPECTION = (ROOT / "docs" / "inspection.md").read_text(encoding="utf-8")
COMPARISON = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
CLUSTER = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
EVALUATION = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
API = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
METHOD = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
SERVING = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
TASK_GUIDE = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
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


@pytest.mark.usefixtures("forked_pool")
def test_the_python_interface_runs_and_prints_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(sentences(24)):
        (tmp_path / "texts" / f"{number:02}.txt").write_text(text)
    torch.save(released_state_dict(), tmp_path / "released.pt")
    monkeypatch.chdir(tmp_path)
    # The released model of the tests has 8 channels.
    code = "\n".join(blocks("python", API)).replace("num_attention_heads=20", "num_attention_heads=2")
    exec(compile(code, "api.md", "exec"), {})
    printed = capfd.readouterr().out
    for value in (
        "[0, 1, 2] 3/2 4/3",
        "torch.Size([2, 24, 1000])",
        "StreamCache(columns=20, rows=2, budget=3/2)",
        ", seeds=1, blocks=4)",
        "152,016,384",
        "[1024, 2048, 2048, 2048]",
    ):
        assert value in printed
        assert value in API
    assert (tmp_path / "runs" / "compared" / "report.html").exists()
    assert ThoughtbubblesConfig.from_pretrained(tmp_path / "runs" / "converted").attenuation == "released"


def table_of(page: str, header: str) -> list[list[str]]:
    """The cells of the rows below a table's header."""
    _, found, below = page.partition(f"\n| {header}|\n")
    assert found
    lines = below.splitlines()[1:]
    rows = lines[: next((i for i, line in enumerate(lines) if not line.startswith("|")), len(lines))]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_fields_of_the_configuration_are_those_that_there_are() -> None:
    found = {name.strip("`"): ast.literal_eval(default) for name, default, _ in table_of(API, "field | default | ")}
    assert found == {name: getattr(ThoughtbubblesConfig, name) for name in found}
    assert list(found) == list(ThoughtbubblesConfig.__annotations__)


def test_presets_of_the_page_are_those_that_there_are() -> None:
    rows = table_of(API, "preset | layers x width | heads | fork layers | vocabulary | longest row | parameters ")
    assert [row[0].strip("`") for row in rows] == list(PRESETS)
    for name, *cells in rows:
        made = ThoughtbubblesConfig.preset(name.strip("`"))
        heads, groups = made.num_attention_heads, made.num_key_value_heads
        assert cells == [
            f"{made.num_hidden_layers} x {made.hidden_size}",
            str(heads) if groups == heads else f"{heads} on {groups}",
            ", ".join(map(str, made.gated_layers)),
            f"{made.vocab_size:,}",
            f"{made.max_position_embeddings:,}",
            f"{accounting.count_parameters(made):,}",
        ]


def test_arguments_of_the_page_are_those_that_forward_takes() -> None:
    named = {name for row in table_of(API, "argument | ") for cell in row for name in re.findall(r"`(\w+)`", cell)}
    taken = inspect.signature(ThoughtbubblesForCausalLM.forward).parameters
    assert named - {"StreamCache", "Streams"} == set(taken) - {"self", "kwargs"}


def test_accounting_of_the_page_is_what_there_is() -> None:
    calls: list[Any] = [ast.parse(row[0].strip("`"), mode="eval").body for row in table_of(API, "function | ")]
    found = {call.func.id: [each.id for each in call.args] for call in calls}
    public = inspect.getmembers(accounting, inspect.isfunction)
    there = {name: list(inspect.signature(each).parameters) for name, each in public if not name.startswith("_")}
    own = {name: each for name, each in there.items() if getattr(accounting, name).__module__ == accounting.__name__}
    assert found == {name: each for name, each in own.items() if name not in ("item_bytes", "largest_micro_batch")}


@pytest.mark.parametrize("page", ["method", "api", "guide"])
def test_what_the_pages_point_to_is_there(page: str) -> None:
    text = {"method": METHOD, "api": API, "guide": GUIDE}[page]
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    assert links
    for link in links:
        path, _, section = link.partition("#")
        target = (ROOT / "docs" / path).resolve() if path else ROOT / "docs" / f"{page}.md"
        assert target.is_file(), link
        if section:
            titles = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert section in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}, link


def test_names_that_the_method_points_to_are_there() -> None:
    sources = re.findall(r"\]\(\.\./(src/[\w/]+\.py)\)((?:[,\s]+(?:class|and)?\s*`\w+`)*)", METHOD)
    named = [(path, name) for path, names in sources for name in re.findall(r"`(\w+)`", names)]
    assert ("src/thoughtbubbles/model/streams.py", "positions") in named
    for path, name in named:
        assert re.search(rf"^ *(class|def) {name}\b", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE), name


def test_the_figure_of_the_method_shows_what_a_forward_did() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "method_figure.py"))
    trace = script["trace"]()
    drawn = {strand.life.stream: strand for strand in script["strands"](trace)}
    assert [strand.life.token for strand in drawn.values() if strand.life.is_root] == list(range(len(trace.tokens)))
    assert any(strand.life.deleted_at is not None for strand in drawn.values())
    for strand in drawn.values():
        assert strand.score  # it passed a block at least
        assert strand.x <= strand.merge_x
        if strand.life.source is not None:
            assert strand.x < strand.source_x == drawn[strand.life.source].x
    figure = script["draw"](trace)
    counts = {f"{streams} streams" for streams in trace.bubble_sizes().sum(1)}
    assert counts <= {text.get_text() for text in figure.axes[0].texts}
    assert script["OUTPUT"] == ROOT / "docs" / "images" / "method.png"
    assert script["OUTPUT"].is_file()


def commands(*pages: str) -> list[list[str]]:
    texts = [block for page in pages for block in blocks("sh", page)]
    lines = [line for block in texts for line in block.replace("\\\n", " ").splitlines()]
    found = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("thoughtbubbles ")]
    return [command for command in found if command != ["--version"]]


@pytest.mark.parametrize(
    "command",
    commands(README, GUIDE, TRAINING, CLUSTER, COMPARISON, EVALUATION, INSPECTION, TASK_GUIDE, SERVING),
    ids=lambda command: command[0],
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


def test_recipes_of_the_guide_take_its_overrides() -> None:
    found = {command[0]: command for command in commands(GUIDE) if command[0] in ("train", "compare")}
    trained, compared = (
        [word for word in found[verb][2:] if "=" in word and not word.startswith("--")] for verb in ("train", "compare")
    )
    recipe = load_recipe(ROOT / found["train"][1], trained)
    comparison = load_comparison(ROOT / found["compare"][1], compared)
    prepared = next(command[1] for command in commands(GUIDE) if command[0] == "prepare")
    assert recipe.data.path == comparison.base["data"]["path"] == prepared
    assert {command[1] for command in commands(GUIDE) if command[0] in ("generate", "inspect", "perplexity")} == {
        recipe.training.output
    }


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


def torchrun_commands() -> list[list[str]]:
    lines = "\n".join(blocks("sh", CLUSTER)).replace("\\\n", " ").splitlines()
    return [shlex.split(line.partition("torchrun ")[2]) for line in lines if "torchrun " in line]


@pytest.mark.parametrize("words", torchrun_commands(), ids=lambda words: words[0])
def test_torchrun_has_the_options_of_the_guide_and_is_given_a_real_recipe(words: list[str]) -> None:
    parsed = get_args_parser().parse_args(["0" if word.startswith("$") else word for word in words])
    assert (parsed.module, parsed.training_script, parsed.training_script_args[0]) == (True, "thoughtbubbles", "train")
    assert load_recipe(ROOT / parsed.training_script_args[1]).training.steps


@pytest.mark.parametrize("text", [text for text in blocks("yaml", TRAINING) if text.startswith("sources:")])
def test_sources_of_the_guide_have_real_keys(tmp_path: Path, text: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    for source in load_preparation(tmp_path / "recipe.yaml").sources:
        assert isinstance(source, dict)
        assert resolve_source(source).template == source["template"]


def test_tasks_of_the_guide_are_those_that_there_are() -> None:
    lines = [line for line in TASK_GUIDE.splitlines() if line.startswith("| `")]
    rows = {cells[1].strip(" `"): cells for line in lines if len(cells := line.split("|")) == 7}
    assert list(rows) == list(TASKS)
    for name, cells in rows.items():
        prompt, answer, most = cells[2].strip(" `"), cells[3].strip(" `"), int(cells[5])
        assert most == TASKS[name].max_difficulty
        tokenizer = word_tokenizer(TASKS[name].words)
        assert tokenizer.unk_token_id not in tokenizer.encode(prompt + answer)
        assert f"`{prompt}` is answered by `{answer}`" in str(sys.modules[TASKS[name].make.__module__].__doc__)


@pytest.mark.parametrize("command", [each for each in commands(TASK_GUIDE) if each[0] == "train"], ids=lambda c: c[1])
def test_task_commands_override_real_keys(command: list[str]) -> None:
    recipe = load_recipe(ROOT / command[1], command[2:])
    assert recipe.training.output in TASK_GUIDE


@pytest.mark.parametrize("text", [text for text in blocks("yaml", TRAINING) if not text.startswith("sources:")])
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


# What a process reads at its start where this folder is on its path: every recipe is cut short.
FEW_STEPS = """
import importlib.abc
import importlib.util
import sys

SHORT = {"training": {"steps": 3, "eval_every": 2}, "data": {"eval_blocks": 2, "final_eval_blocks": 2}}


class FewSteps(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "thoughtbubbles.recipes.training":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_shorten(module):
            execute(module)
            parse = module.parse_recipe
            module.parse_recipe = lambda content: parse({**content, **{
                section: {**content.get(section, {}), **values} for section, values in SHORT.items()
            }})

        spec.loader.exec_module = execute_and_shorten
        return spec


sys.meta_path.insert(0, FewSteps())
"""


@pytest.mark.long
def test_the_blocks_of_the_readme_run_in_order(tmp_path: Path) -> None:
    """In a fresh copy, without a network; shortened through the environment alone."""
    root, few = tmp_path / "copy", tmp_path / "few"
    unwanted = shutil.ignore_patterns(".*", "runs", "kit", "__pycache__")
    shutil.copytree(ROOT, root, ignore=unwanted)
    (root / ".venv").symlink_to(sys.prefix)
    few.mkdir()
    (few / "sitecustomize.py").write_text(FEW_STEPS)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{few}{os.pathsep}{root / 'src'}",
        "MAKEFLAGS": "READY=",  # the environment is there
    }
    ran = []
    for block in blocks("sh"):
        lines = [line for line in block.splitlines() if line != "make test    # the tests"]
        if lines[0] == "# with a network":
            continue
        page = lines[0].startswith(("thoughtbubbles demo", "thoughtbubbles serve"))
        shell = ["timeout", "60"] if page else []
        done = subprocess.run(
            [*shell, "bash", "-euo", "pipefail", "-c", "\n".join(lines)],
            cwd=root,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == (124 if page else 0), f"{block}\n{done.stdout}\n{done.stderr}"
        ran.append(done.stdout)
    assert "What this does not show" in ran[0]
    assert "thoughtbubbles" in ran[1]
