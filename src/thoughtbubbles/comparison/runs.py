"""The runs of a comparison: what each variant trains, for how long, at which rate."""

import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from thoughtbubbles.data.feed.loading import load_run_data
from thoughtbubbles.data.feed.rundata import RunData, check_batch
from thoughtbubbles.model.accounting import count_parameters, training_flops
from thoughtbubbles.model.configuration import ThoughtbubblesConfig
from thoughtbubbles.recipes.comparison import Comparison, tuning_sections, variant_sections
from thoughtbubbles.recipes.training import Precision, Recipe, RecipeError, lay_over, load_recipe, parse_recipe
from thoughtbubbles.recipes.variants import Variant
from thoughtbubbles.training.configuration import build_config
from thoughtbubbles.training.folder import RECIPE_NAME, read_facts
from thoughtbubbles.training.memory import check_weights
from thoughtbubbles.training.meter import Meter

__all__ = ["RunPlanner"]


@dataclass(frozen=True)
class Run:
    """A run of a comparison.

    Attributes:
        variant: its name.
        seed: of the run.
        recipe: what is trained.
        config: the model's.
        folder: of the run.
    """

    variant: str
    seed: int
    recipe: Recipe
    config: ThoughtbubblesConfig
    folder: Path

    @property
    def label(self) -> str:
        """Short, for people."""
        return "/".join(self.folder.parts[-2:])


@dataclass(frozen=True)
class _Uniform:
    """Rows as long as the longest, by which runs are planned: to look at every row would take too long."""

    uniform_length: int | None

    def length(self, index: int) -> int:
        """The same for all."""
        assert self.uniform_length is not None
        return self.uniform_length


class RunPlanner:
    """Makes the recipes of a comparison's runs.

    Args:
        comparison: what to compare.
        verify: check its data whole, as `load_run_data` does.

    Raises:
        InputError: for data or a variant's model that cannot be used.
    """

    def __init__(self, comparison: Comparison, verify: bool = False) -> None:
        self.comparison = comparison  # until the data is known
        self._precision = _precision_so_far(comparison.output)
        self._verify = verify
        first = self._recipe(Variant(title="base"), comparison.settings.seeds[0], Path())
        self.data = load_run_data(first, progress=False, verify=verify)
        self._uniform = _Uniform(self.data.longest)
        self.tuning_data = None if comparison.tuning is None else self._load_tuning_data(comparison.tuning.data)
        grown = {name: self._grown(name, variant) for name, variant in comparison.variants.items()}
        self.comparison = replace(comparison, variants=grown)
        self._steps = {name: self._find_steps(variant) for name, variant in comparison.variants.items()}

    def describe(self) -> Iterator[str]:
        """What would be trained, a line for each variant."""
        tries = Counter(run.variant for run in self.tuning_runs())
        for name in self.comparison.variants:
            run = self._run(name, self.comparison.variants[name], self.comparison.settings.seeds[0], None)
            settings = run.recipe.training
            meter = Meter(run.recipe, run.config, self._uniform, settings.batch_size)
            line = f"{name}: {settings.steps:,} steps, {meter.tokens(settings.steps):,} tokens"
            line += f", {meter.flops(settings.steps):.3g} FLOPs; {count_parameters(run.config):,} parameters"
            line += f"; {len(self.comparison.settings.seeds)} seeds"
            yield line + (f", {tries[name]} learning rates to try" if tries[name] else "")

    def tuning_runs(self) -> list[Run]:
        """A run of each variant that tunes its rate, for each rate; none if nothing is tuned."""
        tuning = self.comparison.tuning
        if tuning is None or self.tuning_data is None:
            return []
        runs = []
        for name, variant in self.comparison.variants.items():
            if variant.rate_of not in (None, name):
                continue
            for rate in tuning.learning_rates:
                settings = {"steps": max(1, round(tuning.tokens * self._steps[name])), "learning_rate": rate}
                folder = self.comparison.output / "tuning" / name / f"{rate:g}"
                sections = {**tuning_sections(self.comparison), "training": settings}
                recipe = self._recipe(variant, self.comparison.settings.seeds[0], folder, sections)
                runs.append(Run(name, recipe.training.seed, recipe, build_config(recipe, self.tuning_data), folder))
        return runs

    def runs(self, rates: Mapping[str, float]) -> list[Run]:
        """The runs, seed by seed.

        Args:
            rates: the tuned learning rate of each variant; those that lack one have what the recipe says.
        """
        return [
            self._run(name, variant, seed, rates.get(variant.rate_of or name))
            for seed in self.comparison.settings.seeds
            for name, variant in self.comparison.variants.items()
        ]

    def _run(self, name: str, variant: Variant, seed: int, rate: float | None) -> Run:
        settings: dict[str, Any] = {"steps": self._steps[name]}
        if rate is not None:
            settings["learning_rate"] = rate
        folder = self.comparison.output / "runs" / name / f"seed-{seed}"
        recipe = self._recipe(variant, seed, folder, {"training": settings})
        return Run(name, seed, recipe, build_config(recipe, self.data), folder)

    def _find_steps(self, variant: Variant) -> int:
        """Optimizer steps of a variant, and by the way whether its model can be built."""
        recipe = self._recipe(variant, self.comparison.settings.seeds[0], Path())
        config = self._config(recipe)
        check_batch(recipe, processes=1)
        if variant.flops_of is None or variant.spend != "tokens":
            return max(1, round(variant.tokens * recipe.training.steps))
        step = recipe.training.batch_size * training_flops(config, self.data.longest)
        return max(1, round(variant.tokens * self._flops(variant.flops_of) / step))

    def _flops(self, name: str) -> int:
        """Floating-point operations that a variant of tokens of its own trains with."""
        variant = self.comparison.variants[name]
        recipe = self._recipe(variant, self.comparison.settings.seeds[0], Path())
        meter = Meter(recipe, self._config(recipe), self._uniform, recipe.training.batch_size)
        return meter.flops(max(1, round(variant.tokens * recipe.training.steps)))

    def _grown(self, name: str, variant: Variant) -> Variant:
        """The variant, its model as deep or wide as comes nearest to the FLOPs that it may spend.

        Raises:
            RecipeError: if its model costs more than those as it is.
        """
        if variant.flops_of is None or variant.spend == "tokens":
            return variant
        recipe = self._recipe(variant, self.comparison.settings.seeds[0], Path())
        settings, config = recipe.training, self._config(recipe)
        rows = max(1, round(variant.tokens * settings.steps)) * settings.batch_size
        shape = grown_shape(config, variant.spend, self._flops(variant.flops_of) / rows, self.data.longest)
        if shape is None:
            raise RecipeError(
                f"variants.{name}.flops_of={variant.flops_of}: expected a variant that trains with more FLOPs than "
                f"{name} without more {variant.spend}"
            )
        return replace(variant, model={**variant.model, **shape})

    def _config(self, recipe: Recipe) -> ThoughtbubblesConfig:
        """The configuration of a variant's model, one that this machine can hold."""
        config = build_config(recipe, self.data)
        check_weights(config)
        return config

    def _recipe(
        self, variant: Variant, seed: int, folder: Path, sections: Mapping[str, Mapping[str, Any]] | None = None
    ) -> Recipe:
        recipe = parse_recipe(lay_over(variant_sections(self.comparison, variant, seed, folder), sections or {}))
        if recipe.training.precision == "auto" and self._precision is not None:
            recipe.training.precision = self._precision
        return recipe

    def _load_tuning_data(self, path: str) -> RunData:
        first = Variant(title="base")
        recipe = self._recipe(first, self.comparison.settings.seeds[0], Path(), tuning_sections(self.comparison))
        data = load_run_data(recipe, progress=False, verify=self._verify)
        blocks = data.samples.uniform_length is not None
        differ = blocks and data.longest != self.data.longest
        if differ or data.tokenizer.get_vocab() != self.data.tokenizer.get_vocab():
            raise RecipeError(f"tuning.data={path}: expected the tokenizer and block size of {self.data.source}")
        return data


