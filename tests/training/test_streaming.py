"""Runs on streamed data: going on, several processes, sources that fail, recipes."""

import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.run_fixtures import BLOCK, RECIPE, sentences
from tests.training.test_processes import numbers, torchrun
from tests.training.test_run import Kill, comparable, train_with
from thoughtbubbles.data import PreparedData
from thoughtbubbles.data.feed.lanes import STREAM_NAME, StreamedBlocks
from thoughtbubbles.data.feed.loading import load_run_data
from thoughtbubbles.planning.plan import make_plan
from thoughtbubbles.recipes.training import Recipe, RecipeError, StreamSection, load_recipe
from thoughtbubbles.support.errors import InputError, RunError
from thoughtbubbles.support.metrics import read_metrics
from thoughtbubbles.training.checkpoints import damage, sealed
from thoughtbubbles.training.folder import RunSummary
from thoughtbubbles.training.run import train
from thoughtbubbles.training.session import Callback, Session

# Windows of 2 blocks for each of 4 lanes: a run goes through several.
DATA = """
  stream: {{{texts}/*.jsonl: 2, {texts}/*.parquet: 1}}
  validation: {{{data}: 1}}
  shuffle_blocks: 8
"""


def write_texts(folder: Path, files: int = 5, rows: int = 6) -> Path:
    """Files of jsonl and parquet."""
    folder.mkdir()
    texts = [text.replace("of", "under") for text in sentences(rows * files)]
    for number in range(files):
        ours = texts[number::files]
        lines = [json.dumps({"text": text}) + "\n" for text in ours]
        (folder / f"{number}.jsonl").write_text("".join(lines))
        pq.write_table(
            pa.table({"text": [text.replace("number", "at") for text in ours]}), folder / f"{number}.parquet"
        )
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("stream") / "texts")


def write_recipe(folder: Path, texts: Path, data: Path) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "recipe.yaml"
    prepared = RECIPE.format(data=data, output=folder / "run")
    path.write_text(prepared.replace(f"\n  path: {data}\n", DATA.format(texts=texts, data=data)))
    return path


def stream_recipe(folder: Path, texts: Path, data: PreparedData, *overrides: str) -> Recipe:
    return load_recipe(write_recipe(folder, texts, data.path), overrides)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory, texts: Path, tiny_data: PreparedData) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    train(stream_recipe(folder, texts, tiny_data), progress=False)
    return folder / "run"


def test_a_stream_is_trained_on_and_evaluated_on_prepared_blocks(whole_run: Path, tiny_data: PreparedData) -> None:
    losses = [row["eval_loss"] for row in read_metrics(whole_run / "metrics.jsonl") if "eval_loss" in row]
    assert losses[-1] < losses[0]
    summary = RunSummary.read(whole_run)
    assert summary.tokens == 12 * 4 * BLOCK
    assert "validation" in tiny_data.manifest.to_json()


@pytest.mark.parametrize("step", [5, 9])
def test_resuming_goes_on_as_if_never_interrupted(
    tmp_path: Path, whole_run: Path, texts: Path, tiny_data: PreparedData, step: int
) -> None:
    recipe = stream_recipe(tmp_path, texts, tiny_data, "training.save_every=3", "training.micro_batch_size=4")
    with pytest.raises(KeyboardInterrupt):
        train_with(recipe, Kill(at=step))
    last = sealed(tmp_path / "run" / "checkpoints")[-1]
    assert last.step == (step - 1) // 3 * 3
    assert STREAM_NAME in json.loads((last.folder / "seal.json").read_text())["files"]
    train(recipe, progress=False)
    assert comparable(tmp_path / "run") == comparable(whole_run)
    assert RunSummary.read(tmp_path / "run").eval_loss == RunSummary.read(whole_run).eval_loss


def test_where_the_stream_stands_is_sealed(tmp_path: Path, texts: Path, tiny_data: PreparedData) -> None:
    recipe = stream_recipe(tmp_path, texts, tiny_data, "training.steps=2", "training.save_every=1")
    train(recipe, progress=False)
    last = sealed(tmp_path / "run" / "checkpoints")[-1]
    stream = last.folder / STREAM_NAME
    assert damage(last) is None
    stream.write_text(stream.read_text().replace('"row": ', '"row": 1'))
    assert damage(last) is not None


def samples_of(recipe: Recipe) -> StreamedBlocks:
    samples = load_run_data(recipe, progress=False).samples
    assert isinstance(samples, StreamedBlocks)
    return samples


