"""`task: sft`: fine-tuning on prompts and completions, and on conversations."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers import tiny_model
from tests.tokenizer_kinds import byte_level
from tests.training.test_run import Kill, comparable, train_with
from thoughtbubbles import ThoughtbubblesForCausalLM
from thoughtbubbles.data import DataError, PreparedData
from thoughtbubbles.data.feed.examples import collate_examples
from thoughtbubbles.data.feed.joining import best_fit
from thoughtbubbles.data.feed.loading import load_run_data
from thoughtbubbles.data.feed.rundata import RunData
from thoughtbubbles.data.feed.sft import Example, Examples, Template, read_examples
from thoughtbubbles.data.tokenizer import load_data_tokenizer, save_tokenizer, train_tokenizer
from thoughtbubbles.model.accounting import training_flops
from thoughtbubbles.model.loading import load_tokenizer
from thoughtbubbles.recipes.training import Recipe, RecipeError, load_recipe
from thoughtbubbles.support.errors import InputError
from thoughtbubbles.support.metrics import read_metrics
from thoughtbubbles.support.text import record_start
from thoughtbubbles.training.configuration import build_config
from thoughtbubbles.training.folder import RunSummary
from thoughtbubbles.training.run import build_model, train

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
  prompt: "{{question}}?\\n"
  completion: "{{answer}} {{number}}"
  tokenizer: {tokenizer}
  max_length: 40
training:
  output: {folder}/run
  steps: 12
  batch_size: 4
  learning_rate: 1e-2
  log_every: 2
  eval_every: 4
  save_every: 4
"""


TEMPLATES = Template("data.prompt", "{question}?\n"), Template("data.completion", "{answer} {number}")


def make_rows(count: int) -> list[dict[str, object]]:
    """Prompts and completions of several lengths, all different."""
    return [{"question": "the gate" * (i % 4), "answer": "5" * (1 + i % 7), "number": i} for i in range(count)]


def sft_recipe(folder: Path, data: PreparedData, *overrides: str, name: str = "") -> Recipe:
    """A recipe of 40 short rows with its output in `folder`/`name`/run."""
    folder = folder / name
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(40)))
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder, tokenizer=data.path / "tokenizer"))
    return load_recipe(folder / "recipe.yaml", overrides)


def load(folder: Path, data: PreparedData, *overrides: str) -> RunData:
    return load_run_data(sft_recipe(folder, data, *overrides), progress=False)


def example(*tokens: int, border: int) -> Example:
    return Example(np.array(tokens, dtype=np.int32), np.arange(len(tokens)) >= border)


@pytest.fixture(scope="session")
def tuned(tmp_path_factory: pytest.TempPathFactory, tiny_data: PreparedData) -> Path:
    folder = tmp_path_factory.mktemp("tuned")
    train(sft_recipe(folder, tiny_data), progress=False)
    return folder / "run"


def test_batches_are_padded_masked_and_labelled_at_completions() -> None:
    batch = collate_examples([example(0, 5, 6, 7, 0, border=3), example(0, 8, 0, border=1)], pad=9)
    assert {name: values.tolist() for name, values in batch.items()} == {
        "input_ids": [[0, 5, 6, 7, 0], [0, 8, 0, 9, 9]],
        "attention_mask": [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]],
        "labels": [[-100, -100, -100, 7, 0], [-100, 8, 0, -100, -100]],
    }
    assert {values.dtype for values in batch.values()} == {torch.int64}


def test_examples_are_made_of_the_rows(tmp_path: Path, tiny_data: PreparedData) -> None:
    data = load(tmp_path, tiny_data)
    for index in range(8):
        number = int(data.samples.describe(index).rpartition("rows.jsonl, row ")[2]) - 1
        row = make_rows(40)[number]
        found = data.samples[index]
        border = int(found.targets.argmax())
        assert found.targets[border:].all()
        assert data.tokenizer.decode(found.tokens[1:border]) == f"{row['question']}?\n"
        assert data.tokenizer.decode(found.tokens[border:-1]) == f"{row['answer']} {number}"
        assert data.samples.length(index) == len(found.tokens) <= data.longest <= 40
    assert data.collate([data.samples[0]])["input_ids"].max() < data.vocab_size


def test_padding_is_the_pad_token_or_else_the_end_of_text(tmp_path: Path, tiny_data: PreparedData) -> None:
    rows = [example(0, 1, 2, 0, border=1), example(0, 1, 0, border=1)]
    assert load(tmp_path, tiny_data).collate(rows)["input_ids"][1, 3] == 0
    tokenizer = tiny_data.tokenizer()
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(7)
    save_tokenizer(tokenizer, tmp_path / "padding")
    assert load(tmp_path, tiny_data, f"data.tokenizer={tmp_path}/padding").collate(rows)["input_ids"][1, 3] == 7


