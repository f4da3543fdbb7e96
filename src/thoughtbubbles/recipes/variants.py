"""What is compared: the variants of a recipe (method: Controls)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from thoughtbubbles.recipes.options import option
from thoughtbubbles.recipes.training import RecipeError, lay_over
from thoughtbubbles.recipes.values import STRICT, Number, check_known, nearest, parse_section
from thoughtbubbles.support.errors import shown

# More steps than can be counted are no steps.
TokenShare = Annotated[Number, Field(gt=0, le=1_000_000)]


@dataclass(frozen=True, config=STRICT)
class Variant:
    """What a variant says otherwise."""

    like: str | None = option(
        "the variant that it begins as, shipped or listed before it; null is the shipped one of its own name", None
    )
    title: str = option(
        "in tables and plots, where {budget} stands for the model's budget; if not given, that of its shipped name, or "
        "its own name",
        "",
    )
    model: dict[str, Any] = option("fields of the model", {})
    training: dict[str, Any] = option("keys of the training section", {})
    tokens: TokenShare = option(
        "training tokens as a share of the recipe's; the schedule shrinks or grows with it", 1.0
    )
    flops_of: str | None = option("variant whose training FLOPs it may spend", None)
    spend: Literal["tokens", "layers", "width"] = option(
        "on what: tokens, or on as many tokens a model of more layers or width", "tokens"
    )
    rate_of: str | None = option("variant whose tuned learning rate it takes; null tunes its own", None)
    elastic: bool = option("train at the evaluation's budgets up to the model's own, one drawn for each step", False)

    @property
    def sections(self) -> dict[str, dict[str, Any]]:
        """What it says otherwise, by section."""
        return {"model": self.model, "training": self.training}


def _routed(title: str, routing: str, **others: Any) -> Variant:
    return Variant(title=title, model={"routing": routing, **others})


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
    "causal-attended": _routed("causal, attended forks, budget {budget}", "causal", fork_content="attended"),
    "causal-elastic": replace(_CAUSAL, title="causal, elastic to budget {budget}", elastic=True),
    "causal-half": replace(_CAUSAL, title="causal, budget {budget}, half the tokens", tokens=0.5, rate_of="causal"),
}
"""The variants that a comparison may name without saying more."""


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
    section = parse_section(Variant, f"variants.{name}", said, RecipeError)
    for key in ("output", "seed", "steps"):
        if key in section.training:
            raise RecipeError(
                f"variants.{name}.training.{key}: the comparison sets it; expected `tokens`, a share, or nothing"
            )
    known = {**SHIPPED, **listed}
    if section.like is not None:
        check_known(section.like, list(known), "variant", RecipeError, f"variants.{name}.like=")
    elif name not in SHIPPED and not (section.model or section.training):
        near = nearest(name, list(SHIPPED), "variants.")
        raise RecipeError(f"unknown variant variants.{name}, which says neither like nor model nor training: {near}")
    base = known.get(section.like or name, Variant(title=name))
    own = {key: getattr(section, key) for key in said if key not in ("like", "model", "training")}
    if section.like not in (None, name):
        own = {"title": name, **own}
    made = replace(base, **lay_over(base.sections, section.sections), **own)
    if made.spend != "tokens" and made.flops_of is None:
        raise RecipeError(f"variants.{name}.spend={made.spend}: expected flops_of, whose training FLOPs are spent")
    return made