@pytest.mark.parametrize(
    ("batch", "lanes", "processes", "micro"), [(12, 4, 2, 3), (12, 4, 4, 1), (12, 6, 3, 2), (12, 4, 3, 4)]
)
def test_processes_share_each_batch_by_lanes(
    tmp_path: Path, texts: Path, tiny_data: PreparedData, batch: int, lanes: int, processes: int, micro: int
) -> None:
    overrides = (f"training.batch_size={batch}", f"data.lanes={lanes}")
    samples = samples_of(stream_recipe(tmp_path, texts, tiny_data, *overrides))
    order = list(samples.shared(range(2 * batch, 5 * batch), batch, processes, micro))
    assert sorted(order[:batch]) == list(range(2 * batch, 3 * batch))
    assert sorted(order) == list(range(2 * batch, 5 * batch))
    # As accelerate deals batches out.
    dealt = [order[start : start + micro] for start in range(0, len(order), micro)]
    read = [{index % lanes for part in dealt[process::processes] for index in part} for process in range(processes)]
    if lanes % processes == 0:
        assert sorted(lane for each in read for lane in each) == list(range(lanes))
    assert max(map(len, read)) <= lanes // processes + 2


def test_the_samples_of_a_run_are_saved_and_taken_up_by_other_processes(
    tmp_path: Path, texts: Path, tiny_data: PreparedData
) -> None:
    recipe = stream_recipe(tmp_path, texts, tiny_data)
    samples = samples_of(recipe)
    expected = torch.stack([samples[index]["input_ids"] for index in range(48)])
    assert len(samples) == 48
    assert expected.dtype == torch.int64
    samples.save(tmp_path, 28, main=True)
    samples.close()
    order = samples.shared(range(28, 48), batch=4, processes=2, micro=1)
    again = samples_of(recipe)
    again.load(tmp_path)
    for index in list(order)[1::2]:
        assert torch.equal(again[index]["input_ids"], expected[index])
    again.close()


@pytest.mark.long
def test_two_processes_train_the_run_of_one_and_either_goes_on_with_the_other(
    tmp_path: Path, whole_run: Path, texts: Path, tiny_data: PreparedData
) -> None:
    command = ["-m", "thoughtbubbles", "train", str(write_recipe(tmp_path, texts, tiny_data.path))]
    records = []
    for processes in (2, 1, 2):
        torchrun(f"--nproc-per-node={processes}", "--standalone", *command)
        for row, one in zip(numbers(tmp_path / "run"), numbers(whole_run), strict=True):
            assert row == pytest.approx(one, rel=1e-4)
        records.append((tmp_path / "run" / "checkpoints" / "checkpoint-12" / STREAM_NAME).read_text())
        # As if the run had been killed after its checkpoint at step 8.
        for leaving in ("summary.json", "checkpoints/checkpoint-12/seal.json"):
            (tmp_path / "run" / leaving).unlink()
    whole = (whole_run / "checkpoints" / "checkpoint-12" / STREAM_NAME).read_text()
    assert records == [whole] * 3


class _Remove(Callback):
    """Takes files away at a step."""

    def __init__(self, folder: Path, at: int) -> None:
        self.folder, self.at = folder, at

    def on_step_end(self, session: Session) -> None:
        if session.step == self.at:
            self.folder.rename(self.folder.with_name("away"))


def test_a_source_that_goes_away_ends_the_run_and_the_next_start_goes_on(
    tmp_path: Path, tiny_data: PreparedData
) -> None:
    texts = write_texts(tmp_path / "texts", files=20, rows=1)
    longer = ("training.steps=40", "training.save_every=8", "training.eval_every=20")
    recipe = stream_recipe(tmp_path, texts, tiny_data, *longer)
    whole = stream_recipe(tmp_path / "whole", texts, tiny_data, *longer)
    train(whole, progress=False)
    with pytest.raises(RunError, match=r"cannot read .*texts/.*; when it can be read again, the same command goes on"):
        train_with(recipe, _Remove(texts, at=9))
    assert sealed(tmp_path / "run" / "checkpoints")[-1].step >= 8
    with pytest.raises(InputError, match="has no files to read"):
        train(recipe, progress=False)
    (tmp_path / "away").rename(texts)
    train(recipe, progress=False)
    assert comparable(tmp_path / "run") == comparable(tmp_path / "whole" / "run")


