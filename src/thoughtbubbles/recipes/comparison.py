"""The recipe of a comparison: one base, variants, seeds, how to tune and how to measure."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic.dataclasses import dataclass

from thoughtbubbles.model.budget import parse_budget
from thoughtbubbles.model.configuration import ThoughtbubblesConfig
from thoughtbubbles.recipes.options import option
from thoughtbubbles.recipes.training import (
    AnyBudget,
    RecipeError,
    apply_override,
    folder_identity,
    lay_over,
    read_sections,
)
from thoughtbubbles.recipes.values import (
    STRICT,
    Count,
    Different,
    Positive,
    Seed,
    UserPath,
    check_known,
    check_mapping,
    convert,
    describe_section,
    parse_section,
)
from thoughtbubbles.recipes.variants import SHIPPED, TokenShare, Variant, parse_variants
from thoughtbubbles.support.errors import shown

__all__ = ["load_comparison", "parse_comparison"]

BASE = ("model", "data", "training")


@dataclass(config=STRICT)
class TuningSection:
    """How each variant's learning rate is found before the comparison."""

    learning_rates: Annotated[list[Positive], Different] = option(
        "rates to try; each variant takes the one of lowest validation loss"
    )
    data: UserPath = option("prepared folder to tune on: its validation is not that of the comparison")
    tokens: TokenShare = option("training tokens of a try, as a share of the comparison's", 0.25)


@dataclass(config=STRICT)
class EvaluationSection:
    """How each trained model is measured."""

    blocks: Count = option("validation blocks, evenly spaced", 512)
    budgets: list[AnyBudget] = option("budgets to evaluate at, beside 1 and the model's own", [1, 1.5, 2, 3, 4])
    prefix_blocks: Count = option("blocks of which some predictions are made from their prefix alone", 256)
    prefix_positions: Count = option("how many of each of these blocks", 8)
    batch_size: Count = option("blocks at a time", 16)

    def __post_init__(self) -> None:
        self.budgets.sort(key=parse_budget)


@dataclass(config=STRICT)
class ComparisonSection:
    """What belongs to the comparison itself; these keys stand at the top of its recipe."""

    output: UserPath = option("folder for the runs and the report")
    title: str = option("of tables and plots", "")
    seeds: Annotated[list[Seed], Different] = option("a run of each variant for each of these seeds", [0])
    baseline: str = option("the variant that the others are compared with", "dense")


SECTIONS = {"tuning": TuningSection, "evaluation": EvaluationSection}
PLAIN = ("output", "title", "seeds", "baseline", "variants")


@dataclass(frozen=True, config=STRICT)
class Comparison:
    """A comparison.

    Attributes:
        base: the sections model, data and training of a training recipe that all variants share.
        variants: by name, in the order of tables.
        settings: output, seeds, baseline.
        tuning: None trains at the rates that the recipe says.
        evaluation: how each trained model is measured.
    """

    base: dict[str, Any]
    variants: dict[str, Variant]
    settings: ComparisonSection
    tuning: TuningSection | None
    evaluation: EvaluationSection

    @property
    def output(self) -> Path:
        """Folder for the runs and the report."""
        return Path(self.settings.output)


def load_comparison(path: str | Path, overrides: Iterable[str] = ()) -> Comparison:
    """Read the recipe of a comparison and apply `section.key=value` and `key=value` overrides.

    The sections model, data and training are those of a training recipe, which it may also take over by `extends`.

    Raises:
        RecipeError: no such file, not YAML, an unknown or missing key, or a value of the wrong type.
    """
    content = read_sections(Path(path))
    for override in overrides:
        apply_override(content, override, [*PLAIN, *BASE, *SECTIONS], [*PLAIN, *SECTIONS])
    return parse_comparison(content)


