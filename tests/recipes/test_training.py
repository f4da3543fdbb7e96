import re
from dataclasses import fields
from pathlib import Path

import pytest

from thoughtbubbles import ThoughtbubblesConfig
from thoughtbubbles.data import PreparedData
from thoughtbubbles.data.feed.loading import load_run_data
from thoughtbubbles.recipes.training import (
    DataSection,
    FineTuningSection,
    RecipeError,
    StreamSection,
    TrainingSection,
    describe_recipe,
    differences,
    load_recipe,
)
from thoughtbubbles.training.configuration import build_config

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
        ("training.steps='3'", "training.steps='3': expected a whole number"),
        ("training.steps=null", "training.steps=None: expected a whole number"),
        ("training.learning_rate=true", "training.learning_rate=True: expected a finite number"),
        ("training.learning_rate=fast", "training.learning_rate='fast': expected a finite number"),
        ("training.eval_tasks=[gsm8k, 3]", "training.eval_tasks[1]=3: expected text"),
        ("training.compile=all", "training.compile='all': expected one of none, blocks, whole"),
        ("training.learning_rate=-1", "training.learning_rate=-1: expected a number above 0"),
        ("training.weight_decay=-1", "training.weight_decay=-1: expected at least 0"),
        ("training.warmup_fraction=-0.1", "training.warmup_fraction=-0.1: expected at least 0"),
        ("training.decay_fraction=1.5", "training.decay_fraction=1.5: expected at most 1"),
        ("training.warmup_fraction=0.9", "training: warmup_fraction=0.9, decay_fraction=0.2: expected shares of"),
        ("training.gradient_checkpointing=1", "training.gradient_checkpointing=1: expected true or false"),
        ("data.eval_blocks=0", "data.eval_blocks=0: expected at least 1 or null"),
        ("data.final_eval_blocks=-1", "data.final_eval_blocks=-1: expected at least 1 or null"),
        ("data.eval_blocks=x", "data.eval_blocks='x': expected a whole number or null"),
        ("data.mixture={a: 1}", "data: expected either `path` or `mixture`"),
        ("data.mixture=[a, b]", "data.mixture=['a', 'b']: expected a mapping or null"),
        ("model.pretrained=m", "model.preset and model.pretrained: expected at most one"),
        ("training.micro_batch_size=0", "training.micro_batch_size=0: expected at least 1"),
        ("training.precision=half", "training.precision='half': expected one of auto, float32, bfloat16"),
        ("training.sharding=zero", "training.sharding='zero': expected one of ddp, fsdp"),
        ("training.training_budgets=2", "training.training_budgets=2: expected a list or null"),
        ("training.training_budgets=[]", "training.training_budgets=[]: expected a list of at least 1 or null"),
        ("training.eval_budgets=[2, 0.5]", "training.eval_budgets[1]: budget=0.5: expected a number"),
        ("training.report_to=[mlflow]", "training.report_to[0]='mlflow': expected one of tensorboard, wandb"),
        ("training.report_to=[1]", "training.report_to[0]=1: expected one of tensorboard, wandb"),
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


@pytest.mark.parametrize("weights", ["{}", "{a: 0}", "{a: 1, b: -1}", "{a: 1.0e+308, b: 1.0e+308}"])
def test_weights_of_a_mixture_are_above_zero(tmp_path: Path, weights: str) -> None:
    text = f"data: {{mixture: {weights}}}\ntraining: {{output: o, steps: 5}}\n"
    with pytest.raises(RecipeError, match=r"data\.mixture=.*: expected one or more, with weights above 0"):
        load_recipe(write(tmp_path, text))


