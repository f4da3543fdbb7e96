"""The recipe of a comparison: one base, variants, seeds, how to tune and how to measure."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic.dataclasses import dataclass

from thoughtbubbles.model.budget import parse_budget
from thoughtbubbles.model.configuration import ThoughtbubblesConfig
from thoughtbubbles.recipes.options import option
from thoughtbubbles.recipes.training import (
    TASKS,
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
    expand_home,
    parse_section,
    read_yaml,
)
from thoughtbubbles.recipes.variants import SHIPPED, TokenShare, Variant, parse_variants
from thoughtbubbles.support.errors import shown

__all__ = ["load_comparison", "parse_comparison"]

BASE = ("model", "data", "training")
OF_A_RUN = ("output", "seed")
"""Keys of the training section that a comparison sets for each run."""


@dataclass(config=STRICT)
class TuningSection:
    """How each variant's learning rate is found before the comparison."""

    learning_rates: Annotated[list[Positive], Different] = option(
        "rates to try; each variant takes the one of lowest validation loss"
    )
    data: UserPath = option(
        "prepared folder to tune on, or with task: sft rows, some of which are held out: not those of the comparison"
    )
    tokens: TokenShare = option("training tokens of a try, as a share of the comparison's", 0.25)


@dataclass(config=STRICT)
class EvaluationSection:
    """How each trained model is measured."""

    blocks: Count = option("validation blocks (or rows), evenly spaced", 512)
    budgets: list[AnyBudget] = option("budgets to evaluate at, beside 1 and the model's own", [1, 1.5, 2, 3, 4])
    prefix_blocks: Count = option("blocks of which some predictions are made from their prefix alone", 256)
    prefix_positions: Count = option("how many of each of these blocks", 8)
    batch_size: Count = option("blocks at a time", 16)
    questions: UserPath | None = option(
        "file of questions to ask each model, as `thoughtbubbles exact-match` does, at the same budgets", None
    )

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
        base: task and the sections model, data and training of a training recipe, which all variants share.
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

    task and the sections model, data and training are those of a training recipe, which it may also take over by
    `extends`, but for its output and its seed.

    Raises:
        RecipeError: no such file, not YAML, an unknown or missing key, or a value of the wrong type.
    """
    content = read_sections(Path(path))
    _leave_run(content, read_yaml(Path(expand_home(str(path))), RecipeError))
    for override in overrides:
        apply_override(content, override, [*PLAIN, *BASE, *SECTIONS], ["task", *PLAIN, *SECTIONS])
    return parse_comparison(content)


def _leave_run(content: dict[str, Any], own: Mapping[str, Any]) -> None:
    """Take out of the sections what a training recipe that they extend says of its own run alone."""
    training, said = content.get("training"), own.get("training")
    if isinstance(training, dict):
        kept = said if isinstance(said, dict) else {}
        content["training"] = {name: value for name, value in training.items() if name not in OF_A_RUN or name in kept}


def parse_comparison(content: Mapping[str, Any]) -> Comparison:
    """The comparison that some sections make.

    Raises:
        RecipeError: an unknown or missing key, or a value of the wrong type.
    """
    if (task := content.get("task", "pretrain")) not in TASKS:
        raise RecipeError(f"task={shown(task)}: expected {' or '.join(TASKS)}")
    for name, values in content.items():
        check_known(name, ["task", *PLAIN, *BASE, *SECTIONS], "section", RecipeError)
        if name in BASE:
            check_mapping(name, values, RecipeError)
    own = {name: content[name] for name in PLAIN[:-1] if name in content}
    settings = parse_section(ComparisonSection, "", own, RecipeError)
    variants = parse_variants(content.get("variants", list(SHIPPED)))
    check_known(settings.baseline, list(variants), "variant in baseline", RecipeError)
    for name in OF_A_RUN:
        if name in content.get("training", {}):
            raise RecipeError(f"training.{name}: the comparison sets it; expected `output` or `seeds` at the top")
    return Comparison(
        base={"task": task, **{name: dict(content.get(name, {})) for name in BASE}},
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
        "task, model, data, training: those of a training recipe (thoughtbubbles train --help-recipe), for all",
        "    variants; output, seed and tuned learning rates are the comparison's own",
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


def _check_other_data(path: str, data: Mapping[str, Any]) -> None:
    """Refuse to tune on data of the comparison, however they are spelt."""
    mixture = data.get("mixture")
    named = {key: [data.get(key)] for key in ("path", "source", "validation_source")}
    for key, compared in {**named, "mixture": mixture if isinstance(mixture, dict) else []}.items():
        ours = [convert(f"data.{key}", each, UserPath, RecipeError) for each in compared if isinstance(each, str)]
        if folder_identity(path) in map(folder_identity, ours):
            raise RecipeError(
                f"tuning.data={path}: expected other data than data.{key}: rates tuned on the validation that is "
                "reported would flatter it"
            )


def tuning_sections(comparison: Comparison) -> dict[str, dict[str, Any]]:
    """What the recipes of the runs that tune say otherwise of their data; nothing where none do."""
    if comparison.tuning is None:
        return {}
    path = comparison.tuning.data
    if comparison.base["task"] == "sft":
        return {"data": {"source": path, "validation_source": None}}
    return {"data": {"path": path, "mixture": None}}


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
