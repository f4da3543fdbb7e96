import re
from dataclasses import fields
from pathlib import Path

import pytest

from thoughtbubbles import ThoughtbubblesConfig
from thoughtbubbles.data import PreparedData
from thoughtbubbles.training.recipe import (
    DataSection,
    FineTuningSection,
    RecipeError,
    StreamSection,
    TrainingSection,
    describe_recipe,
    differences,
    load_recipe,
)
from thoughtbubbles.training.run import build_config
from thoughtbubbles.training.rundata import load_run_data

MINIMAL = "data: {path: d}\ntraining: {output: o, steps: 5}\n"
RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def write(folder: Path, text: str, name: str = "r.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_parse_and_name_real_model_fields(path: Path) -> None:
    recipe = load_recipe(path)
    fields = dict(recipe.model)
    preset = fields.pop("preset", None)
    fields.pop("pretrained", None)
    config = ThoughtbubblesConfig.preset(preset, **fields) if preset else ThoughtbubblesConfig(**fields)
    assert config.num_hidden_layers > 0


def test_round_trip_through_yaml_keeps_every_value(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL), ["model.budget=1.2", "training.learning_rate=3e-4"])
    assert load_recipe(write(tmp_path, recipe.to_yaml(), "again.yaml")) == recipe


def test_override_reads_a_float_without_a_point(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, MINIMAL), ["training.learning_rate=3e-4"]).training.learning_rate == 3e-4


def test_extends_lays_sections_over_the_base(tmp_path: Path) -> None:
    write(tmp_path, "model: {budget: 2, routing: causal}\n" + MINIMAL, "base.yaml")
    recipe = load_recipe(write(tmp_path, "extends: base.yaml\nmodel: {routing: none}\ntraining: {output: p}\n"))
    assert recipe.model == {"budget": 2, "routing": "none"}
    assert (recipe.training.output, recipe.training.steps) == ("p", 5)


def test_extending_oneself_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, "extends: b.yaml\n", "a.yaml")
    with pytest.raises(RecipeError, match="extends itself"):
        load_recipe(write(tmp_path, "extends: a.yaml\n", "b.yaml"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.learning_rat=1", "unknown key training.learning_rat: did you mean training.learning_rate?"),
        ("modl.budget=1", "unknown section modl: did you mean model?"),
        ("model.fork_layer=[1]", "unknown key model.fork_layer: did you mean model.fork_layers?"),
        ("training.steps=many", "training.steps='many': expected a whole number"),
        ("training.steps=1.5", "training.steps=1.5: expected a whole number"),
        ("training.steps=0", "training.steps=0: expected at least 1"),
        ("training.steps=true", "training.steps=True: expected a whole number"),
        ("training.learning_rate=-1", "training.learning_rate=-1.0: expected a number above 0"),
        ("training.weight_decay=-1", "training.weight_decay=-1.0: expected a number of at least 0"),
        ("training.warmup_fraction=0.9", "training.warmup_fraction=0.9, training.decay_fraction=0.2"),
        ("training.gradient_checkpointing=1", "training.gradient_checkpointing=1: expected true or false"),
        ("data.eval_blocks=0", "data.eval_blocks=0: expected at least 1, or null for all"),
        ("data.final_eval_blocks=-1", "data.final_eval_blocks=-1: expected at least 1, or null for all"),
        ("data.eval_blocks=x", "data.eval_blocks='x': expected a whole number or null"),
        ("data.mixture={a: 1}", "data: expected either `path` or `mixture`"),
        ("data.mixture=[a, b]", "data.mixture=['a', 'b']: expected a mapping or null"),
        ("model.pretrained=m", "model.preset and model.pretrained: expected at most one"),
        ("training.micro_batch_size=0", "training.micro_batch_size=0: expected at least 1"),
        ("training.precision=half", "training.precision='half': expected one of auto, float32, bfloat16"),
        ("training.sharding=zero", "training.sharding='zero': expected one of ddp, fsdp"),
        ("training.training_budgets=2", "training.training_budgets=2: expected a list or null"),
        ("training.training_budgets=[]", "training.training_budgets=[]: expected budgets, such as [1, 2], or null"),
        ("training.eval_budgets=[2, 0.5]", "training.eval_budgets[1]: budget=0.5: expected a number"),
        ("training.report_to=[mlflow]", "training.report_to='mlflow': expected one of tensorboard, wandb"),
        ("training.report_to=[1]", "training.report_to[0]=1: expected text"),
        ("task=dance", "task='dance': expected pretrain or sft"),
        ("steps=3", "override 'steps=3': expected section.key=value"),
        ("training.steps", "expected section.key=value"),
        ("training.steps=[", "is not a YAML value"),
    ],
)
def test_bad_overrides_say_what_was_expected(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(write(tmp_path, "model: {preset: nano}\n" + MINIMAL), [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n", "expected the sections task, model, data, training"),
        ("data: [", "while parsing"),
        ("data: 3\n", "data: 3: expected keys and values"),
        ("data: {path: d}\ntraining: {output: o}\n", "training.steps is missing: expected the optimizer steps"),
        ("training: {output: o, steps: 3}\n", "data: expected either `path` or `mixture`"),
        ("task: dance\n" + MINIMAL, "task='dance': expected pretrain or sft"),
        ("task: sft\n" + MINIMAL, "unknown key data.path"),
        ("task: sft\ndata: {}\ntraining: {output: o, steps: 3}\n", "data.source is missing"),
        (
            "task: sft\ndata: {source: rows.jsonl}\ntraining: {output: o, steps: 3, compile: blocks}\n",
            "training.compile=blocks: expected task=pretrain, whose rows are all of one length",
        ),
    ],
)
def test_bad_files_say_what_was_expected(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message.replace("[", r"\[")):
        load_recipe(write(tmp_path, text))


def test_mixtures_and_budgets_are_read(tmp_path: Path) -> None:
    text = "data: {mixture: {a: 0.7, b: 3e-1}}\ntraining: {output: o, steps: 5, training_budgets: [1, 1.5, 4/3]}\n"
    recipe = load_recipe(write(tmp_path, text))
    assert recipe.data == DataSection(mixture={"a": 0.7, "b": 0.3})
    assert recipe.training.training_budgets == [1, 1.5, "4/3"]


@pytest.mark.parametrize("weights", ["{}", "{a: 0}", "{a: 1, b: -1}", "{a: .nan}"])
def test_weights_of_a_mixture_are_above_zero(tmp_path: Path, weights: str) -> None:
    text = f"data: {{mixture: {weights}}}\ntraining: {{output: o, steps: 5}}\n"
    with pytest.raises(RecipeError, match=r"data\.mixture=.*: expected folders with weights above 0"):
        load_recipe(write(tmp_path, text))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.max_length=1", "data.max_length=1: expected at least 2"),
        ("data.validation_fraction=1", "data.validation_fraction=1.0: expected more than 0 and less than 1"),
        ("data.eval_rows=0", "data.eval_rows=0: expected at least 1, or null for all"),
    ],
)
def test_bad_fine_tuning_sections(tmp_path: Path, override: str, message: str) -> None:
    text = "task: sft\ndata: {source: rows.jsonl}\ntraining: {output: o, steps: 5}\n"
    with pytest.raises(RecipeError) as error:
        load_recipe(write(tmp_path, text), [override])
    assert message in str(error.value)


