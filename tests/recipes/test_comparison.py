import math
import shutil
from pathlib import Path

import pytest
import yaml

from tests.comparison.conftest import tiny_comparison
from thoughtbubbles.comparison.runs import RunPlanner
from thoughtbubbles.data import PreparedData
from thoughtbubbles.recipes.comparison import describe_comparison, load_comparison, parse_comparison
from thoughtbubbles.recipes.training import RecipeError
from thoughtbubbles.recipes.variants import SHIPPED, parse_variants

RECIPES = sorted(Path("recipes/compare").glob("*.yaml"))
LEAST = {"output": "out", "data": {"path": "data"}, "training": {"steps": 4}}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_parse(path: Path) -> None:
    assert load_comparison(path).variants


def test_a_training_recipe_is_taken_over_without_its_run(tmp_path: Path) -> None:
    run = {**LEAST, "training": {"output": "elsewhere", "seed": 3, "steps": 5}}
    del run["output"]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    (tmp_path / "compare.yaml").write_text("extends: run.yaml\noutput: out\ntraining: {batch_size: 2}\n")
    made = load_comparison(tmp_path / "compare.yaml")
    assert made.base["training"] == {"steps": 5, "batch_size": 2}
    (tmp_path / "compare.yaml").write_text("extends: run.yaml\noutput: out\ntraining: {seed: 2}\n")
    with pytest.raises(RecipeError, match=r"training\.seed: the comparison sets it"):
        load_comparison(tmp_path / "compare.yaml")


def test_overrides_reach_every_level(tmp_path: Path) -> None:
    comparison = tiny_comparison(
        tmp_path, tmp_path, "seeds=[3]", "training.steps=7", "evaluation.blocks=9", "variants=[dense]", "output=there"
    )
    assert (comparison.settings.seeds, comparison.evaluation.blocks) == ([3], 9)
    assert (comparison.base["training"]["steps"], list(comparison.variants)) == (7, ["dense"])
    assert comparison.output == Path("there")


def test_without_variants_all_shipped_ones_are_compared() -> None:
    assert list(parse_comparison(LEAST).variants) == list(SHIPPED)


def test_budgets_are_sorted_by_value() -> None:
    assert parse_comparison({**LEAST, "evaluation": {"budgets": [4, "3/2", 1]}}).evaluation.budgets == [1, "3/2", 4]


