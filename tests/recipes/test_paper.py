"""The recipes of the paper's runs: sizes, variants, tokens, schedules."""

import re
from pathlib import Path

import pytest

from thoughtbubbles import ThoughtbubblesConfig
from thoughtbubbles.data.sources.corpora import resolve_source
from thoughtbubbles.model.accounting import count_parameters, dense_twin, training_flops
from thoughtbubbles.planning.plan import make_plan
from thoughtbubbles.recipes.comparison import Comparison, load_comparison, variant_sections
from thoughtbubbles.recipes.preparation import load_preparation
from thoughtbubbles.recipes.training import (
    DataSection,
    GroupSection,
    Recipe,
    StreamSection,
    TrainingSection,
    differences,
    load_recipe,
    model_config,
    parse_recipe,
)
from thoughtbubbles.training.optimizer import rate_of_step

FOLDER = Path(__file__).parents[2] / "recipes" / "paper"
BLOCK = 512
SIZES = {"150m": 152_016_384, "319m": 316_001_280, "530m": 530_137_088, "772m": 772_738_560}
PES2O = "hf:json?data_files=hf://datasets/allenai/peS2o/data/v2/train-*.json.gz&field=text"
CORPORA = {"openwebtext": "runs/openwebtext", "pes2o": "runs/pes2o"}
VARIANTS = {
    "dense": ("none", None),
    "copy-3": ("copy", 3),
    "copy-5": ("copy", 5),
    "topk-2": ("topk", 2),
    "topk-4": ("topk", 4),
    "causal-2": ("causal", 2),
    "causal-4": ("causal", 4),
}
PRETRAINING = ("1.9b", "1.9b-streamed", "1.9b-fork", "1.9b-dense")
SINGLE = (*PRETRAINING, "midtraining", "gsm8k")
ALL_DECAY = {"*": GroupSection(weight_decay=0.1)}
COMPARISONS = [f"{size}-{corpus}" for size in SIZES for corpus in CORPORA]


def recipe_of(comparison: Comparison, variant: str) -> Recipe:
    return parse_recipe(variant_sections(comparison, comparison.variants[variant], 0, Path("out")))


def single(name: str) -> Recipe:
    return load_recipe(FOLDER / f"{name}.yaml")


def tokens(recipe: Recipe) -> int:
    return recipe.training.steps * recipe.training.batch_size * BLOCK


def test_these_are_all() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {*COMPARISONS, *SINGLE}


@pytest.mark.parametrize("name", COMPARISONS)
def test_a_comparison_has_the_size_the_data_and_the_variants_that_it_says(name: str) -> None:
    size, corpus = name.split("-")
    comparison = load_comparison(FOLDER / f"{name}.yaml")
    assert list(comparison.variants) == list(VARIANTS)
    assert comparison.settings.output == f"runs/paper/{name}"
    assert comparison.settings.title.startswith(size.upper())
    for variant, (routing, budget) in VARIANTS.items():
        recipe = recipe_of(comparison, variant)
        assert isinstance(recipe.data, DataSection)
        assert (recipe.data.path, tokens(recipe)) == (CORPORA[corpus], 2_457_600_000)
        assert (recipe.training.steps, recipe.training.batch_size) == (75_000, 64)
        config = model_config(recipe, {}, None)
        assert (config.routing, config.max_position_embeddings) == (routing, BLOCK)
        assert budget is None or config.exact_budget() == budget
        gates = 3 * 5 * config.hidden_size if config.gated_layers else 0
        dense = SIZES[size] - 3 * 5 * config.hidden_size
        assert count_parameters(config) == dense + gates
        assert config.merge == ("root" if routing == "copy" else "probability")
        assert (config.hidden_act, config.fork_embedding_init) == ("gelu", "uniform")
        assert not recipe.training.groups
        check_ramps(recipe.training, warmup=375, decay=750)


def check_ramps(settings: TrainingSection, warmup: int, decay: int) -> None:
    """A rise over the first steps from a hundredth of the peak, and a fall over the last ones to it."""
    rates = [rate_of_step(settings, step) for step in (1, warmup, warmup + 1, settings.steps - decay)]
    assert rates == pytest.approx([0.01, 1 - 0.99 / warmup, 1, 1])
    last = rate_of_step(settings, settings.steps)
    assert last == (pytest.approx(0.01 + 0.99 / decay) if decay else 1)


