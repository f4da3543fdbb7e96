"""What is compared: the variants of a recipe (Design 3.3)."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from thoughtbubbles.options import check_known, convert
from thoughtbubbles.training.recipe import RecipeError, lay_over

SECTIONS = ("model", "training")


@dataclass(frozen=True)
class Variant:
    """A set of overrides of the recipe that all variants share.

    Attributes:
        title: in tables and plots; {budget} stands for the model's budget.
        sections: what it says otherwise, by section: model and training.
        tokens: training tokens, as a share of the recipe's; the schedule shrinks or grows with it.
        flops_of: the variant whose training FLOPs it may spend; its tokens follow from that.
        rate_of: the variant whose tuned learning rate it takes; None tunes its own.
        elastic: train at the evaluation's budgets up to the model's own, one drawn for each step.
    """

    title: str
    sections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tokens: float = 1.0
    flops_of: str | None = None
    rate_of: str | None = None
    elastic: bool = False


def _routed(title: str, routing: str, **others: Any) -> Variant:
    return Variant(title, {"model": {"routing": routing, **others}})


_DENSE, _CAUSAL = _routed("dense", "none"), _routed("causal, budget {budget}", "causal")
SHIPPED: dict[str, Variant] = {
    "dense": _DENSE,
    "dense-flops": replace(_DENSE, title="dense, the FLOPs of causal", flops_of="causal", rate_of="dense"),
    "dense-half": replace(_DENSE, title="dense, half the tokens", tokens=0.5, rate_of="dense"),
    "budget-1": _routed("budget 1: gates, no forks", "causal", budget=1),
    "copy-root": _routed("Copy-{budget}, root", "copy", merge="root"),
    "copy-average": _routed("Copy-{budget}, average", "copy"),
    "pause": _routed("pause, {budget} streams", "pause", merge="root"),
    "random": _routed("random forks, budget {budget}", "random"),
    "uniform": _routed("uniform forks, budget {budget}", "uniform"),
    "no-attenuation": _routed("causal, no attenuation, budget {budget}", "causal", attenuation="none"),
    "topk": _routed("topk, budget {budget}", "topk"),
    "causal": _CAUSAL,
    "causal-elastic": replace(_CAUSAL, title="causal, elastic to budget {budget}", elastic=True),
    "causal-half": replace(_CAUSAL, title="causal, budget {budget}, half the tokens", tokens=0.5, rate_of="causal"),
}
"""The variants that a comparison may name without saying more."""

_KINDS: dict[str, Any] = {
    "title": str,
    "tokens": float,
    "flops_of": str | None,
    "rate_of": str | None,
    "elastic": bool,
}


def parse_variants(content: Any) -> dict[str, Variant]:
    """The variants that a recipe lists, a name and what it says otherwise for each.

    A name of `SHIPPED` begins as that; `like` begins as another one, shipped or listed above.

    Raises:
        RecipeError: for anything else, or a reference to a variant that is not listed.
    """
    if isinstance(content, list) and all(isinstance(name, str) for name in content):
        content = dict.fromkeys(content)
    if not isinstance(content, dict) or not content:
        raise RecipeError(f"variants={content!r}: expected names, such as [dense, budget-1, causal], or a mapping")
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
    if "/" in name or name.startswith("."):
        raise RecipeError(f"variants.{name}: expected a name that can be a folder's")
    said = {} if said is None else said
    if not isinstance(said, dict):
        raise RecipeError(f"variants.{name}={said!r}: expected keys and values, or nothing")
    for key in said:
        check_known(key, ["like", *_KINDS, *SECTIONS], "key", RecipeError, f"variants.{name}.")
    known = {**SHIPPED, **listed}
    like = said.get("like", name)
    if like not in known and "like" not in said:
        base = Variant(name)
    else:
        check_known(like, list(known), "variant", RecipeError, f"variants.{name}.like=")
        base = known[like]
    if like != name:
        base = replace(base, title=name)
    values = {
        key: convert(f"variants.{name}.{key}", said[key], kind, RecipeError)
        for key, kind in _KINDS.items()
        if key in said
    }
    sections = {key: _section(name, key, said[key]) for key in SECTIONS if key in said}
    made = replace(base, sections=lay_over(base.sections, sections), **values)
    if not made.tokens > 0:
        raise RecipeError(f"variants.{name}.tokens={made.tokens}: expected a share of the recipe's tokens, above 0")
    return made


def _section(name: str, section: str, values: Any) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise RecipeError(f"variants.{name}.{section}={values!r}: expected keys and values")
    for key in values:
        if (section, key) in {("training", "output"), ("training", "seed"), ("training", "steps")}:
            raise RecipeError(f"variants.{name}.{section}.{key}: the comparison sets it; expected `tokens` or nothing")
    return values