def test_the_description_names_every_key_with_its_default() -> None:
    text = describe_recipe()
    for section in (DataSection, StreamSection, FineTuningSection, TrainingSection):
        for spec in fields(section):
            assert f"  {spec.name}: " in text
    assert "  steps: a whole number (needed)\n" in text
    assert "  training_budgets: a list or null [null]\n" in text
    assert "  precision: text [auto]\n" in text
    for name in ThoughtbubblesConfig.__annotations__:
        assert re.search(rf"^  ([\w, ]+, )?{name}[ ,]", text, re.MULTILINE), name


def test_differences_name_the_keys() -> None:
    old, new = {"a": {"b": 1, "c": 2}, "d": [1]}, {"a": {"b": 1, "c": 3}, "e": None}
    assert list(differences(old, new)) == ["a.c: 2 is now 3", "d: [1] is now absent", "e: absent is now None"]


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nowhere\.yaml: no such file"):
        load_recipe(tmp_path / "nowhere.yaml")


def test_build_config_takes_vocabulary_and_length_from_the_data(tmp_path: Path, tiny_data: PreparedData) -> None:
    overrides = ["model.hidden_size=16", "model.num_attention_heads=2", f"data.path={tiny_data.path}"]
    recipe = load_recipe(write(tmp_path, MINIMAL), overrides)
    config = build_config(recipe, load_run_data(recipe))
    assert config.vocab_size == tiny_data.manifest.vocab_size
    assert config.max_position_embeddings == tiny_data.manifest.block_size
    assert config.bos_token_id == tiny_data.manifest.tokenizer.eos_token_id


@pytest.mark.parametrize("field", ["training_budgets", "eval_budgets"])
@pytest.mark.parametrize(
    ("routing", "budget", "message"),
    [("copy", 1.5, "a whole number of streams per token, since routing is copy"), ("pause", 3, "at most 2, for which")],
)
def test_build_config_refuses_budgets_that_copies_cannot_have(
    tmp_path: Path, tiny_data: PreparedData, field: str, routing: str, budget: float, message: str
) -> None:
    overrides = [f"data.path={tiny_data.path}", f"model.routing={routing}", f"training.{field}=[1, {budget}]"]
    recipe = load_recipe(write(tmp_path, MINIMAL), overrides)
    with pytest.raises(RecipeError, match=re.escape(f"training.{field}: budget={budget!r}: expected {message}")):
        build_config(recipe, load_run_data(recipe))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.vocab_size=10", "model.vocab_size=10: expected at least"),
        ("model.max_position_embeddings=4", "model.max_position_embeddings=4: expected at least 16"),
        (
            "model.routing=best",
            "model.routing='best': expected one of causal, threshold, topk, none, copy, pause, random, uniform",
        ),
        ("model.preset=huge", "model.preset='huge': expected one of"),
    ],
)
def test_build_config_refuses(tmp_path: Path, tiny_data: PreparedData, override: str, message: str) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL), [override, f"data.path={tiny_data.path}"])
    with pytest.raises(RecipeError) as error:
        build_config(recipe, load_run_data(recipe))
    assert message in str(error.value)
