"""What is compared: the variants of a recipe (method: Controls)."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from thoughtbubbles.recipes.training import RecipeError, lay_over, parse_section
from thoughtbubbles.recipes.values import check_known, nearest
from thoughtbubbles.support.errors import shown
from thoughtbubbles.support.options import option


@dataclass(frozen=True)
class Variant:
    """A set of overrides of the recipe that all variants share.

    Attributes:
        title: in tables and plots; {budget} stands for the model's budget.
        sections: what it says otherwise, by section: model and training.
        tokens: training tokens, as a share of the recipe's; the schedule shrinks or grows with it.
        flops_of: the variant whose training FLOPs it may spend.
        spend: on what: `tokens`, more of them, or on as many tokens a model of more `layers` or `width`.
        rate_of: the variant whose tuned learning rate it takes; None tunes its own.
        elastic: train at the evaluation's budgets up to the model's own, one drawn for each step.
    """

    title: str
    sections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tokens: float = 1.0
    flops_of: str | None = None
    spend: str = "tokens"
    rate_of: str | None = None
    elastic: bool = False


def _routed(title: str, routing: str, **others: Any) -> Variant:
    return Variant(title, {"model": {"routing": routing, **others}})


_DENSE, _CAUSAL = _routed("dense", "none"), _routed("causal, budget {budget}", "causal")
SHIPPED: dict[str, Variant] = {
    "dense": _DENSE,
    "dense-flops": replace(_DENSE, title="dense, the FLOPs of causal", flops_of="causal", rate_of="dense"),
    "looped": _routed("dense, all layers twice", "none", num_loops=2),
    "deeper": replace(_DENSE, title="dense with more layers, the FLOPs of causal", flops_of="causal", spend="layers"),
    "wider": replace(_DENSE, title="dense and wider, the FLOPs of causal", flops_of="causal", spend="width"),
    "dense-half": replace(_DENSE, title="dense, half the tokens", tokens=0.5, rate_of="dense"),
    "budget-1": _routed("budget 1: gates, no forks", "causal", budget=1),
    "fixed-gates": _routed("fixed gates, no forks", "causal", budget=1, gate_scores="fixed"),
    "copy-root": _routed("Copy-{budget}, root", "copy", merge="root"),
    "copy-average": _routed("Copy-{budget}, average", "copy"),
    "pause": _routed("pause, {budget} streams", "pause", merge="root"),
    "random": _routed("random forks, budget {budget}", "random"),
    "uniform": _routed("uniform forks, budget {budget}", "uniform"),
    "no-attenuation": _routed("causal, no attenuation, budget {budget}", "causal", attenuation="none"),
    "threshold": _routed("threshold, budget {budget}", "threshold"),
    "topk": _routed("topk, budget {budget}", "topk"),
    "causal": _CAUSAL,
    "causal-relative": _routed("causal, relative fork embedding, budget {budget}", "causal", fork_embedding="relative"),
    "causal-elastic": replace(_CAUSAL, title="causal, elastic to budget {budget}", elastic=True),
    "causal-half": replace(_CAUSAL, title="causal, budget {budget}, half the tokens", tokens=0.5, rate_of="causal"),
}
"""The variants that a comparison may name without saying more."""

# Of the recipe's tokens: more steps than can be counted are no steps.
MOST_SHARE = 1_000_000
OWN = ("title", "tokens", "flops_of", "spend", "rate_of", "elastic")
SPENDING = ("tokens", "layers", "width")


@dataclass
class VariantSection:
    """What a variant says otherwise."""

    like: str | None = option(
        "the variant that it begins as, shipped or listed before it; null is the shipped one of its own name", None
    )
    title: str | None = option("in tables and plots; {budget} stands for the model's budget", None)
    model: dict[str, Any] = option("fields of the model", {})
    training: dict[str, Any] = option("keys of the training section", {})
    tokens: float = option("training tokens as a share of the recipe's; the schedule shrinks or grows with it", 1.0)
    flops_of: str | None = option("variant whose training FLOPs it may spend", None)
    spend: str = option("on what: tokens, or on as many tokens a model of more layers or width", "tokens")
    rate_of: str | None = option("variant whose tuned learning rate it takes; null tunes its own", None)
    elastic: bool = option("train at the evaluation's budgets up to the model's own, one drawn for each step", False)


def parse_variants(content: Any) -> dict[str, Variant]:
    """The variants that a recipe lists, a name and what it says otherwise for each.

    A name of `SHIPPED` begins as that; `like` begins as another one, shipped or listed above. Any other name has a
    `model` or `training` of its own.

    Raises:
        RecipeError: for anything else, or a reference to a variant that is not listed.
    """
    if isinstance(content, list) and all(isinstance(name, str) for name in content):
        content = dict.fromkeys(content)
    if not isinstance(content, dict) or not content:
        raise RecipeError(f"variants={shown(content)}: expected names, such as [dense, budget-1, causal], or a mapping")
    variants: dict[str, Variant] = {}
    for name, said in content.items():
        variants[str(name)] = _parse_variant(str(name), said, variants)
    for name, variant in variants.items():
        for key in ("flops_of", "rate_of"):
            if (other := getattr(variant, key)) is not None:
                check_known(other, list(variants), f"variant in variants.{name}.{key}", RecipeError)
        if variant.flops_of is not None and variants[variant.flops_of].flops_of is not None:
            raise RecipeError(f"variants.{name}.flops_of={variant.flops_of}: expected a variant of tokens of its own")
        if variant.rate_of is not None and variants[variant.rate_of].rate_of not in (None, variant.rate_of):
            raise RecipeError(f"variants.{name}.rate_of={variant.rate_of}: expected a variant with a rate of its own")
    return variants


def _parse_variant(name: str, said: Any, listed: Mapping[str, Variant]) -> Variant:
    if not name or "/" in name or "\0" in name or name.startswith("."):
        raise RecipeError(f"variants.{name}: expected a name that can be a folder's")
    said = {} if said is None else said
    if not isinstance(said, dict):
        raise RecipeError(f"variants.{name}={shown(said)}: expected keys and values, or nothing")
    section = parse_section(VariantSection, f"variants.{name}", said)
    for key in ("model", "training"):
        _check_free(f"variants.{name}.{key}", getattr(section, key))
    known = {**SHIPPED, **listed}
    if section.like is not None:
        check_known(section.like, list(known), "variant", RecipeError, f"variants.{name}.like=")
    elif name not in SHIPPED and not (section.model or section.training):
        near = nearest(name, list(SHIPPED), "variants.")
        raise RecipeError(f"unknown variant variants.{name}, which says neither like nor model nor training: {near}")
    base = known.get(section.like or name, Variant(name))
    values = {key: getattr(section, key) for key in OWN if key in said}
    if section.like not in (None, name):
        values = {"title": name, **values}
    sections = lay_over(base.sections, {"model": section.model, "training": section.training})
    made = replace(base, sections=sections, **values)
    if made.spend not in SPENDING:
        raise RecipeError(f"variants.{name}.spend={shown(made.spend)}: expected one of {', '.join(SPENDING)}")
    if made.spend != "tokens" and made.flops_of is None:
        raise RecipeError(f"variants.{name}.spend={made.spend}: expected flops_of, whose training FLOPs are spent")
    if not 0 < made.tokens <= MOST_SHARE:
        raise RecipeError(
            f"variants.{name}.tokens={made.tokens}: expected a share of the recipe's tokens, above 0 and at most "
            f"{MOST_SHARE:,}"
        )
    return made


def _check_free(key: str, values: Mapping[str, Any]) -> None:
    for name in values:
        if key.endswith(".training") and name in ("output", "seed", "steps"):
            raise RecipeError(f"{key}.{name}: the comparison sets it; expected `tokens`, a share, or nothing")
