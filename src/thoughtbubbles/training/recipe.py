"""Recipes: one YAML file a run, every key checked (Design 5.2)."""

import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from thoughtbubbles.errors import InputError

Section = TypeVar("Section", bound="DataSection | TrainingSection")


class RecipeError(InputError):
    """A recipe, or an override of one, that cannot be used."""


def option(help_text: str, default: Any = MISSING) -> Any:
    """A recipe field with its help; required where no default is given."""
    return field(default=default, metadata={"help": help_text})


@dataclass
class DataSection:
    """Where the blocks come from."""

    path: str = option("folder that `thoughtbubbles prepare` wrote")
    eval_blocks: int | None = option("validation blocks of the evaluations on the way; null is all of them", None)
    final_eval_blocks: int | None = option("validation blocks of the evaluation at the end; null is all of them", None)


@dataclass
class TrainingSection:
    """How to train."""

    output: str = option("folder of the run: metrics, checkpoints, the trained model")
    steps: int = option("optimizer steps")
    batch_size: int = option("blocks per optimizer step", 16)
    learning_rate: float = option("peak learning rate of AdamW", 1e-3)
    weight_decay: float = option("weight decay, on matrices only", 0.1)
    warmup_fraction: float = option("share of the steps in which the learning rate rises linearly from 0", 0.05)
    decay_fraction: float = option("share of the steps, at the end, in which it falls linearly to 0", 0.2)
    max_grad_norm: float = option("gradients are clipped to this norm", 1.0)
    gradient_checkpointing: bool = option("recompute activations in the backward pass to save memory", False)
    log_every: int = option("steps between lines in metrics.jsonl", 10)
    eval_every: int = option("steps between evaluations", 100)
    save_every: int = option("steps between checkpoints", 200)
    keep_checkpoints: int = option("checkpoints to keep", 2)
    seed: int = option("seed of the initial weights and of the order of the blocks", 0)


@dataclass
class Recipe:
    """A run: a model, its data and how to train it.

    `model` holds `preset` and fields of `ThoughtbubblesConfig`. Vocabulary size, special tokens and the longest row
    come from the data where it does not name them.
    """

    model: dict[str, Any]
    data: DataSection
    training: TrainingSection

    def to_dict(self) -> dict[str, Any]:
        """The recipe with every default spelled out."""
        return asdict(self)

    def to_yaml(self) -> str:
        """YAML that `load_recipe` reads back to the same recipe."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe and apply `section.key=value` overrides.

    A recipe may name another in `extends`, relative to its own folder, and holds then only what differs.

    Raises:
        RecipeError: no such file, not YAML, an unknown or missing key, or a value of the wrong type.
    """
    content = _read(Path(path), ())
    for override in overrides:
        _apply_override(content, override)
    return _parse(content)


def _read(path: Path, extended_by: tuple[Path, ...]) -> dict[str, Any]:
    """The sections of a recipe, laid over those of the recipe that it extends."""
    if path.resolve() in extended_by:
        raise RecipeError(f"recipe {path}: extends itself")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"recipe {path}: no such file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"recipe {path}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise RecipeError(f"recipe {path}: expected the sections {', '.join(_names(Recipe))}")
    if "extends" not in content:
        return content
    base = _read(path.parent / str(content.pop("extends")), (*extended_by, path.resolve()))
    for section, values in content.items():
        both = isinstance(values, dict) and isinstance(base.get(section), dict)
        base[section] = {**base[section], **values} if both else values
    return base


def _apply_override(content: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    section, dot, name = key.partition(".")
    if not (equals and dot and name):
        raise RecipeError(f"override {override!r}: expected section.key=value, such as training.learning_rate=3e-4")
    _known(section, _names(Recipe), "section")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise RecipeError(f"override {override!r}: {text!r} is not a YAML value") from None
    values = content.setdefault(section, {})
    if not isinstance(values, dict):
        raise RecipeError(f"{section}: {values!r}: expected keys and values")
    values[name] = value


def _parse(content: Mapping[str, Any]) -> Recipe:
    for section, values in content.items():
        _known(section, _names(Recipe), "section")
        if not isinstance(values, dict):
            raise RecipeError(f"{section}: {values!r}: expected keys and values")
    return Recipe(
        model=_parse_model(content.get("model", {})),
        data=_check_data(_parse_section(DataSection, "data", content.get("data", {}))),
        training=_check_ranges(_parse_section(TrainingSection, "training", content.get("training", {}))),
    )


def _parse_model(values: Mapping[str, Any]) -> dict[str, Any]:
    from thoughtbubbles.configuration import ThoughtbubblesConfig

    for name in values:
        _known(name, ["preset", *ThoughtbubblesConfig.__annotations__], "key", "model.")
    return dict(values)


def _parse_section(section: type[Section], prefix: str, values: Mapping[str, Any]) -> Section:
    hints = typing.get_type_hints(section)
    for name in values:
        _known(name, _names(section), "key", f"{prefix}.")
    for spec in fields(section):
        if spec.name not in values and spec.default is MISSING:
            raise RecipeError(f"{prefix}.{spec.name} is missing: expected the {spec.metadata['help']}")
    return section(**{name: _convert(f"{prefix}.{name}", value, hints[name]) for name, value in values.items()})


def _convert(key: str, value: Any, hint: Any) -> Any:
    """`value` as the type `hint`, which is bool, int, float, str, or one of them or None."""
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in allowed:
        return None
    kind = allowed[0]
    # YAML 1.1 reads 3e-4, without a point, as text.
    if kind is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    elif type(value) is kind:
        return value
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]
    raise RecipeError(f"{key}={value!r}: expected {words}{' or null' if type(None) in allowed else ''}")


def _check_data(data: DataSection) -> DataSection:
    for name in ("eval_blocks", "final_eval_blocks"):
        count = getattr(data, name)
        if count is not None and count < 1:
            raise RecipeError(f"data.{name}={count}: expected at least 1, or null for all")
    return data


def _check_ranges(training: TrainingSection) -> TrainingSection:
    for name in ("steps", "batch_size", "log_every", "eval_every", "save_every", "keep_checkpoints"):
        if getattr(training, name) < 1:
            raise RecipeError(f"training.{name}={getattr(training, name)}: expected at least 1")
    for name in ("learning_rate", "max_grad_norm"):
        if not getattr(training, name) > 0:
            raise RecipeError(f"training.{name}={getattr(training, name)}: expected a number above 0")
    if training.weight_decay < 0:
        raise RecipeError(f"training.weight_decay={training.weight_decay}: expected a number of at least 0")
    shares = training.warmup_fraction, training.decay_fraction
    if min(shares) < 0 or sum(shares) > 1:
        raise RecipeError(
            f"training.warmup_fraction={shares[0]}, training.decay_fraction={shares[1]}: expected shares of the "
            "steps, at least 0 and together at most 1"
        )
    return training


def _names(section: type) -> list[str]:
    return [spec.name for spec in fields(section)]


def _known(name: str, known: list[str], what: str, prefix: str = "") -> None:
    if name in known:
        return
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"did you mean {prefix}{near[0]}?" if near else f"expected one of {', '.join(known)}"
    raise RecipeError(f"unknown {what} {prefix}{name}: {hint}")