def test_every_key_is_described() -> None:
    text = describe_comparison()
    for key in ("seeds", "baseline", "rate_of", "elastic", "learning_rates", "prefix_positions", "causal-half"):
        assert key in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"variants": ["dence"], "baseline": "dence"}, "unknown variant variants.dence, which says neither like nor"),
        ({"baseline": "dens"}, "unknown variant in baseline dens: did you mean dense"),
        ({"seeds": [1, 1]}, "seeds=[1, 1]: expected one or more, all different"),
        ({"seed": 1}, "unknown section seed: did you mean seeds"),
        ({"seeds": []}, "seeds=[]: expected one or more, all different"),
        ({"title": 3}, "title=3: expected text"),
        ({"task": "sleep"}, "task='sleep': expected pretrain or sft"),
        (
            {"task": "sft", "data": {"source": "a.jsonl"}, "tuning": {"learning_rates": [1e-3], "data": "./a.jsonl"}},
            "tuning.data=./a.jsonl: expected other data than data.source",
        ),
        (
            {"data": {"validation_source": "a"}, "tuning": {"learning_rates": [1e-3], "data": "a"}},
            "tuning.data=a: expected other data than data.validation_source",
        ),
        ({"evaluation": {"questions": 3}}, "evaluation.questions=3: expected"),
        ({"training": {"seed": 1}}, "training.seed: the comparison sets it"),
        ({"tuning": {"learning_rates": [1e-3]}}, "tuning.data is missing"),
        (
            {"tuning": {"learning_rates": [-1.0], "data": "d"}},
            "tuning.learning_rates[0]=-1.0: expected a number",
        ),
        ({"tuning": {"learning_rates": [1e-3], "data": "data"}}, "tuning.data=data: expected other data"),
        (
            {"data": {"stream": {"a": 1}}, "tuning": {"learning_rates": [1e-3], "data": "d"}},
            "tuning: expected data.path or data.mixture, since rates are tuned on prepared data alone",
        ),
        ({"evaluation": {"blocks": 0}}, "evaluation.blocks=0: expected at least 1"),
        ({"evaluation": {"budgets": [0.5]}}, "evaluation.budgets[0]: budget=0.5"),
        ({"evaluation": {"budgets": ["1e30000000"]}}, "evaluation.budgets[0]: budget='1e30000000': expected a number"),
        ({"evaluation": 3}, "evaluation: 3: expected keys and values"),
        ({"seeds": [0, -1]}, "seeds[1]=-1: expected a whole number from 0 to 4294967295"),
        ({"seeds": [2**32]}, "seeds[0]=4294967296: expected a whole number from 0 to 4294967295"),
        ({"tuning": {"learning_rates": [math.inf], "data": "d"}}, "tuning.learning_rates[0]=inf: expected a finite"),
        ({"tuning": {"learning_rates": [1e-3, 0.001], "data": "d"}}, "expected one or more, all different"),
        ({"tuning": {"learning_rates": [1e-3], "data": "d", "tokens": math.nan}}, "tuning.tokens=nan: expected a fin"),
        (
            {"tuning": {"learning_rates": [1e-3], "data": "d", "tokens": 1e300}},
            "tuning.tokens=1e+300: expected at most",
        ),
        ({"tuning": {"learning_rates": [1e-3], "data": "./x/../data"}}, "tuning.data=./x/../data: expected other data"),
        (
            {"data": {"mixture": {"a": 1, "./b": 1}}, "tuning": {"learning_rates": [1e-3], "data": "b"}},
            "tuning.data=b: expected other data than data.mixture",
        ),
        ({"model": 3}, "model: 3: expected keys and values"),
    ],
)
def test_bad_recipes_are_refused_in_a_line(content: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_comparison({**LEAST, **content})
    assert message in str(caught.value)


def test_a_missing_output_is_named() -> None:
    with pytest.raises(RecipeError, match=r"^output is missing: expected the folder for the runs and the report$"):
        parse_comparison({"data": {"path": "data"}, "training": {"steps": 4}})


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        (["dense", "copy_root"], "did you mean variants.copy-root?"),
        (["pausee"], "did you mean variants.pause?"),
        ({"randm": {"rate_of": "causal"}, "causal": None}, "did you mean variants.random?"),
        ({"Causal": {"tokens": 0.5, "title": "mine"}}, "did you mean variants.causal?"),
        ({"topk2": {"model": {}, "training": {}}}, "did you mean variants.topk?"),
        ({"x": {"like": None}}, "expected one of dense, "),
    ],
)
def test_a_misspelt_variant_is_refused_with_the_nearest(variants: object, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_variants(variants)
    assert "which says neither like nor model nor training: " in str(caught.value)
    assert message in str(caught.value)


def test_a_variant_of_ones_own_has_a_model_or_a_training_of_its_own() -> None:
    variants = parse_variants({"wide": {"model": {"hidden_size": 64}}, "slow": {"training": {"learning_rate": 1e-4}}})
    assert variants["wide"].sections == {"model": {"hidden_size": 64}, "training": {}}
    assert (variants["slow"].title, variants["slow"].sections["training"]) == ("slow", {"learning_rate": 1e-4})


def test_rates_are_tuned_on_one_folder_where_the_comparison_mixes_several(
    tmp_path: Path, tiny_data: PreparedData, other_data: PreparedData
) -> None:
    shutil.copytree(tiny_data.path, tmp_path / "second")
    mixture = f"data.mixture={{{tiny_data.path}: 3, {tmp_path / 'second'}: 1}}"
    tuning = f"tuning={{learning_rates: [1e-3], data: {other_data.path}}}"
    runs = RunPlanner(tiny_comparison(tmp_path, tiny_data.path, "data.path=null", mixture, tuning)).tuning_runs()
    assert {run.recipe.data.path for run in runs} == {str(other_data.path)}


def test_a_variant_begins_as_another() -> None:
    variants = parse_variants(
        {"causal": None, "sharp": {"like": "causal", "model": {"merge": "root"}, "tokens": 0.25, "rate_of": "causal"}}
    )
    sharp = variants["sharp"]
    assert sharp.sections["model"] == {"routing": "causal", "merge": "root"}
    assert (sharp.title, sharp.tokens, sharp.rate_of) == ("sharp", 0.25, "causal")
    assert variants["causal"].sections["model"] == {"routing": "causal"}


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ([], ": expected names, such as"),
        ({"a/b": None}, "variants.a/b: expected a name that can be a folder's"),
        ({"x": {"like": "causl"}}, "unknown variant variants.x.like=causl: did you mean variants.x.like=causal"),
        ({"x": {"token": 1}}, "unknown key variants.x.token: did you mean variants.x.tokens"),
        ({"x": {"tokens": 0, "like": "causal"}}, "variants.x.tokens=0: expected a number above 0"),
        ({"x": {"tokens": 1e300, "like": "causal"}}, "variants.x.tokens=1e+300: expected at most 1,000,000"),
        ({"": {"like": "causal"}}, "variants.: expected a name that can be a folder's"),
        ({"x": {"training": {"steps": 3}}}, "variants.x.training.steps: the comparison sets it"),
        ({"x": {"model": 3}}, "variants.x.model=3: expected a mapping"),
        ({"x": {"like": "causal", "title": None}}, "variants.x.title=None: expected text"),
        (
            {"x": {"like": "causal", "spend": "heads"}},
            "variants.x.spend='heads': expected one of tokens, layers",
        ),
        ({"x": {"like": "dense", "spend": "width"}}, "variants.x.spend=width: expected flops_of, whose training FLOPs"),
        ({"x": 3}, "variants.x: 3: expected keys and values"),
        ({"dense-flops": None}, "unknown variant in variants.dense-flops.flops_of causal"),
        ({"dense": None, "x": {"like": "dense", "rate_of": "y"}}, "unknown variant in variants.x.rate_of y"),
        (
            {"pause": {"rate_of": "topk"}, "topk": {"rate_of": "causal"}, "causal": None},
            "variants.pause.rate_of=topk: expected a variant with",
        ),
        (
            {"dense": None, "causal": {"flops_of": "topk"}, "topk": {"flops_of": "causal"}},
            "expected a variant of tokens of its own",
        ),
    ],
)
def test_bad_variants_are_refused_in_a_line(variants: object, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_variants(variants)
    assert message in str(caught.value)