def test_loss_is_the_mean_over_completions_padded_or_alone(tmp_path: Path, tiny_data: PreparedData) -> None:
    recipe = sft_recipe(tmp_path, tiny_data)
    data = load_run_data(recipe, progress=False)
    torch.manual_seed(0)
    model = build_model(recipe, build_config(recipe, data)).eval()
    rows = [data.samples[index] for index in range(6)]
    assert len({len(row.tokens) for row in rows}) > 2
    losses = []
    for row in rows:
        tokens = torch.from_numpy(row.tokens.astype("int64"))
        log_probs = model(tokens[None]).logits[0].log_softmax(-1)
        losses += [-log_probs[place - 1, tokens[place]].item() for place in np.flatnonzero(row.targets).tolist()]
    loss = model(**data.collate(rows)).loss.item()
    assert loss == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def test_every_row_comes_once_an_epoch_and_held_out_ones_never(tmp_path: Path, tiny_data: PreparedData) -> None:
    data = load(tmp_path, tiny_data, "training.steps=16")
    assert len(data.samples) == 64
    seen = [data.samples.describe(index) for index in range(64)]
    assert len(set(seen[:32])) == 32
    assert set(seen[:32]) == set(seen[32:])
    assert seen[:32] != seen[32:]
    validation = data.validation["validation"].rows
    assert isinstance(validation, Examples)
    assert len(validation) == 8
    assert not {validation.describe(index) for index in range(8)} & set(seen)
    longer = load(tmp_path, tiny_data, "training.steps=20").samples
    assert [longer.describe(index) for index in range(64)] == seen


def test_seeds_differ_in_the_order_but_not_in_what_is_held_out(tmp_path: Path, tiny_data: PreparedData) -> None:
    one, other = load(tmp_path, tiny_data), load(tmp_path, tiny_data, "training.seed=1")
    assert one.identity == other.identity
    assert [one.samples.describe(i) for i in range(8)] != [other.samples.describe(i) for i in range(8)]


