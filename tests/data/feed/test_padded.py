"""Padded folders, a document a row: prepared, mixed with blocks, trained on, and refused where blocks are needed."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tests.comparison.conftest import write_recipe
from tests.helpers import tiny_model
from tests.run_fixtures import BLOCK, sentences, tiny_recipe
from tests.training.test_run import Kill, comparable, train_with
from thoughtbubbles.cli import app
from thoughtbubbles.comparison.measuring import measure_run
from thoughtbubbles.comparison.runs import RunPlanner
from thoughtbubbles.data import DataError, PreparedData, load_prepared, prepare
from thoughtbubbles.data.feed.blocks import collate_blocks
from thoughtbubbles.data.feed.loading import load_run_data
from thoughtbubbles.model.accounting import training_flops
from thoughtbubbles.model.loading import load_model
from thoughtbubbles.model.loss import IGNORE_INDEX
from thoughtbubbles.recipes.comparison import load_comparison
from thoughtbubbles.support.metrics import read_metrics
from thoughtbubbles.support.sampling import spread
from thoughtbubbles.training.configuration import build_config
from thoughtbubbles.training.meter import Meter
from thoughtbubbles.training.run import train


def texts() -> list[str]:
    """Of 1 to 24 words."""
    words = " ".join(sentences(6)).split()
    return [" ".join([f"{number}:", *words[number : number + number % 24]]) for number in range(60)]


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory, tiny_data: PreparedData) -> PreparedData:
    """A text a row, with the tokenizer and the blocks of the tiny data."""
    root = tmp_path_factory.mktemp("padded")
    (root / "texts").mkdir()
    for number, text in enumerate(texts()):
        (root / "texts" / f"{number:02}.txt").write_text(text)
    tokenizer, output = str(tiny_data.path / "tokenizer"), root / "out"
    options = {"tokenizer": tokenizer, "block_size": BLOCK, "validation_fraction": 0.2, "packing": "padded"}
    prepare(output, [str(root / "texts")], **options, progress=False)
    return load_prepared(output)


def ids(data: PreparedData, text: str) -> list[int]:
    """The row of a text: it begins with a separator unless it is too long, and ends with the end."""
    tokenizer = data.tokenizer()
    whole = [tokenizer.eos_token_id, *tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    return whole[-BLOCK:]


def test_each_document_has_a_row(padded: PreparedData) -> None:
    rows = [row["input_ids"] for split in (padded.train, padded.validation) for row in split]
    assert sorted(row.tolist() for row in rows) == sorted(ids(padded, text) for text in texts())
    assert {len(row) for row in rows} == set(range(min(map(len, rows)), BLOCK + 1))
    assert rows[0].dtype == torch.int64
    manifest, whole = padded.manifest, [len(padded.tokenizer().encode(text)) for text in texts()]
    assert (manifest.packing, manifest.train.blocks, manifest.validation.blocks) == ("padded", 48, 12)
    assert manifest.train.tokens + manifest.validation.tokens == sum(whole) + 60
    dropped = sum(max(0, length + 2 - BLOCK) for length in whole)
    assert dropped > 0
    assert manifest.remarks() == [
        f"{dropped} tokens are left out: the beginnings of documents that are longer than a block"
    ]


def test_lengths_are_those_of_the_rows(padded: PreparedData, tiny_data: PreparedData) -> None:
    assert padded.train_lengths().tolist() == [len(row["input_ids"]) for row in padded.train]
    assert padded.train_lengths()[:3].tolist() == [len(row) for row in padded.train[:3]["input_ids"]]
    assert tiny_data.train_lengths().tolist() == [BLOCK] * len(tiny_data.train)


def test_an_unknown_packing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="packing is 'loose': expected packed or padded"):
        prepare(tmp_path / "out", ["python-stdlib"], packing="loose")


def test_a_batch_is_padded_on_the_right_and_masked(padded: PreparedData) -> None:
    rows = [{"input_ids": torch.tensor(row)} for row in ([5, 6, 7], [8, 9])]
    batch = collate_blocks(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch["labels"].tolist() == [[IGNORE_INDEX, 6, 7], [IGNORE_INDEX, 9, IGNORE_INDEX]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert collate_blocks(rows[:1]).keys() == {"input_ids", "labels"}


def test_a_batch_has_the_loss_of_its_rows_alone(padded: PreparedData) -> None:
    model, rows = tiny_model(vocab_size=padded.manifest.vocab_size).double(), [padded.train[i] for i in range(6)]
    batch = collate_blocks(rows)
    assert "attention_mask" in batch
    targets = sum(len(row["input_ids"]) - 1 for row in rows)
    alone = sum(model(**collate_blocks([row]), num_items_in_batch=targets).loss for row in rows)
    assert model(**batch, num_items_in_batch=targets).loss.item() == pytest.approx(alone.item(), abs=1e-9)


def test_a_run_on_blocks_and_rows_counts_real_tokens_and_resumes(
    tmp_path: Path, tiny_data: PreparedData, padded: PreparedData
) -> None:
    mixture = f"data.mixture={{{tiny_data.path}: 0.5, {padded.path}: 0.5}}"
    recipe = tiny_recipe(tmp_path, tiny_data.path, "data.path=null", mixture, "training.micro_batch_size=2")
    data = load_run_data(recipe, progress=False)
    lengths = [len(data.samples[index]["input_ids"]) for index in range(48)]
    assert lengths == [data.samples.length(index) for index in range(48)]
    assert BLOCK in lengths
    assert min(lengths) < BLOCK
    meter = Meter(recipe, config := build_config(recipe, data), data.samples, 2)
    assert meter.tokens(12) == sum(lengths)
    longest = [max(pair) for pair in zip(lengths[::2], lengths[1::2], strict=True)]
    assert meter.flops(12) == sum(2 * training_flops(config, length, None) for length in longest)
    train(recipe, progress=False)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert rows[-1]["tokens"] == sum(lengths)
    recipe.training.output = str(tmp_path / "again")
    with pytest.raises(KeyboardInterrupt):
        train_with(recipe, Kill(at=7))
    train(recipe, progress=False)
    assert comparable(tmp_path / "again") == comparable(tmp_path / "run")
    names = {f"eval_loss/{corpus.path.name}" for corpus in (tiny_data, padded)}
    assert names <= {name for row in rows for name in row}


@pytest.mark.parametrize("compile_", ["blocks", "whole"])
def test_compiling_wants_blocks(tmp_path: Path, padded: PreparedData, compile_: str) -> None:
    message = rf"training.compile={compile_}: .*: its documents have a row each \(packing: padded\), expected packed"
    with pytest.raises(DataError, match=message):
        load_run_data(tiny_recipe(tmp_path, padded.path, f"training.compile={compile_}"), progress=False)


def test_what_reads_blocks_refuses_rows(tmp_path: Path, tiny_run: Path, padded: PreparedData) -> None:
    path = tmp_path / "recipe.yaml"
    stream = f"data: {{stream: {{texts: 1}}, validation: {{{padded.path}: 1}}}}"
    path.write_text(f"{stream}\ntraining: {{output: {tmp_path}/run, steps: 2}}\n")
    for what, arguments in (
        ("data.validation:", ["train", str(path), "--quiet"]),
        ("data", ["perplexity", str(tiny_run), str(padded.path)]),
        ("data", ["inspect", str(tiny_run), "--data", str(padded.path)]),
    ):
        made = CliRunner().invoke(app, arguments)
        assert f"{what} {padded.path}: its documents have a row each" in str(made.exception), made.output


def test_variants_are_compared_on_rows(tmp_path: Path, tiny_data: PreparedData, padded: PreparedData) -> None:
    comparison = load_comparison(write_recipe(tmp_path, padded.path), ["training.steps=2", "seeds=[0]"])
    planner = RunPlanner(comparison)
    run = planner.runs({})[-1]
    train(run.recipe, progress=False)
    found = measure_run(run.folder, planner.data, comparison.evaluation)
    model, rows = load_model(run.folder), [padded.validation[index] for index in spread(12, 5)]
    alone = [model(**collate_blocks([row])).loss.item() for row in rows]
    assert found.losses[found.own] == pytest.approx(alone, abs=1e-5)