NUMBERS = ["learning_rate", "weight_decay", "warmup_fraction", "decay_fraction", "max_grad_norm"]


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "1e400", "1" + "0" * 400])
@pytest.mark.parametrize("key", [*(f"training.{name}" for name in NUMBERS), "data.mixture"])
def test_numbers_are_finite(tmp_path: Path, key: str, value: str) -> None:
    mixed = key == "data.mixture"
    override = f"{key}={{d: {value}, e: 1}}" if mixed else f"{key}={value}"
    with pytest.raises(RecipeError, match=re.escape(f"{key}{'[d]' * mixed}=") + ".*: expected a finite number"):
        load_recipe(write(tmp_path, MINIMAL), ["data.path=null"] * mixed + [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.seed=-1", "training.seed=-1: expected a whole number from 0 to 4294967295"),
        ("training.seed=4294967296", "training.seed=4294967296: expected a whole number from 0 to 4294967295"),
        (f"training.seed=0x{'f' * 5000}", "training.seed=a number of thousands of digits: expected a whole number"),
        ("training.steps=2147483648", "training.steps=2147483648: expected at most 2,147,483,647"),
        ("training.batch_size=1048577", "training.batch_size=1048577: expected at most 1,048,576"),
        ("training.eval_budgets=[1e30000000]", "training.eval_budgets[0]: budget='1e30000000': expected a number"),
        ("training.training_budgets=[2, 1e-30000000]", "training.training_budgets[1]: budget='1e-30000000': expected"),
        (f"training.steps={'9' * 5000}", "is not a YAML value: Exceeds the limit"),
        ("training.steps=2024-13-45", "is not a YAML value: month must be in 1..12"),
        (f"model.fork_layers={'[' * 5000}{']' * 5000}", "expected at most 16 levels of keys and values"),
        (f"model.fork_layers={'{a: ' * 20}1{'}' * 20}", "expected at most 16 levels of keys and values"),
        ("training.output=~nobody-of-that-name/run", "training.output='~nobody-of-that-name/run': expected the home"),
    ],
    ids=lambda text: text[:40],
)
def test_values_beyond_all_bounds_are_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(write(tmp_path, MINIMAL), [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 700


ALIASES = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize("text", ["[" * 100_000, "a: " + "[" * 500 + "]" * 500, "&a [*a]", ALIASES, "a: 2024-13-45"])
def test_files_beyond_all_bounds_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(RecipeError, match=r"r\.yaml: (expected at most 16 levels of keys and values|month must be)"):
        load_recipe(write(tmp_path, text))


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, MINIMAL, "base.yaml")
    write(tmp_path, "extends: ~/base.yaml\n")
    overrides = ["data.path=null", "data.mixture={~/a: 1, b: 2}", "training.output=~/run", "model.pretrained=~/m"]
    recipe = load_recipe("~/r.yaml", [*overrides, "training.eval_tasks_dir=~/evals"])
    assert recipe.data == DataSection(mixture={f"{tmp_path}/a": 1.0, "b": 2.0})
    assert (recipe.training.output, recipe.training.eval_tasks_dir) == (f"{tmp_path}/run", f"{tmp_path}/evals")
    assert recipe.model == {"pretrained": f"{tmp_path}/m"}
    fine_tuning = "task: sft\ndata: {source: ~/a.jsonl, validation_source: ~/b.jsonl, tokenizer: ~/t}\n"
    rows = load_recipe(write(tmp_path, fine_tuning + "training: {output: o, steps: 1}\n")).data
    assert rows == FineTuningSection(f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl", tokenizer=f"{tmp_path}/t")


@pytest.mark.parametrize("key", ["mixture", "stream"])
def test_a_source_is_named_once_however_its_home_is_spelt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    twice = f"data.{key}={{~/a.txt: 1, {tmp_path}/a.txt: 2}}"
    with pytest.raises(RecipeError, match=rf"data\.{key}=\{{.*\}}: expected each once, however it is spelt"):
        load_recipe(
            write(tmp_path, MINIMAL), ["data.path=null", twice, *["data.validation={d: 1}"] * (key == "stream")]
        )


def test_a_folder_may_be_called_by_a_number(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL), ["data.path=null", "data.mixture={2024: 1, b: 3e-1}"])
    assert recipe.data == DataSection(mixture={"2024": 1.0, "b": 0.3})


@pytest.mark.parametrize(
    "spelt", ["./data", "data/", "other/../data", "link", "~/data", "{home}/data", "{home}/data/../link"]
)
def test_a_folder_is_mixed_once_however_it_is_spelt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelt: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("data", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("data")
    spelt = spelt.format(home=tmp_path)
    mixture = f"{{data: 1, other: 1, {spelt}: 1}}"
    with pytest.raises(RecipeError, match=r"data\.mixture: 'data' and '.*' are the same folder: expected each once"):
        load_recipe(write(tmp_path, MINIMAL), ["data.path=null", f"data.mixture={mixture}"])
    stream = ["data.path=null", "data.stream={t.txt: 1}", f"data.validation={mixture}"]
    with pytest.raises(RecipeError, match=r"data\.validation: 'data' and '.*' are the same folder"):
        load_recipe(write(tmp_path, MINIMAL), stream)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.max_length=1", "data.max_length=1: expected at least 2"),
        ("data.validation_fraction=1", "data.validation_fraction=1: expected a number below 1"),
        ("data.validation_fraction=.nan", "data.validation_fraction=nan: expected a finite number"),
        ("data.eval_rows=0", "data.eval_rows=0: expected at least 1 or null"),
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
    assert "  precision: auto, float32, bfloat16 [auto]\n" in text
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
