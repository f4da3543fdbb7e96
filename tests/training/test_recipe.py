from pathlib import Path

import pytest

from thoughtbubbles.data import PreparedData
from thoughtbubbles.training.recipe import RecipeError, load_recipe
from thoughtbubbles.training.run import build_config

MINIMAL = "data: {path: d}\ntraining: {output: o, steps: 5}\n"
RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def write(folder: Path, text: str, name: str = "r.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_parse_and_name_real_model_fields(path: Path) -> None:
    from thoughtbubbles import ThoughtbubblesConfig

    recipe = load_recipe(path)
    fields = dict(recipe.model)
    preset = fields.pop("preset", None)
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
        ("steps=3", "override 'steps=3': expected section.key=value"),
        ("training.steps", "expected section.key=value"),
        ("training.steps=[", "is not a YAML value"),
    ],
)
def test_bad_overrides_say_what_was_expected(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(write(tmp_path, MINIMAL), [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n", "expected the sections model, data, training"),
        ("data: [", "while parsing"),
        ("data: 3\n", "data: 3: expected keys and values"),
        ("data: {path: d}\ntraining: {output: o}\n", "training.steps is missing: expected the optimizer steps"),
        ("training: {output: o, steps: 3}\n", "data.path is missing"),
    ],
)
def test_bad_files_say_what_was_expected(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message.replace("[", r"\[")):
        load_recipe(write(tmp_path, text))


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nowhere\.yaml: no such file"):
        load_recipe(tmp_path / "nowhere.yaml")


def test_build_config_takes_vocabulary_and_length_from_the_data(tmp_path: Path, tiny_data: PreparedData) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL), ["model.hidden_size=16", "model.num_attention_heads=2"])
    config = build_config(recipe, tiny_data)
    assert config.vocab_size == tiny_data.manifest.vocab_size
    assert config.max_position_embeddings == tiny_data.manifest.block_size
    assert config.bos_token_id == tiny_data.manifest.tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.vocab_size=10", "model.vocab_size=10: expected at least"),
        ("model.max_position_embeddings=4", "model.max_position_embeddings=4: expected at least 16"),
        ("model.routing=best", "model.routing='best': expected one of causal, topk, none"),
        ("model.preset=huge", "model.preset='huge': expected one of"),
    ],
)
def test_build_config_refuses(tmp_path: Path, tiny_data: PreparedData, override: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        build_config(load_recipe(write(tmp_path, MINIMAL), [override]), tiny_data)
    assert message in str(error.value)
