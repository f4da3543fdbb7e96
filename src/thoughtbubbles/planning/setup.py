"""What is to be planned: a model, and how it is to be trained, from the name of a preset, a recipe or a model."""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thoughtbubbles.model.budget import Budget, parse_budget
from thoughtbubbles.model.configuration import PRESETS, ThoughtbubblesConfig
from thoughtbubbles.model.loading import load_config
from thoughtbubbles.recipes.options import PlanOptions
from thoughtbubbles.support.errors import InputError

if TYPE_CHECKING:
    from thoughtbubbles.recipes.training import Recipe

DEFAULT_BATCH_SIZE = 16
"""Rows of a step for each GPU, where nothing says how many."""


@dataclass(frozen=True)
class Setup:
    """A model and how it is to be trained.

    Attributes:
        config: of the model.
        length: tokens a row.
        batch_size: rows of an optimizer step, all GPUs together.
        micro_batch_size: rows of one forward pass on one GPU.
        precision: float32 or bfloat16.
        checkpointing: whether activations are computed again in the backward pass.
        gpus: that train it together.
        sharding: how several of them share it, ddp or fsdp.
        steps: optimizer steps; None where nothing says how many.
        budgets: those that steps draw from, empty for the model's own.
        seed: by which they do.
        ramp: share of the steps in which the budget rises from 1 to the model's own.
        notes: what was assumed, in words.
    """

    config: ThoughtbubblesConfig
    length: int
    batch_size: int
    micro_batch_size: int
    precision: str
    checkpointing: bool
    gpus: int
    sharding: str
    steps: int | None
    budgets: tuple[Budget, ...] = ()
    seed: int = 0
    ramp: float = 0.0
    notes: tuple[str, ...] = ()


def read_setup(name: str, options: PlanOptions) -> Setup:
    """What a name stands for, changed as the options say.

    Raises:
        InputError: naming the value and what was expected.
    """
    is_recipe = Path(name).suffix in (".yaml", ".yml")
    if options.variant is not None and not is_recipe:
        raise _no_comparison(options.variant)
    if name in PRESETS:
        # A preset is no trained model: its longest row is no limit.
        longest = {} if options.length is None else {"max_position_embeddings": options.length}
        setup = _setup_of_model(ThoughtbubblesConfig.preset(name, **longest), options)
    elif is_recipe:
        setup = _setup_of_recipe(_load_recipe(name, options), options.gpus)
    elif Path(name).is_dir():
        setup = _setup_of_model(load_config(name), options)
    else:
        raise InputError(
            f"config {name!r}: expected a preset ({', '.join(PRESETS)}), a recipe (.yaml) or the folder of a model"
        )
    return _changed(setup, options)


def _changed(setup: Setup, options: PlanOptions) -> Setup:
    given: dict[str, Any] = {"length": options.length, "precision": options.precision, "sharding": options.sharding}
    setup = replace(setup, **{name: value for name, value in given.items() if value is not None})
    if setup.length > setup.config.max_position_embeddings:
        most = setup.config.max_position_embeddings
        raise InputError(f"length={setup.length}: expected at most {most}, the model's max_position_embeddings")
    if options.budget is not None:
        setup = replace(setup, config=at_budget(setup.config, options.budget), budgets=(), ramp=0.0)
    if options.tokens is not None:
        setup = replace(setup, steps=math.ceil(options.tokens / (setup.batch_size * setup.length)))
    if setup.gpus > 1:
        setup = replace(setup, notes=(*setup.notes, "Times leave out what GPUs wait for each other."))
    return setup


def at_budget(config: ThoughtbubblesConfig, budget: Budget) -> ThoughtbubblesConfig:
    """The same model at another budget.

    Raises:
        InputError: if it is no budget.
    """
    try:
        exact = parse_budget(budget)
    except ValueError as error:
        raise InputError(str(error)) from None
    changed = copy.deepcopy(config)
    changed.budget = str(exact)
    return changed


def _setup_of_model(config: ThoughtbubblesConfig, options: PlanOptions) -> Setup:
    gpus = options.gpus
    rows = options.batch_size or DEFAULT_BATCH_SIZE * gpus
    if rows % gpus:
        raise InputError(f"batch_size={rows}: expected a multiple of gpus={gpus}")
    return Setup(
        config=config,
        length=config.max_position_embeddings,
        batch_size=rows,
        micro_batch_size=rows // gpus,
        precision="bfloat16",
        checkpointing=False,
        gpus=gpus,
        sharding="ddp",
        steps=None,
    )