def test_every_output_is_its_own() -> None:
    outputs = [load_comparison(FOLDER / f"{name}.yaml").settings.output for name in COMPARISONS]
    outputs += [single(name).training.output for name in SINGLE]
    assert len(set(outputs)) == len(outputs)


def test_the_largest() -> None:
    recipe = single("1.9b")
    settings, config = recipe.training, model_config(recipe, {}, None)
    assert isinstance(recipe.data, DataSection)
    assert recipe.data.mixture is not None
    assert list(recipe.data.mixture.values()) == [0.7, 0.3]
    assert tokens(recipe) == pytest.approx(40e9, abs=settings.batch_size * BLOCK)
    assert count_parameters(config) == 1_915_858_944
    assert count_parameters(dense_twin(config)) == 1_915_858_944 - 3 * 5 * 2048
    assert (str(config.exact_budget()), config.max_position_embeddings) == ("2", BLOCK)
    assert (settings.batch_size, settings.learning_rate, settings.groups) == (480, 2.5e-4, ALL_DECAY)
    check_ramps(settings, warmup=814, decay=1628)
    assert (config.hidden_act, config.fork_embedding_init, config.merge) == ("gelu_pytorch_tanh", "normal", "residual")


@pytest.mark.parametrize(
    ("name", "steps", "routing"), [("1.9b-fork", 68_267, "causal"), ("1.9b-dense", 111_275, "none")]
)
def test_half_of_the_training_budget_ends_in_the_constant_phase(name: str, steps: int, routing: str) -> None:
    recipe, whole = single(name), single("1.9b")
    assert recipe.training.steps == steps
    check_ramps(recipe.training, warmup=5_000, decay=0)
    config = model_config(recipe, {}, None)
    assert config.routing == routing
    changed = {line.partition(":")[0] for line in differences(whole.to_dict(), recipe.to_dict())}
    schedule = {"steps", "schedule", "warmup_fraction", "decay_fraction", "end_fraction", "output"}
    assert changed == {f"training.{key}" for key in schedule} | ({"model.routing"} if routing == "none" else set())


def test_half_of_the_training_budget_is_of_tokens() -> None:
    fork, dense = (single(f"1.9b-{name}") for name in ("fork", "dense"))
    assert tokens(fork) / tokens(dense) == pytest.approx(0.6135, abs=1e-4)
    flops = [each.training.steps * training_flops(model_config(each, {}, None), BLOCK) for each in (fork, dense)]
    assert flops[0] / flops[1] == pytest.approx(1.207, abs=1e-3)


def test_the_largest_streamed_is_the_same_run_on_other_ways_to_its_data() -> None:
    streamed, prepared = single("1.9b-streamed"), single("1.9b")
    assert isinstance(streamed.data, StreamSection)
    assert isinstance(prepared.data, DataSection)
    assert list(differences(prepared.to_dict()["training"], streamed.to_dict()["training"])) == [
        "output: runs/paper/1.9b is now runs/paper/1.9b-streamed"
    ]
    assert streamed.model == prepared.model
    sources = {"fineweb": "hf:HuggingFaceFW/fineweb?config=CC-MAIN-2022-21&field=text", "pes2o": PES2O}
    assert streamed.data.stream == {sources["fineweb"]: 0.7, sources["pes2o"]: 0.3}
    for name, corpus in zip(streamed.data.stream, sources, strict=True):
        source = load_preparation(FOLDER.parent / "data" / f"{corpus}.yaml").sources[0]
        assert resolve_source(name) == resolve_source(source)
    assert all(streamed.data.lanes % gpus == 0 for gpus in (8, 16, 32))


def test_midtraining_goes_on_from_the_largest() -> None:
    recipe = single("midtraining")
    settings = recipe.training
    assert recipe.model == {"pretrained": single("1.9b-fork").training.output}
    assert settings.moments_from == recipe.model["pretrained"]
    assert isinstance(recipe.data, DataSection)
    assert recipe.data.mixture == {
        "runs/fineweb": 0.125,
        "runs/pes2o-12b": 0.125,
        "runs/gsm8k-aug": 0.4,
        "runs/mmlu": 0.05,
        "runs/smoltalk": 0.3,
    }
    assert (settings.steps, settings.batch_size, tokens(recipe)) == (8_500, 480, 2_088_960_000)
    assert (settings.learning_rate, settings.groups) == (2.5e-4, ALL_DECAY)
    rates = [rate_of_step(settings, step) for step in (1, 4_251, 8_500)]
    assert rates == pytest.approx([1, 0.55, 0.1], abs=1e-6)