def grown_shape(config: ThoughtbubblesConfig, spend: str, flops: float, length: int) -> dict[str, int] | None:
    """Fields of the model of more `layers` or `width` whose training FLOPs a row come nearest to some.

    Args:
        config: of the model that grows; a wider one has as many heads, and an MLP wider in proportion.
        spend: layers or width.
        flops: of training on a row.
        length: of a row in tokens.

    Returns:
        The fields; None where the model as it is costs more.
    """
    below: dict[str, int] | None = None
    distance = 0.0
    for shape in _larger_shapes(config, spend):
        other = copy.deepcopy(config)
        for field, value in shape.items():
            setattr(other, field, value)
        beyond = training_flops(other, length) - flops
        if beyond >= 0:
            return below if below is None or distance < beyond else shape
        below, distance = shape, -beyond
    return None


def _larger_shapes(config: ThoughtbubblesConfig, spend: str) -> Iterator[dict[str, int]]:
    if spend == "layers":
        yield from ({"num_hidden_layers": layers} for layers in count(config.num_hidden_layers))
        return
    inner = config.intermediate_size or 4 * config.hidden_size
    for hidden in count(config.hidden_size, 2 * config.num_attention_heads):
        shape = {"hidden_size": hidden, "intermediate_size": round(inner * hidden / config.hidden_size)}
        if config.head_dim * config.num_attention_heads == config.hidden_size:
            shape["head_dim"] = hidden // config.num_attention_heads
        yield shape


def _precision_so_far(output: Path) -> Precision | None:
    """What `auto` came to in the runs that a comparison has, wherever it began; None if it has none.

    All its runs compute alike, so that they can be compared.
    """
    for kind in ("runs", "tuning"):
        for path in sorted(output.glob(f"{kind}/*/*/{RECIPE_NAME}")):
            if load_recipe(path).training.precision == "auto":
                found: Precision = read_facts(path.parent)["precision"]
                return found
    return None