def test_a_run_does_not_go_on_with_files_that_changed(tmp_path: Path, tiny_data: PreparedData) -> None:
    texts = write_texts(tmp_path / "texts")
    recipe = stream_recipe(tmp_path, texts, tiny_data)
    with pytest.raises(KeyboardInterrupt):
        train_with(recipe, Kill(at=5))
    with (texts / "0.jsonl").open("a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(RecipeError, match=r"holds a run on other data: .*\*\.jsonl, .*\.parquet has changed since"):
        train(recipe, progress=False)


def test_a_run_goes_on_with_files_that_were_touched_or_copied(
    tmp_path: Path, whole_run: Path, tiny_data: PreparedData
) -> None:
    texts = write_texts(tmp_path / "texts")
    recipe = stream_recipe(tmp_path, texts, tiny_data)
    with pytest.raises(KeyboardInterrupt):
        train_with(recipe, Kill(at=5))
    shutil.copytree(texts, tmp_path / "copy", copy_function=shutil.copyfile)
    shutil.rmtree(texts)
    (tmp_path / "copy").rename(texts)
    for file in texts.iterdir():
        os.utime(file, (1, 1))
    train(recipe, progress=False)
    assert comparable(tmp_path / "run") == comparable(whole_run)


def test_a_run_that_diverges_names_where_its_blocks_come_from(
    tmp_path: Path, texts: Path, tiny_data: PreparedData
) -> None:
    overrides = ("training.learning_rate=1e30", "training.warmup_fraction=0.5")
    with pytest.raises(RunError, match="stopped before the update"):
        train(stream_recipe(tmp_path, texts, tiny_data, *overrides), progress=False)
    found = json.loads((tmp_path / "run" / "diverged.json").read_text())
    assert list(found["samples"].values())[2].partition(", lane ")[2].startswith("2, block ")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.path=runs/data", "data: expected either `path` or `mixture`, .* or `stream`"),
        ("data.stream={a.jsonl: 0}", "data.stream={'a.jsonl': 0}: expected one or more, with weights"),
        ("data.validation={}", "data.validation={}: expected one or more, with weights above 0"),
        ("data.lanes=3", "data.lanes=3: expected a divisor of training.batch_size=4"),
        ("data.lanes=0", "data.lanes=0: expected at least 1"),
        ("data.shuffle_blocks=0", "data.shuffle_blocks=0: expected at least 1"),
        ("data.block_size=16", "unknown key data.block_size"),
        ("data.eval_blocks=0", "data.eval_blocks=0: expected at least 1 or null"),
    ],
)
def test_bad_sections_say_what_was_expected(
    tmp_path: Path, texts: Path, tiny_data: PreparedData, override: str, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        stream_recipe(tmp_path, texts, tiny_data, override)


@pytest.mark.parametrize(
    ("override", "kind", "message"),
    [
        ("data.stream={{{texts}/nothing.jsonl: 1}}", InputError, "nothing.jsonl' does not exist"),
        ("data.stream={{hf:no-such/dataset: 1}}", RunError, "'hf:no-such/dataset' cannot be loaded"),
        ("data.stream={{{texts}/*.jsonl: 1, {texts}/0.jsonl: 1}}", InputError, "is in both, expected each once"),
        ("data.text_field=body", InputError, "has no field 'body': it has 'text'"),
        ("data.validation={{nowhere: 1}}", InputError, "nowhere does not exist"),
    ],
)
def test_sources_that_cannot_be_used_leave_nothing(
    tmp_path: Path, texts: Path, tiny_data: PreparedData, override: str, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        train(stream_recipe(tmp_path, texts, tiny_data, override.format(texts=texts)), progress=False)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_validation_folders_of_a_stream_are_alike_and_weighed(
    tmp_path: Path, texts: Path, tiny_data: PreparedData, other_data: PreparedData
) -> None:
    folders = f"data.validation={{{tiny_data.path}: 1, {other_data.path}: 3}}"
    data = load_run_data(stream_recipe(tmp_path, texts, tiny_data, folders))
    assert [each.weight for each in data.validation.values()] == [0.25, 0.75]


def test_lanes_are_a_divisor_of_the_batch_by_themselves(tmp_path: Path, texts: Path, tiny_data: PreparedData) -> None:
    recipe = stream_recipe(tmp_path, texts, tiny_data, "training.batch_size=24")
    assert {load_run_data(recipe).samples.describe(index).split(", ")[1] for index in range(48)} == {
        f"lane {lane}" for lane in range(8)
    }


def test_a_recipe_that_extends_one_with_prepared_data_can_stream(
    tmp_path: Path, texts: Path, tiny_data: PreparedData
) -> None:
    (tmp_path / "base.yaml").write_text(RECIPE.format(data=tiny_data.path, output=tmp_path / "run"))
    section = DATA.format(texts=texts, data=tiny_data.path)
    (tmp_path / "streamed.yaml").write_text(f"extends: base.yaml\ndata:\n  path: null{section}")
    recipe = load_recipe(tmp_path / "streamed.yaml")
    assert isinstance(recipe.data, StreamSection)
    again = tmp_path / "again.yaml"
    again.write_text(recipe.to_yaml())
    assert load_recipe(again) == recipe


def test_a_plan_needs_no_source(tmp_path: Path, tiny_data: PreparedData) -> None:
    path = write_recipe(tmp_path, tmp_path / "nowhere", tiny_data.path)
    plan = make_plan(str(path))
    assert plan.length == BLOCK
    assert not any("not prepared" in note for note in plan.notes)
    path = write_recipe(tmp_path, tmp_path / "nowhere", tmp_path / "unprepared")
    assert "unprepared is not prepared yet" in " ".join(make_plan(str(path)).notes)