def test_fine_tuning_goes_on_from_midtraining() -> None:
    recipe = single("gsm8k")
    settings = recipe.training
    assert isinstance(recipe.data, DataSection)
    assert recipe.data.path == "runs/gsm8k-aug"
    assert recipe.model == {"pretrained": single("midtraining").training.output}
    assert settings.moments_from == recipe.model["pretrained"]
    assert (settings.steps, settings.batch_size, settings.learning_rate) == (3_250, 480, 2.5e-5)
    assert settings.steps * settings.batch_size / 385_000 == pytest.approx(4, abs=0.1)
    assert settings.groups == ALL_DECAY
    check_ramps(settings, warmup=325, decay=0)
    assert settings.eval_tasks == ["gsm8k_bare"]


@pytest.mark.parametrize("name", [*COMPARISONS, *PRETRAINING])
def test_what_a_recipe_holds_at_a_time_fits_80_gb(name: str) -> None:
    single_run = name in SINGLE
    for variant in [None] if single_run else list(VARIANTS):
        path, gpus = str(FOLDER / f"{name}.yaml"), 8 if single_run else 1
        plan = make_plan(path, memory="80GB", gpus=gpus, variant=variant)
        assert plan.fit is not None
        assert plan.fit.fits
        assert plan.length == BLOCK


@pytest.mark.parametrize("gpus", [8, 16, 32])
def test_the_largest_is_shared_by_whole_nodes(gpus: int) -> None:
    plan = make_plan(str(FOLDER / "1.9b.yaml"), gpus=gpus)
    assert (plan.batch_size, plan.micro_batch_size) == (480, 5)


def test_every_folder_that_is_read_is_prepared_by_a_command_in_a_comment() -> None:
    text = "".join(path.read_text() for path in FOLDER.glob("*.yaml"))
    prepared = dict(re.findall(r"thoughtbubbles prepare (\S+) --recipe (\S+)", text))
    assert all((FOLDER.parents[1] / recipe).is_file() for recipe in prepared.values())
    read = set(CORPORA.values()) | {"runs/gsm8k-aug-usual"}
    for name in ("1.9b", "midtraining", "gsm8k"):
        data = single(name).data
        assert isinstance(data, DataSection)
        read |= {data.path} if data.path else set(data.mixture or {})
    streamed = single("1.9b-streamed").data
    assert isinstance(streamed, StreamSection)
    read |= set(streamed.validation)
    assert read == set(prepared)


def test_the_page_has_the_numbers_of_the_recipes() -> None:
    text = (FOLDER.parents[1] / "docs" / "paper.md").read_text()
    for name in ("1.9b-fork", "1.9b-dense", "midtraining", "gsm8k"):
        settings = single(name).training
        assert f"`{name}.yaml`" in text
        assert f"{settings.steps:,}" in text
        assert f"{settings.learning_rate:.1e}".replace("e-0", "e-") in text
    for name in ("midtraining", "gsm8k"):
        assert f"| {single(name).training.steps:,} x {single(name).training.batch_size}" in text
    for name in ("1.9b-fork", "1.9b-dense"):
        assert f"{tokens(single(name)) / 1e9:.1f} billion" in text
    for key in ("hidden_act: gelu_pytorch_tanh", "fork_embedding_init: normal"):
        assert f"`model.{key}`" in text
    # Every line of a table says where it is known from.
    tables = text.partition("## Every number")[2].partition("## Ours")[0]
    lines = [line.split("|")[1:-1] for line in tables.splitlines() if line.startswith("|")]
    assert len(lines) > 60
    assert {len(line) for line in lines} == {4}


def test_the_shapes_are_the_presets() -> None:
    for size, parameters in SIZES.items():
        assert count_parameters(ThoughtbubblesConfig.preset(size)) == parameters