def test_rows_left_out_are_said(tmp_path: Path, tiny_data: PreparedData, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["data.max_length=14", f"data.validation_source={tmp_path}/validation.jsonl"]
    rows = make_rows(40)
    (tmp_path / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    recipe = sft_recipe(tmp_path, tiny_data, *overrides)
    data = load_run_data(recipe)
    lines = " ".join(capsys.readouterr().err.split())
    everything = read_examples(f"{tmp_path}/rows.jsonl", *TEMPLATES, data.tokenizer, 40)
    too_long = sum(everything.length(index) > 14 for index in range(40))
    assert f"{too_long} of 40 rows left out, longer than max_length=14" in lines
    assert f"rows.jsonl: 3 rows left out, also in {tmp_path}/validation.jsonl" in lines
    assert len(data.validation["validation"].rows) == 3
    load_run_data(recipe, progress=False)
    assert capsys.readouterr().err == ""


def test_a_run_learns_and_counts_what_it_cost(tuned: Path, tiny_data: PreparedData) -> None:
    model = ThoughtbubblesForCausalLM.from_pretrained(tuned / "model")
    data = load_run_data(load_recipe(tuned / "recipe.yaml"), progress=False)
    lengths = [data.samples.length(index) for index in range(48)]
    rows = [row for row in read_metrics(tuned / "metrics.jsonl") if "loss" in row]
    assert [row["tokens"] for row in rows] == [sum(lengths[: 4 * step]) for step in range(2, 13, 2)]
    padded = [max(lengths[start : start + 4]) for start in range(0, 48, 4)]
    assert rows[-1]["flops"] == sum(4 * training_flops(model.config, length) for length in padded)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    validation = data.validation["validation"].rows
    batch = data.collate([validation[index] for index in range(len(validation))])
    assert RunSummary.read(tuned).eval_loss == pytest.approx(model(**batch).loss.item(), abs=1e-5)
    assert model.config.max_position_embeddings == data.longest


def test_evaluations_can_be_cut_to_a_few_rows_evenly_spaced(tmp_path: Path, tiny_data: PreparedData) -> None:
    overrides = ("data.eval_rows=3", "data.final_eval_rows=5", "training.steps=4", "training.eval_every=4")
    recipe = sft_recipe(tmp_path, tiny_data, *overrides)
    final = train(recipe, progress=False).eval_loss
    model = ThoughtbubblesForCausalLM.from_pretrained(tmp_path / "run" / "model")
    data = load_run_data(recipe, progress=False)
    validation = data.validation["validation"].rows
    few = {count: [validation[place * len(validation) // count] for place in range(count)] for count in (3, 5)}
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["eval_loss"]
    assert last == pytest.approx(model(**data.collate(few[3])).loss.item(), abs=1e-5)
    assert final == pytest.approx(model(**data.collate(few[5])).loss.item(), abs=1e-5)


def test_micro_batches_of_unequal_lengths_give_the_same_run(
    tmp_path: Path, tiny_data: PreparedData, float64: None
) -> None:
    curves, flops = [], []
    for micro in (4, 1):
        # At budget 1 nothing is chosen, and so no rounding can choose otherwise (method: Near ties).
        overrides = (f"training.micro_batch_size={micro}", "model.budget=1")
        recipe = sft_recipe(tmp_path, tiny_data, *overrides, name=str(micro))
        flops.append(train(recipe, progress=False).training_flops)
        rows = read_metrics(tmp_path / str(micro) / "run" / "metrics.jsonl")
        curves.append([row.get("loss", row.get("eval_loss")) for row in rows])
    assert curves[1] == pytest.approx(curves[0], rel=1e-10)
    # Alone in its pass a row is not padded.
    assert flops[1] < flops[0]


def test_resuming_goes_on_as_if_never_interrupted(tmp_path: Path, tuned: Path, tiny_data: PreparedData) -> None:
    recipe = sft_recipe(tmp_path, tiny_data)
    with pytest.raises(KeyboardInterrupt):
        train_with(recipe, Kill(at=7))
    train(recipe, progress=False)
    assert comparable(tmp_path / "run") == comparable(tuned)


def test_a_run_on_other_rows_is_refused(tmp_path: Path, tuned: Path, tiny_data: PreparedData) -> None:
    recipe = sft_recipe(tmp_path, tiny_data)
    shutil.copytree(tuned, tmp_path / "run")
    (tmp_path / "run" / "recipe.yaml").write_text(recipe.to_yaml())
    train(recipe, progress=False)
    rows = make_rows(40)
    rows[17]["number"] = 99
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(RecipeError, match="holds a run on other data"):
        train(recipe, progress=False)


def test_a_model_is_tuned_with_its_own_tokenizer(tmp_path: Path, tiny_run: Path, tiny_data: PreparedData) -> None:
    recipe = sft_recipe(tmp_path, tiny_data, "data.tokenizer=null", "data.max_length=16", "training.steps=4")
    recipe.model = {"pretrained": str(tiny_run)}
    data = load_run_data(recipe, progress=False)
    assert data.tokenizer.get_vocab() == tiny_data.tokenizer().get_vocab()
    assert math.isfinite(train(recipe, progress=False).eval_loss)
    recipe.data.max_length = 40
    with pytest.raises(InputError, match=r"model\.max_position_embeddings=16: expected at least"):
        train(recipe, progress=False)


def test_a_tokenizer_is_needed_and_must_be_the_models(tmp_path: Path, tiny_run: Path, tiny_data: PreparedData) -> None:
    recipe = sft_recipe(tmp_path, tiny_data, "data.tokenizer=null")
    with pytest.raises(RecipeError, match=r"data\.tokenizer is missing: expected a tokenizer's folder or hub name, or"):
        load_run_data(recipe)
    save_tokenizer(train_tokenizer(["another text"], 257), tmp_path / "other")
    recipe = sft_recipe(tmp_path, tiny_data, f"data.tokenizer={tmp_path}/other", "data.max_length=100")
    recipe.model = {"pretrained": str(tiny_run)}
    with pytest.raises(InputError, match=r"rows\.jsonl: tokenised with another tokenizer than that of the model"):
        train(recipe, progress=False)
    assert not (tmp_path / "run").exists()


def test_a_models_tokenizer_needs_an_end_of_text(tmp_path: Path, tiny_run: Path, tiny_data: PreparedData) -> None:
    model = Path(shutil.copytree(tiny_run / "model", tmp_path / "model"))
    tokenizer = tiny_data.tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(str(model))
    recipe = sft_recipe(tmp_path, tiny_data, "data.tokenizer=null")
    recipe.model = {"pretrained": str(model)}
    with pytest.raises(InputError, match="expected a tokenizer with an eos token"):
        load_run_data(recipe)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "training.batch_size=33",
            r"training\.batch_size=33: expected at most the 32 rows of .*rows\.jsonl to",
        ),
        ("data.prompt='{x'", r"data\.prompt='\{x': character 1 is a brace of no field"),
        ("data.prompt='{x}'", r"rows\.jsonl, row 1 has no field 'x': it has 'question', 'answer', 'number'"),
        ("data.completion=yes", r"data\.completion=True: expected text"),
        ("data.completion='yes'", r"data\.completion='yes': expected a field"),
        ("data.source=nowhere.jsonl", "source 'nowhere.jsonl' does not exist"),
    ],
)
def test_bad_input_leaves_nothing(tmp_path: Path, tiny_data: PreparedData, override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        train(sft_recipe(tmp_path, tiny_data, override), progress=False)
    assert not (tmp_path / "run").exists()


def test_a_named_tokenizer_takes_over_what_the_model_was_trained_on(tmp_path: Path) -> None:
    """A tokenizer named again, as it came, says nothing of what preceded documents in training."""
    plain = byte_level(tmp_path / "plain", "<s>", "</s>")
    tokenizer = load_data_tokenizer(plain)
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=64)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"p": "the", "c": " river"}\n{"p": "of", "c": " stone"}\n')
    data = {"source": str(tmp_path / "rows.jsonl"), "prompt": "{p}", "completion": "{c}", "tokenizer": str(plain)}
    training = {"output": str(tmp_path / "run"), "steps": 1, "batch_size": 1}
    content = {"task": "sft", "model": {"pretrained": str(tmp_path / "model")}, "data": data, "training": training}
    (tmp_path / "recipe.yaml").write_text(json.dumps(content))
    for recorded, start in ((None, "<s>"), (tokenizer.eos_token_id, "</s>"), (tokenizer.bos_token_id, "<s>")):
        if recorded is not None:
            record_start(tokenizer, recorded)
        tokenizer.save_pretrained(tmp_path / "model")
        loaded = load_run_data(load_recipe(tmp_path / "recipe.yaml"), progress=False)
        (first, *_) = loaded.samples[0].tokens
        assert tokenizer.convert_ids_to_tokens(int(first)) == start
        config = build_config(load_recipe(tmp_path / "recipe.yaml"), loaded)
        assert (config.bos_token_id, config.pad_token_id) == (first, tokenizer.eos_token_id)


CHAT_TEMPLATE = Path(__file__).parents[2] / "recipes" / "chat.jinja"


def chat_recipe(folder: Path, data: PreparedData, *overrides: str) -> Recipe:
    """The same recipe of conversations of one and of two turns."""
    turns = [
        [{"role": role, "content": str(row[name])} for role, name in (("user", "question"), ("assistant", "answer"))]
        for row in make_rows(40)
    ]
    rows = [turn + turns[number - 1] * (number % 2) for number, turn in enumerate(turns)]
    recipe = sft_recipe(folder, data, "data.prompt=null", "data.completion=null", "data.max_length=100", *overrides)
    (folder / "rows.jsonl").write_text(
        "".join(
            json.dumps({"messages": row, "prompt": "a", "number": number}) + "\n" for number, row in enumerate(rows)
        )
    )
    return recipe


def test_a_run_on_conversations_learns_answers_and_keeps_its_template(tmp_path: Path, tiny_data: PreparedData) -> None:
    recipe = chat_recipe(tmp_path, tiny_data, f"data.chat_template={CHAT_TEMPLATE}")
    summary = train(recipe, progress=False)
    rows = [row["loss"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert rows[-1] < rows[0] - 0.5
    tokenizer = load_tokenizer(tmp_path / "run")
    assert tokenizer.chat_template == CHAT_TEMPLATE.read_text()
    assert (tmp_path / "run" / "model" / "chat_template.jinja").is_file()
    data = load_run_data(recipe, progress=False)
    model = ThoughtbubblesForCausalLM.from_pretrained(tmp_path / "run" / "model")
    losses = []
    validation = data.validation["validation"].rows
    for row in (validation[index] for index in range(len(validation))):
        tokens = torch.from_numpy(row.tokens.astype("int64"))
        log_probs = model(tokens[None]).logits[0].log_softmax(-1)
        losses += [-log_probs[place - 1, tokens[place]].item() for place in np.flatnonzero(row.targets).tolist()]
        said = "".join(tokenizer.decode(tokens[row.targets]).split("<|endoftext|>"))
        assert set(said) == {"5", " "}
    assert summary.eval_loss == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def test_conversations_are_told_from_prompts(tmp_path: Path, tiny_data: PreparedData) -> None:
    given = f"data.chat_template={CHAT_TEMPLATE}"
    chats = load_run_data(chat_recipe(tmp_path, tiny_data, given), progress=False)
    assert chats.answer_end is None  # the end of text, as of every document
    plain = load_run_data(chat_recipe(tmp_path, tiny_data, "data.completion='{number}'"), progress=False)
    assert len(plain.samples[0].tokens) < 6
    with pytest.raises(DataError, match=r"the tokenizer has no chat template: expected chat_template\.jinja beside it"):
        load_run_data(chat_recipe(tmp_path, tiny_data), progress=False)
    with pytest.raises(DataError, match=r"rows\.jsonl, row 1 has no field 'chat': it has 'messages', 'prompt'"):
        load_run_data(chat_recipe(tmp_path, tiny_data, given, "data.messages=chat"), progress=False)
    with pytest.raises(RecipeError, match=r"^data: expected either `messages`, or `prompt` and `completion`$"):
        chat_recipe(tmp_path, tiny_data, "data.messages=chat", "data.prompt=a")
    with pytest.raises(
        DataError, match=r"data\.chat_template=.*none\.jinja: cannot be read: No such file or directory"
    ):
        load_run_data(chat_recipe(tmp_path, tiny_data, f"data.chat_template={tmp_path}/none.jinja"), progress=False)


def test_the_token_that_ends_answers_is_known(tmp_path: Path, tiny_data: PreparedData) -> None:
    tokenizer = tiny_data.tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.read_text().replace("eos_token", "'<|end|>'")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    save_tokenizer(tokenizer, tmp_path / "chatting")
    data = load_run_data(chat_recipe(tmp_path, tiny_data, f"data.tokenizer={tmp_path}/chatting"), progress=False)
    assert data.answer_end == tokenizer.convert_tokens_to_ids("<|end|>") == data.vocab_size - 1
    assert data.samples[0].tokens[data.samples[0].targets][-1] == data.answer_end
    recipe = chat_recipe(tmp_path, tiny_data, f"data.tokenizer={tmp_path}/chatting")
    config = build_config(recipe, data)
    assert config.eos_token_id == [tokenizer.eos_token_id, data.answer_end]
    assert build_model(recipe, config).generation_config.eos_token_id == config.eos_token_id


def test_packed_rows_hold_every_example_once(tmp_path: Path, tiny_data: PreparedData) -> None:
    padded = load(tmp_path, tiny_data)
    packed = load(tmp_path, tiny_data, "data.packing=packed", "training.steps=2")
    rows = [packed.samples[index] for index in range(8)]
    named = [packed.samples.describe(index).split(" + ") for index in range(8)]
    alone = {padded.samples.describe(index): padded.samples[index] for index in range(32)}
    assert [len(row.tokens) for row in rows] == [packed.samples.length(index) for index in range(8)]
    for row, names in zip(rows, named, strict=True):
        parts = [alone[name] for name in names]
        assert len(row.tokens) <= 40
        assert row.tokens.tolist() == [token for part in parts for token in part.tokens.tolist()]
        assert row.targets.tolist() == [target for part in parts for target in part.targets.tolist()]
    # Between two rows nothing more would fit.
    lengths = sorted(packed.samples.length(index) for index in range(8))
    assert lengths[0] + lengths[1] > 40 or len(named) == 1
    one, other = (each.validation["validation"].rows for each in (padded, packed))
    assert [one[index].tokens.tolist() for index in range(8)] == [other[index].tokens.tolist() for index in range(8)]
    with pytest.raises(
        RecipeError, match=r"training\.batch_size=32: expected at most the \d+ rows of .* to train on, pa"
    ):
        load(tmp_path, tiny_data, "data.packing=packed", "training.batch_size=32")


@pytest.mark.parametrize("seed", range(3))
def test_best_fit_places_all_and_fills_rows(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 41, 200).tolist()
    rows = best_fit(lengths, 40)
    assert sorted(index for row in rows for index in row) == list(range(200))
    sums = [sum(lengths[index] for index in row) for row in rows]
    assert max(sums) <= 40
    # Best fit decreasing needs at most 11/9 of the fewest rows, and one more.
    assert len(rows) <= 11 / 9 * -(-sum(lengths) // 40) + 1 + sum(length > 20 for length in lengths)


def test_a_run_on_packed_rows_counts_their_tokens(tmp_path: Path, tiny_data: PreparedData) -> None:
    recipe = sft_recipe(tmp_path, tiny_data, "data.packing=packed", "training.micro_batch_size=2", "training.steps=4")
    train(recipe, progress=False)
    data = load_run_data(recipe, progress=False)
    lengths = [data.samples.length(index) for index in range(16)]
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert [row["tokens"] for row in rows] == [sum(lengths[:8]), sum(lengths)]