def _load_recipe(name: str, options: PlanOptions) -> "Recipe":
    """The recipe of a run, or that of a variant of a comparison."""
    from thoughtbubbles.recipes.training import lay_over, parse_recipe, read_sections

    content = read_sections(Path(name))
    if "output" in content:  # of a comparison: a run has it in its section training
        content = _sections_of_variant(content, name, options.variant)
    elif options.variant is not None:
        raise _no_comparison(options.variant)
    changed = {} if options.batch_size is None else {"training": {"batch_size": options.batch_size}}
    return parse_recipe(lay_over(content, changed))


def _no_comparison(variant: str) -> InputError:
    return InputError(f"variant={variant!r}: expected the recipe of a comparison with it")


def _sections_of_variant(content: Mapping[str, Any], name: str, variant: str | None) -> dict[str, Any]:
    from thoughtbubbles.recipes.comparison import parse_comparison, variant_sections
    from thoughtbubbles.recipes.values import MOST

    comparison = parse_comparison(content)
    if variant not in comparison.variants:
        names = ", ".join(comparison.variants)
        raise InputError(f"variant={variant!r}: expected one of those of the comparison {name}: {names}")
    found = comparison.variants[variant]
    if found.flops_of is not None:
        raise InputError(f"variant={variant!r}: expected one that doesn't follow from the FLOPs of {found.flops_of}")
    sections = variant_sections(comparison, found, comparison.settings.seeds[0], comparison.output)
    steps = sections["training"].get("steps")
    if isinstance(steps, int) and 0 < steps <= MOST:  # otherwise refused when they are read
        sections["training"]["steps"] = max(1, round(found.tokens * steps))
    return sections


def _setup_of_recipe(recipe: "Recipe", gpus: int) -> Setup:
    from thoughtbubbles.data.feed.rundata import check_batch
    from thoughtbubbles.recipes.training import model_config

    settings = recipe.training
    micro_batch_size, _ = check_batch(recipe, processes=gpus)
    found, longest, notes = _read_data(recipe)
    config = model_config(recipe, found, longest)
    if settings.precision == "auto":
        notes = (*notes, "Precision auto is taken for bfloat16, as on GPUs that have it.")
    if settings.training_budgets is not None:
        budgets = ", ".join(map(str, settings.training_budgets))
        notes = (*notes, f"Steps draw their budget from {budgets}: the run is theirs, memory that of the largest.")
    return Setup(
        config=config,
        length=min(longest or config.max_position_embeddings, config.max_position_embeddings),
        batch_size=settings.batch_size,
        micro_batch_size=micro_batch_size,
        precision="bfloat16" if settings.precision == "auto" else settings.precision,
        checkpointing=settings.gradient_checkpointing,
        gpus=gpus,
        sharding=settings.sharding,
        steps=settings.steps,
        budgets=tuple(settings.training_budgets or ()),
        seed=settings.seed,
        ramp=settings.budget_ramp,
        notes=notes,
    )


def _read_data(recipe: "Recipe") -> tuple[dict[str, Any], int | None, tuple[str, ...]]:
    """Fields of the model that a recipe's data gives, its longest row in tokens, and what had to be assumed."""
    from thoughtbubbles.data.preparation.manifest import Manifest
    from thoughtbubbles.recipes.training import FineTuningSection, StreamSection

    data = recipe.data
    if isinstance(data, FineTuningSection):
        return {}, data.max_length, ("Every row is taken for as long as the longest: shorter ones cost less.",)
    folders = data.validation if isinstance(data, StreamSection) else data.mixture or [data.path]
    folder = Path(str(next(iter(folders)))).expanduser()
    if folder.is_dir():
        manifest = Manifest.read(folder)
        return {"vocab_size": manifest.vocab_size}, manifest.block_size, ()
    vocabulary = (
        "" if {"vocab_size", "pretrained"} & set(recipe.model) else " and its vocabulary, which data may change"
    )
    return {}, None, (f"{folder} is not prepared yet: rows are the model's longest{vocabulary}.",)
