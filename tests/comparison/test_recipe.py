from pathlib import Path

import pytest

from tests.comparison.conftest import tiny_comparison
from thoughtbubbles.comparison.recipe import describe_comparison, load_comparison, parse_comparison
from thoughtbubbles.comparison.variants import SHIPPED, parse_variants
from thoughtbubbles.training.recipe import RecipeError

RECIPES = sorted(Path("recipes/compare").glob("*.yaml"))
LEAST = {"output": "out", "data": {"path": "data"}, "training": {"steps": 4}}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_parse(path: Path) -> None:
    assert load_comparison(path).variants


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
        ({"variants": ["dence"], "baseline": "dence"}, None),
        ({"baseline": "dens"}, "unknown variant in baseline dens: did you mean dense"),
        ({"seeds": [1, 1]}, "seeds=[1, 1]: expected one or more, all different"),
        ({"seed": 1}, "unknown section seed: did you mean seeds"),
        ({"task": "sft"}, "task='sft': expected pretrain"),
        ({"training": {"seed": 1}}, "training.seed: the comparison sets it"),
        ({"tuning": {"learning_rates": [1e-3]}}, "tuning.data is missing"),
        ({"tuning": {"learning_rates": [-1.0], "data": "d"}}, "tuning.learning_rates=[-1.0]: expected rates above 0"),
        ({"tuning": {"learning_rates": [1e-3], "data": "data"}}, "tuning.data=data: expected other data"),
        (
            {"data": {"stream": {"a": 1}}, "tuning": {"learning_rates": [1e-3], "data": "d"}},
            "tuning: expected data.path or data.mixture, since rates are tuned on prepared data alone",
        ),
        ({"evaluation": {"blocks": 0}}, "evaluation.blocks=0: expected at least 1"),
        ({"evaluation": {"budgets": [0.5]}}, "evaluation.budgets[0]: budget=0.5"),
        ({"evaluation": 3}, "evaluation: 3: expected keys and values"),
        ({"model": 3}, "model: 3: expected keys and values"),
    ],
)
def test_bad_recipes_are_refused_in_a_line(content: dict[str, object], message: str | None) -> None:
    if message is None:  # a name of one's own is allowed: it is the base recipe
        assert parse_comparison({**LEAST, **content}).variants["dence"].title == "dence"
        return
    with pytest.raises(RecipeError) as caught:
        parse_comparison({**LEAST, **content})
    assert message in str(caught.value)


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
        ({"x": {"tokens": 0}}, "variants.x.tokens=0.0: expected a share"),
        ({"x": {"training": {"steps": 3}}}, "variants.x.training.steps: the comparison sets it"),
        ({"x": {"model": 3}}, "variants.x.model=3: expected a mapping"),
        ({"x": 3}, "variants.x=3: expected keys and values"),
        ({"dense-flops": None}, "unknown variant in variants.dense-flops.flops_of causal"),
        ({"dense": None, "x": {"rate_of": "y"}}, "unknown variant in variants.x.rate_of y"),
        ({"a": {"rate_of": "b"}, "b": {"rate_of": "c"}, "c": None}, "variants.a.rate_of=b: expected a variant with"),
        (
            {"dense": None, "causal": {"flops_of": "x"}, "x": {"flops_of": "causal"}},
            "expected a variant of tokens of its own",
        ),
    ],
)
def test_bad_variants_are_refused_in_a_line(variants: object, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_variants(variants)
    assert message in str(caught.value)
