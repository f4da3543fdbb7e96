"""Every recipe of recipes/paper, shrunk to ten steps of a tiny model, on data that those of recipes/data prepare."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from tests.evaluation.benchmark_files import lines, problems, write_rows
from tests.run_fixtures import sentences
from thoughtbubbles.comparison.measuring import measure_run
from thoughtbubbles.comparison.runs import RunPlanner
from thoughtbubbles.data import load_preparation, prepare
from thoughtbubbles.data.tokenizer import save_tokenizer, train_tokenizer
from thoughtbubbles.evaluation.during_training import task_scores
from thoughtbubbles.model.loading import load_config
from thoughtbubbles.recipes.comparison import load_comparison
from thoughtbubbles.recipes.training import load_recipe
from thoughtbubbles.support.metrics import read_metrics
from thoughtbubbles.training.folder import RunSummary
from thoughtbubbles.training.optimizer import rate_of_step
from thoughtbubbles.training.run import train

RECIPES = Path(__file__).parents[2] / "recipes"
PAPER = RECIPES / "paper"
CHAIN = ("1.9b-fork", "midtraining", "gsm8k")
NAMES = sorted(path.stem for path in PAPER.glob("*.yaml"))
COMPARISONS = [name for name in NAMES if name.endswith(("-openwebtext", "-pes2o"))]
ALONE = [name for name in NAMES if name not in (*CHAIN, *COMPARISONS)]
BLOCK = 64
SHAPE = ("hidden_size=16", "num_hidden_layers=4", "num_attention_heads=2", "fork_layers=[1,2]")
SHRUNK = (
    *("training.steps=10", "training.batch_size=4", "training.micro_batch_size=2", "training.log_every=1"),
    *("training.eval_every=5", "training.save_every=5", "data.eval_blocks=2", "data.final_eval_blocks=4"),
)
NEW = (*(f"model.{each}" for each in SHAPE), f"model.max_position_embeddings={BLOCK}")
COMPARED = ("evaluation.blocks=4", "evaluation.prefix_blocks=2", "evaluation.prefix_positions=2")
FOLDERS = {
    **{name: name for name in ("openwebtext", "pes2o", "fineweb", "gsm8k-aug", "gsm8k-aug-usual", "mmlu", "smoltalk")},
    **{"pes2o-12b": "pes2o", "fineweb-held-out": "fineweb", "pes2o-held-out": "pes2o"},
}
"""Prepared folders that the recipes name, and the recipe of each."""


def rows_of(name: str) -> list[dict[str, Any]]:
    """Rows with the fields of a dataset of the hub."""
    asked = [f"{line}?" for line in lines(30)]
    if name.startswith("gsm8k-aug"):
        return [
            {"question": text, "steps": [f"<<{i}+1={i + 1}>>"], "answer": str(i + 1)} for i, text in enumerate(asked)
        ]
    if name == "mmlu":
        return [{"train": {"question": text, "choices": list("wxyz"), "answer": i % 4}} for i, text in enumerate(asked)]
    if name == "smoltalk":
        turns = [("user", "Hi."), ("assistant", "Ho.")]
        return [{"messages": [{"role": who, "content": f"{text} {said}"} for who, said in turns]} for text in asked]
    return [{"text": text} for text in sentences(30)]


def write_hub_folder(folder: Path, source: dict[str, Any], rows: list[dict[str, Any]]) -> Path:
    """A folder laid out like a dataset of the hub, with the configuration and the split that a source names."""
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    files = [{"split": source["split"], "path": "rows.parquet"}]
    described = {"configs": [{"config_name": source.get("config", "default"), "data_files": files}]}
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(described)}---\n")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which all is prepared that the recipes name."""
    root = tmp_path_factory.mktemp("paper")
    texts = [
        str(value) for name in ("gsm8k-aug", "smoltalk", "fineweb") for row in rows_of(name) for value in row.values()
    ]
    save_tokenizer(train_tokenizer(texts, 300), root / "tokenizer")
    for name, recipe in FOLDERS.items():
        options = load_preparation(RECIPES / "data" / f"{recipe}.yaml")
        (source,) = options.sources
        assert isinstance(source, dict)
        hub = write_hub_folder(root / "hub" / name, source, rows_of(recipe))
        local = {key: value for key, value in source.items() if key != "data_files"}
        prepare(
            root / "runs" / name,
            [{**local, "hub": str(hub)}],
            tokenizer=str(root / "tokenizer"),
            block_size=BLOCK,
            packing=options.packing,
            validation_fraction=0.2,
            progress=False,
        )
    write_rows(root / "evals", "gsm8k-test", problems(4))
    return root