def parse_comparison(content: Mapping[str, Any]) -> Comparison:
    """The comparison that some sections make.

    Raises:
        RecipeError: an unknown or missing key, or a value of the wrong type.
    """
    if content.get("task", "pretrain") != "pretrain":
        raise RecipeError(f"task={shown(content['task'])}: expected pretrain, which compares on blocks of text")
    for name, values in content.items():
        check_known(name, ["task", *PLAIN, *BASE, *SECTIONS], "section", RecipeError)
        if name in BASE:
            check_mapping(name, values, RecipeError)
    own = {name: content[name] for name in PLAIN[:-1] if name in content}
    settings = parse_section(ComparisonSection, "", own, RecipeError)
    variants = parse_variants(content.get("variants", list(SHIPPED)))
    check_known(settings.baseline, list(variants), "variant in baseline", RecipeError)
    for name in ("output", "seed"):
        if name in content.get("training", {}):
            raise RecipeError(f"training.{name}: the comparison sets it; expected `output` or `seeds` at the top")
    return Comparison(
        base={name: dict(content.get(name, {})) for name in BASE},
        variants=variants,
        settings=settings,
        tuning=_tuning(content["tuning"], content) if content.get("tuning") is not None else None,
        evaluation=parse_section(EvaluationSection, "evaluation", content.get("evaluation") or {}, RecipeError),
    )


def describe_comparison() -> str:
    """Every key that the recipe of a comparison may have, with its type, its default and what it means."""
    lines = [
        "The recipe of a comparison is a YAML file; `extends: OTHER.yaml` takes over what it does not say itself.",
        "",
        *describe_section(ComparisonSection, ""),
        "",
        "model, data, training: those of a training recipe (thoughtbubbles train --help-recipe), for all variants;",
        "    output, seed and tuned learning rates are the comparison's own",
        "",
        f"variants: names, or a mapping of names to what they say otherwise [{', '.join(SHIPPED)}]",
        *describe_section(Variant),
    ]
    for name, section in SECTIONS.items():
        lines += ["", f"{name}: {(section.__doc__ or '').splitlines()[0].rstrip('.').lower()}"]
        lines += describe_section(section)
    return "\n".join(lines)


def _tuning(values: Any, content: Mapping[str, Any]) -> TuningSection:
    tuning = parse_section(TuningSection, "tuning", values, RecipeError)
    if content.get("data", {}).get("stream") is not None:
        raise RecipeError("tuning: expected data.path or data.mixture, since rates are tuned on prepared data alone")
    _check_other_data(tuning.data, content.get("data", {}))
    return tuning


def _check_other_data(folder: str, data: Mapping[str, Any]) -> None:
    """Refuse to tune on a folder of the comparison, however it is spelt."""
    mixture = data.get("mixture")
    for key, compared in (("path", [data.get("path")]), ("mixture", mixture if isinstance(mixture, dict) else [])):
        ours = [convert(f"data.{key}", each, UserPath, RecipeError) for each in compared if isinstance(each, str)]
        if folder_identity(folder) in map(folder_identity, ours):
            raise RecipeError(
                f"tuning.data={folder}: expected other data than data.{key}: rates tuned on the validation that is "
                "reported would flatter it"
            )


def variant_sections(comparison: Comparison, variant: Variant, seed: int, folder: Path) -> dict[str, Any]:
    """The sections of a variant's training recipe, with the steps of the comparison.

    Args:
        seed: of the run.
        folder: of the run.
    """
    content = lay_over(comparison.base, variant.sections)
    content = lay_over(content, {"training": {"output": str(folder), "seed": seed}})
    if variant.elastic:
        content = lay_over(content, {"training": {"training_budgets": _elastic_budgets(comparison, content["model"])}})
    return content


def _elastic_budgets(comparison: Comparison, model: Mapping[str, Any]) -> list[Any]:
    own = model.get("budget", ThoughtbubblesConfig.budget)
    try:
        exact = parse_budget(own, "model.budget")
    except ValueError as error:
        raise RecipeError(str(error)) from None
    return [*(each for each in comparison.evaluation.budgets if parse_budget(each) < exact), own]