def check_run(folder: Path, recipe_path: Path, *overrides: str) -> None:
    """Ten steps were taken at the rates of the recipe's schedule, and the model is what the recipe says."""
    recipe = load_recipe(recipe_path, overrides)
    summary = RunSummary.read(folder)
    assert summary.steps == 10
    rates = {row["step"]: row["learning_rate"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row}
    peak = recipe.training.learning_rate
    assert rates == {step: pytest.approx(peak * rate_of_step(recipe.training, step)) for step in range(1, 11)}
    config = load_config(str(folder))
    for field, value in recipe.model.items():
        assert field in ("preset", "pretrained") or getattr(config, field) == value


@pytest.mark.long
@pytest.mark.parametrize("name", ALONE)
def test_a_run_of_the_largest(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    overrides = (*SHRUNK, *NEW)
    if name == "1.9b-streamed":
        sources = {f"hf:{place}/hub/fineweb?config=CC-MAIN-2022-21": 0.7, f"hf:{place}/hub/pes2o": 0.3}
        overrides = (*overrides, f"data.stream={sources}", "data.lanes=2", "data.shuffle_blocks=4")
    train(load_recipe(PAPER / f"{name}.yaml", overrides), progress=False)
    check_run(place / "runs" / "paper" / name, PAPER / f"{name}.yaml", *overrides)


@pytest.mark.long
def test_pretraining_midtraining_and_fine_tuning_go_on_from_each_other(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    tasks = ("training.eval_tasks_dir=evals", "training.eval_tasks_documents=2")
    more = {"1.9b-fork": NEW, "midtraining": (), "gsm8k": tasks}
    for name in CHAIN:
        overrides: tuple[str, ...] = (*SHRUNK, *more[name])
        recipe = load_recipe(PAPER / f"{name}.yaml", overrides)
        train(recipe, callbacks=task_scores(recipe))
        check_run(place / "runs" / "paper" / name, PAPER / f"{name}.yaml", *overrides)
        config = load_config(str(place / "runs" / "paper" / name))
        assert (config.hidden_act, config.fork_embedding_init) == ("gelu_pytorch_tanh", "normal")
        assert (config.routing, config.merge, config.fork_layers) == ("causal", "residual", [1, 2])
    said = capsys.readouterr().err
    for source in CHAIN[:-1]:
        assert f"training.moments_from=runs/paper/{source}: moments of 59 weights after step 10\n" in said
    scored = (place / "runs" / "paper" / "gsm8k" / "tasks.jsonl").read_text()
    assert scored.count('"gsm8k_bare/authors/exact_match"') == 2
    usual = ("data.path=runs/gsm8k-aug-usual", "training.eval_tasks=null", "training.output=runs/usual")
    train(load_recipe(PAPER / "gsm8k.yaml", (*SHRUNK, *usual)), progress=False)
    check_run(place / "runs" / "usual", PAPER / "gsm8k.yaml", *SHRUNK, *usual)
    # Midtraining drew from every corpus, of which three have rows of their own length.
    evaluated = read_metrics(place / "runs" / "paper" / "midtraining" / "metrics.jsonl")[-1]
    assert {
        f"eval_loss/{each}" for each in ("fineweb", "pes2o-12b", "gsm8k-aug", "mmlu", "smoltalk")
    } <= evaluated.keys()
    assert evaluated["tokens"] < 10 * 4 * BLOCK


@pytest.mark.long
@pytest.mark.parametrize("name", COMPARISONS)
def test_every_variant_of_a_comparison(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    torch.manual_seed(0)
    comparison = load_comparison(PAPER / f"{name}.yaml", (*SHRUNK, *NEW, *COMPARED))
    planner = RunPlanner(comparison)
    runs = planner.runs({})
    assert [run.variant for run in runs] == list(comparison.variants)
    for run in runs:
        train(run.recipe, progress=False)
        found = measure_run(run.folder, planner.data, comparison.evaluation)
        config = load_config(str(run.folder))
        assert config.merge == ("root" if config.routing == "copy" else "probability")
        assert RunSummary.read(run.folder).steps == 10
        assert len(found.losses[found.own]) == 4
