"""Recipes: one YAML file a run, every key checked."""

import inspect
import math
import re
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from thoughtbubbles.model.budget import Budget, parse_budget
from thoughtbubbles.recipes.values import (
    WORDS,
    check_known,
    check_seed,
    convert,
    expand_user,
    parse_yaml,
    read_yaml,
)
from thoughtbubbles.support.errors import InputError, shown
from thoughtbubbles.support.options import option

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from thoughtbubbles.model.configuration import ThoughtbubblesConfig

Section = TypeVar("Section", bound="DataclassInstance")
TASKS = ("pretrain", "sft")
PRECISIONS = ("auto", "float32", "bfloat16")
SHARDINGS = ("ddp", "fsdp")
COMPILATIONS = ("none", "blocks", "whole")
REPORTERS = ("tensorboard", "wandb")
MODEL_SOURCES = ("preset", "pretrained")
BLOCK_SOURCES = ("path", "mixture", "stream")
ONE_SOURCE = "data: expected either `path` or `mixture`, the folders that `thoughtbubbles prepare` wrote, or `stream`"
MOST_LANES = 16
# Beyond, a run has no end, and a step none.
MOST = 2**31 - 1
MOST_ROWS = 2**20


class RecipeError(InputError):
    """A recipe that cannot be used: one line that names the key, the value and what was expected."""


@dataclass
class DataSection:
    """Where the blocks come from: `path` or `mixture`."""

    path: str | None = option("folder that `thoughtbubbles prepare` wrote", None, path=True)
    mixture: dict[str, float] | None = option(
        "several such folders and their weights, as in {runs/fineweb: 0.7, runs/pes2o: 0.3}; the same tokenizer and "
        "block size in all",
        None,
        path=True,
    )
    eval_blocks: int | None = option(
        "validation blocks, evenly spaced, of each folder, of the evaluations on the way; null is all", None
    )
    final_eval_blocks: int | None = option("the same, of the evaluation at the end; null is all", None)


@dataclass
class StreamSection:
    """What is read while training, where it is too large to prepare: `stream`."""

    stream: dict[str, float] = option(
        "sources as `thoughtbubbles prepare` names them and their weights, as in {hf:NAME?config=C: 0.7, "
        "'more/*.jsonl': 0.3}",
        path=True,
    )
    validation: dict[str, float] = option(
        "folders that `thoughtbubbles prepare` wrote and their weights: their validation blocks are evaluated on and "
        "their documents left out of the stream; their tokenizer and block size are the stream's",
        path=True,
    )
    text_field: str = option("field of rows that holds the text, where a source names none", "text")
    lanes: int | None = option(
        "parts of the stream that are read side by side, which processes share; a divisor of training.batch_size; "
        f"null is the largest common divisor with {MOST_LANES}",
        None,
    )
    shuffle_blocks: int = option("blocks of each source that are shuffled together, all lanes counted", 8192)
    eval_blocks: int | None = option(
        "validation blocks, evenly spaced, of each folder, of the evaluations on the way; null is all", None
    )
    final_eval_blocks: int | None = option("the same, of the evaluation at the end; null is all", None)


@dataclass
class FineTuningSection:
    """Where the prompts and their completions come from."""

    source: str = option(
        "rows to train on: a .jsonl or .parquet file, a folder or glob of them, or hf:NAME?split=...", path=True
    )
    validation_source: str | None = option("rows to evaluate on; null holds some of `source` out", None, path=True)
    validation_fraction: float = option("share of the rows held out where there is no validation_source", 0.05)
    prompt: str = option(
        "the prompt, a text in quotes with the fields of a row in braces, as in 'Question: {question}'; {{ and }} are "
        "braces themselves",
        "{prompt}",
    )
    completion: str = option(
        "what the model shall answer, in the same way: the loss is on this and on the end of text after it",
        "{completion}",
    )
    max_length: int = option(
        "tokens of the longest row, the two that mark its start and its end included; longer ones are left out and "
        "counted",
        512,
    )
    tokenizer: str | None = option("tokenizer folder or hub name; null is that of model.pretrained", None, path=True)
    eval_rows: int | None = option("validation rows, evenly spaced, of the evaluations on the way; null is all", None)
    final_eval_rows: int | None = option("the same, of the evaluation at the end; null is all", None)


@dataclass
class TrainingSection:
    """How to train."""

    output: str = option("folder of the run: metrics, checkpoints, the trained model", path=True)
    steps: int = option("optimizer steps")
    batch_size: int = option("blocks (or rows) per optimizer step, all processes together", 16)
    micro_batch_size: int | None = option(
        "blocks of one forward pass on one device: gradients accumulate over as many passes as batch_size needs; "
        "null is all that the device gets",
        None,
    )
    precision: str = option(
        "auto, float32 or bfloat16 (autocast); auto is bfloat16 on GPUs and processors with units for it, and what it "
        "came to when the run began is kept",
        "auto",
    )
    learning_rate: float = option("peak learning rate of AdamW", 1e-3)
    weight_decay: float = option("weight decay, on matrices only", 0.1)
    warmup_fraction: float = option("share of the steps in which the learning rate rises linearly from 0", 0.05)
    decay_fraction: float = option("share of the steps, at the end, in which it falls linearly to 0", 0.2)
    max_grad_norm: float = option("gradients are clipped to this norm", 1.0)
    training_budgets: list[Budget] | None = option(
        "budgets of which each step draws one, so that one model serves them all; null is the model's own", None
    )
    eval_budgets: list[Budget] | None = option("budgets to evaluate at beside the model's own, as in [1, 1.5, 4]", None)
    eval_tasks: list[str] | None = option(
        "benchmarks to score at each evaluation into tasks.jsonl, as in [gsm8k]; needs thoughtbubbles[eval]", None
    )
    eval_tasks_dir: str | None = option(
        "folder of their files; null takes them from the Hugging Face hub", None, path=True
    )
    eval_tasks_documents: int = option("documents of each, evenly spread", 32)
    gradient_checkpointing: bool = option("recompute activations in the backward pass to save memory", False)
    sharding: str = option(
        "how the processes of torchrun share the model: ddp, a whole one on each, or fsdp, its weights, gradients and "
        "moments divided over them (FSDP2); one process holds everything",
        "ddp",
    )
    compile: str = option(
        "none; blocks, each block and each gate with its routing by itself, made in seconds; or whole, the model as "
        "one graph for each budget in training and one in evaluation, made in minutes",
        "none",
    )
    log_every: int = option("steps between lines in metrics.jsonl", 10)
    eval_every: int = option("steps between evaluations", 100)
    save_every: int = option("steps between checkpoints", 200)
    keep_checkpoints: int = option("newest checkpoints to keep; the one of lowest validation loss is kept too", 2)
    report_to: list[str] = option("also report to tensorboard, wandb or both, as in [tensorboard]", [])
    seed: int = option("seed of the initial weights and of the order of the blocks", 0)


@dataclass
class Recipe:
    """A run: a model, its data and how to train it.

    `model` holds fields of `ThoughtbubblesConfig` and `preset`, a named shape, or `pretrained`, a trained model to
    start from. Vocabulary size, special tokens and the longest row come from the data where it does not name them.
    """

    task: str
    model: dict[str, Any]
    data: DataSection | StreamSection | FineTuningSection
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
    content = read_sections(Path(path))
    for override in overrides:
        apply_override(content, override, key_names(Recipe), plain=["task"])
    return parse_recipe(content)


def model_config(recipe: Recipe, found: Mapping[str, Any], longest: int | None) -> "ThoughtbubblesConfig":
    """The configuration of a recipe's model.

    Args:
        found: fields that the data gives; what the recipe says, or the model that it starts from, goes before them.
        longest: tokens of the longest row, that of a model without a shape's name; None leaves it open.

    Raises:
        InputError: for a bad field, or a model to start from that cannot be read.
    """
    from thoughtbubbles.model.configuration import ThoughtbubblesConfig
    from thoughtbubbles.model.loading import load_config

    values = dict(recipe.model)
    preset, pretrained = values.pop("preset", None), values.pop("pretrained", None)
    try:
        if pretrained is not None:
            return load_config(pretrained, **values)
        values = {**found, **values}
        if preset is not None:
            return ThoughtbubblesConfig.preset(preset, **values)
        if longest is not None:
            values.setdefault("max_position_embeddings", longest)
        return ThoughtbubblesConfig(**values)
    except InputError:
        raise
    except (TypeError, ValueError, OverflowError) as error:
        raise RecipeError(f"model.{error}") from None


def check_rows(config: "ThoughtbubblesConfig", vocab_size: int, longest: int, source: str) -> None:
    """Check that a model can read the rows of some data.

    Raises:
        RecipeError: for a vocabulary smaller than the data's, or a row longer than the longest of the model.
    """
    for name, needed in (("vocab_size", vocab_size), ("max_position_embeddings", longest)):
        if getattr(config, name) < needed:
            raise RecipeError(f"model.{name}={getattr(config, name)}: expected at least {needed}, as in {source}")


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """One line for each key of nested mappings that differs, as in `training.steps: 10 is now 20`."""
    for name in dict.fromkeys([*old, *new]):
        before, after = (values.get(name, "absent") for values in (old, new))
        if isinstance(before, dict) and isinstance(after, dict):
            yield from differences(before, after, f"{prefix}{name}.")
        elif before != after:
            yield f"{prefix}{name}: {before} is now {after}"


def describe_recipe() -> str:
    """Every key that a recipe may have, with its type, its default and what it means."""
    lines = [
        "A recipe is a YAML file of sections; `extends: OTHER.yaml` takes over what it does not say itself.",
        "",
        f"task: {' or '.join(TASKS)} [pretrain]",
        "",
        "model: the shape and rules of the model",
        "  preset: a named shape, such as nano, 150m or 1.9b",
        "  pretrained: a trained model to start from: the folder of a run or of a model, or a hub name",
        *_describe_model_fields(),
    ]
    for title, section in (
        ("data (task: pretrain)", DataSection),
        ("data (task: pretrain, streamed)", StreamSection),
        ("data (task: sft)", FineTuningSection),
        ("training", TrainingSection),
    ):
        lines += ["", f"{title}: {(section.__doc__ or '').splitlines()[0].rstrip('.').lower()}"]
        lines += describe_section(section)
    return "\n".join(lines)


def describe_section(section: "type[DataclassInstance]", indent: str = "  ") -> list[str]:
    """The keys that a section may have: type, default and what they mean."""
    lines = []
    hints = typing.get_type_hints(section)
    for spec in fields(section):
        lines.append(f"{indent}{spec.name}: {_type_name(hints[spec.name])}{_default(spec)}")
        lines += _wrapped(spec.metadata["help"], f"{indent}    ")
    return lines


def _describe_model_fields() -> list[str]:
    """The fields of a configuration, from its docstring."""
    from thoughtbubbles.model.configuration import ThoughtbubblesConfig

    arguments = (inspect.getdoc(ThoughtbubblesConfig) or "").partition("Args:\n")[2].partition("\n\n")[0]
    lines = []
    for entry in re.split(r"\n(?=    \w)", "\n" + arguments):
        names, colon, text = " ".join(entry.split()).partition(": ")
        if colon:
            defaults = [getattr(ThoughtbubblesConfig, name) for name in names.split(", ")]
            shown = ", ".join("null" if default is None else str(default).lower() for default in defaults)
            lines += [f"  {names} [{shown}]", *_wrapped(text, "      ")]
    return lines


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, width=100, initial_indent=indent, subsequent_indent=indent, break_long_words=False)


def _default(spec: "Field[Any]") -> str:
    if spec.default_factory is not MISSING:
        return f" [{spec.default_factory()}]"
    if spec.default is MISSING:
        return " (needed)"
    return f" [{'null' if spec.default is None else str(spec.default).lower()}]"


def read_sections(path: Path, extended_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The sections of a recipe, laid over those of the recipe that it extends.

    Raises:
        RecipeError: no such file, not YAML, not a mapping, or one that extends itself.
    """
    path = Path(expand_user("recipe", str(path), RecipeError))
    if path.resolve() in extended_by:
        raise RecipeError(f"recipe {path}: extends itself")
    content = read_yaml(path, RecipeError)
    if not isinstance(content, dict):
        raise RecipeError(f"recipe {path}: expected the sections {', '.join(key_names(Recipe))}")
    if "extends" not in content:
        return content
    extended = expand_user("extends", str(content.pop("extends")), RecipeError)
    base = read_sections(path.parent / extended, (*extended_by, path.resolve()))
    return lay_over(base, content)


def lay_over(base: Mapping[str, Any], sections: Mapping[str, Any]) -> dict[str, Any]:
    """Sections with those of `sections` laid over them, key by key."""
    result = dict(base)
    for section, values in sections.items():
        both = isinstance(values, dict) and isinstance(base.get(section), dict)
        result[section] = {**base[section], **values} if both else values
    return result


def apply_override(content: dict[str, Any], override: str, sections: Sequence[str], plain: Sequence[str]) -> None:
    """Set a key of `content` as `section.key=value` says, or `key=value` where the key is one of `plain`.

    Raises:
        RecipeError: if it says neither, names another section, or holds no YAML value.
    """
    key, equals, text = override.partition("=")
    section, dot, name = key.partition(".")
    if not (equals and (key in plain or (dot and name))):
        raise RecipeError(f"override {override!r}: expected section.key=value, such as training.learning_rate=3e-4")
    check_known(section, sections, "section", RecipeError)
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise RecipeError(f"override {shown(override)}: {shown(text)} is not a YAML value: {error}") from None
    if key in plain:
        content[key] = value
        return
    values = content.setdefault(section, {})
    if not isinstance(values, dict):
        raise RecipeError(f"{section}: {shown(values)}: expected keys and values")
    values[name] = value


def parse_recipe(content: Mapping[str, Any]) -> Recipe:
    """The recipe that some sections make.

    Raises:
        RecipeError: an unknown or missing key, or a value of the wrong type.
    """
    task = content.get("task", "pretrain")
    if task not in TASKS:
        raise RecipeError(f"task={shown(task)}: expected {' or '.join(TASKS)}")
    for section, values in content.items():
        check_known(section, key_names(Recipe), "section", RecipeError)
        if section != "task" and not isinstance(values, dict):
            raise RecipeError(f"{section}: {shown(values)}: expected keys and values")
    recipe = Recipe(
        task=task,
        model=_parse_model(content.get("model", {})),
        data=_parse_data(task, content.get("data", {})),
        training=_check_training(parse_section(TrainingSection, "training", content.get("training", {}))),
    )
    if (compile_ := recipe.training.compile) != "none" and task == "sft":
        raise RecipeError(f"training.compile={compile_}: expected task=pretrain, whose rows are all of one length")
    if isinstance(recipe.data, StreamSection):
        stream_lanes(recipe.data, recipe.training.batch_size)
    return recipe


def stream_lanes(data: StreamSection, batch_size: int) -> int:
    """The lanes of a stream.

    Raises:
        RecipeError: if they do not divide the batch.
    """
    lanes = data.lanes or math.gcd(batch_size, MOST_LANES)
    if batch_size % lanes:
        raise RecipeError(f"data.lanes={lanes}: expected a divisor of training.batch_size={batch_size}")
    return lanes


def _parse_data(task: str, values: Mapping[str, Any]) -> DataSection | StreamSection | FineTuningSection:
    if task == "sft":
        return _check_fine_tuning(parse_section(FineTuningSection, "data", values))
    # null takes back what an extended recipe says.
    given = {name: value for name, value in values.items() if name not in BLOCK_SOURCES or value is not None}
    if "stream" not in given:
        return _check_data(parse_section(DataSection, "data", given))
    if {"path", "mixture"} & given.keys():
        raise RecipeError(ONE_SOURCE)
    return _check_stream(parse_section(StreamSection, "data", given))


def _parse_model(values: Mapping[str, Any]) -> dict[str, Any]:
    from thoughtbubbles.model.configuration import ThoughtbubblesConfig

    for name in values:
        check_known(name, [*MODEL_SOURCES, *ThoughtbubblesConfig.__annotations__], "key", RecipeError, "model.")
    if all(name in values for name in MODEL_SOURCES):
        raise RecipeError("model.preset and model.pretrained: expected at most one of them")
    if isinstance(pretrained := values.get("pretrained"), str):
        return {**values, "pretrained": expand_user("model.pretrained", pretrained, RecipeError)}
    return dict(values)


def parse_section(section: type[Section], prefix: str, values: Mapping[str, Any]) -> Section:
    """A section, a dataclass of options, from its keys and values.

    Raises:
        RecipeError: an unknown or missing key, or a value of the wrong type.
    """
    hints = typing.get_type_hints(section)
    for name in values:
        check_known(name, key_names(section), "key", RecipeError, f"{prefix}.")
    for spec in fields(section):
        if spec.name not in values and spec.default is MISSING and spec.default_factory is MISSING:
            raise RecipeError(f"{prefix}.{spec.name} is missing: expected the {spec.metadata['help']}")
    paths = {spec.name for spec in fields(section) if spec.metadata["path"]}
    parsed = {}
    for name, value in values.items():
        key = f"{prefix}.{name}".lstrip(".")
        converted = _convert(key, value, hints[name])
        parsed[name] = _expand(key, converted) if name in paths else converted
    return section(**parsed)


def _expand(key: str, value: Any) -> Any:
    """A path, or a mapping of paths to weights, with home folders in the place of `~`."""
    if isinstance(value, dict):
        expanded = [(expand_user(key, name, RecipeError), weight) for name, weight in value.items()]
        if len(dict(expanded)) < len(expanded):
            raise RecipeError(f"{key}={shown(value)}: expected every folder once")
        return dict(expanded)
    return expand_user(key, value, RecipeError) if isinstance(value, str) else value


def _convert(key: str, value: Any, hint: Any) -> Any:
    """`value` as the type `hint`: bool, int, float, str, a budget, a list or mapping of them, or None if allowed."""
    optional = type(None) in typing.get_args(hint)
    if value is None and optional:
        return None
    kind = _without_none(hint)
    origin = typing.get_origin(kind)
    if origin is list and isinstance(value, list):
        (inner,) = typing.get_args(kind)
        return [_convert(f"{key}[{place}]", each, inner) for place, each in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        inner = typing.get_args(kind)[1]
        return {str(name): _convert(f"{key}[{name}]", each, inner) for name, each in value.items()}
    if kind is Any:
        return value
    if kind == Budget:
        return _budget(key, value)
    if kind in WORDS:
        return convert(key, value, hint, RecipeError)
    raise RecipeError(f"{key}={shown(value)}: expected {_type_name(kind)}{' or null' if optional else ''}")


def _without_none(hint: Any) -> Any:
    if hint == Budget or not isinstance(hint, types.UnionType):
        return hint
    kept = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    return kept[0]


def _type_name(hint: Any) -> str:
    """A type in words."""
    if hint == Budget:
        return "a budget"
    if isinstance(hint, types.UnionType):
        return f"{_type_name(_without_none(hint))} or null"
    if typing.get_origin(hint) is list:
        return "a list"
    if typing.get_origin(hint) is dict:
        return "a mapping"
    return WORDS[hint]


def _budget(key: str, value: Any) -> Budget:
    try:
        parse_budget(value)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{key}: {error}") from None
    result: Budget = value
    return result


def _check_data(data: DataSection) -> DataSection:
    if (data.path is None) == (data.mixture is None):
        raise RecipeError(ONE_SOURCE)
    if data.mixture is not None:
        _check_weights("mixture", data.mixture, "folders")
        _check_folders("mixture", data.mixture)
    check_counts("data", data, "eval_blocks", "final_eval_blocks")
    return data


def _check_stream(data: StreamSection) -> StreamSection:
    _check_weights("stream", data.stream, "sources")
    _check_weights("validation", data.validation, "folders")
    _check_folders("validation", data.validation)
    check_counts("data", data, "eval_blocks", "final_eval_blocks")
    for name in ("lanes", "shuffle_blocks"):
        count = getattr(data, name)
        if count is not None and not 1 <= count <= MOST:
            raise RecipeError(f"data.{name}={shown(count)}: expected at least 1 and at most {MOST:,}")
    return data


def _check_weights(name: str, weights: Mapping[str, float], what: str) -> None:
    if not weights or not min(weights.values()) > 0 or not math.isfinite(sum(weights.values())):
        raise RecipeError(f"data.{name}={shown(weights)}: expected {what} with weights above 0 and a finite sum")


def _check_folders(name: str, folders: Iterable[str]) -> None:
    """Refuse two spellings of one folder, whose blocks would count twice."""
    spelt: dict[object, str] = {}
    for folder in folders:
        if (other := spelt.setdefault(folder_identity(folder), folder)) is not folder:
            raise RecipeError(f"data.{name}: {other!r} and {folder!r} are the same folder: expected each once")


def folder_identity(path: str) -> object:
    """What is equal for two spellings of one folder: links, `..` and other names of it."""
    try:
        facts = Path(path).stat()
    except OSError:  # it is not there yet
        return Path(path).resolve()
    return facts.st_dev, facts.st_ino


def _check_fine_tuning(data: FineTuningSection) -> FineTuningSection:
    check_counts("data", data, "eval_rows", "final_eval_rows")
    if data.max_length < 2:
        raise RecipeError(f"data.max_length={data.max_length}: expected at least 2, a token and the next")
    if not 0 < data.validation_fraction < 1:
        raise RecipeError(f"data.validation_fraction={data.validation_fraction}: expected more than 0 and less than 1")
    return data


def check_counts(prefix: str, section: Any, *names: str) -> None:
    """Check that numbers of a section are at least 1.

    Raises:
        RecipeError: naming the key and its value.
    """
    for name in names:
        count = getattr(section, name)
        if count is not None and not 1 <= count <= MOST:
            unlimited = ", or null for all" * (prefix == "data")
            bound = "at least 1" if count < 1 else f"at most {MOST:,}"
            raise RecipeError(f"{prefix}.{name}={shown(count)}: expected {bound}{unlimited}")


def _check_training(training: TrainingSection) -> TrainingSection:
    check_counts("training", training, "steps", "batch_size", "micro_batch_size", "keep_checkpoints")
    check_counts("training", training, "log_every", "eval_every", "save_every", "eval_tasks_documents")
    if training.batch_size > MOST_ROWS:
        raise RecipeError(f"training.batch_size={training.batch_size}: expected at most {MOST_ROWS:,}")
    check_seed("training.seed", training.seed, RecipeError)
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
    if training.precision not in PRECISIONS:
        raise RecipeError(f"training.precision={training.precision!r}: expected one of {', '.join(PRECISIONS)}")
    if training.sharding not in SHARDINGS:
        raise RecipeError(f"training.sharding={training.sharding!r}: expected one of {', '.join(SHARDINGS)}")
    if training.compile not in COMPILATIONS:
        raise RecipeError(f"training.compile={training.compile!r}: expected one of {', '.join(COMPILATIONS)}")
    for name in ("training_budgets", "eval_budgets"):
        if getattr(training, name) == []:
            raise RecipeError(f"training.{name}=[]: expected budgets, such as [1, 2], or null")
    _check_reporters(training.report_to)
    return training


def _check_reporters(reporters: list[str]) -> None:
    from importlib.util import find_spec

    for name in reporters:
        if name not in REPORTERS:
            raise RecipeError(f"training.report_to={name!r}: expected one of {', '.join(REPORTERS)}")
        if find_spec(name) is None:
            raise RecipeError(f"training.report_to={name!r}: expected it to be installed: pip install {name}")


def key_names(section: type) -> list[str]:
    """The keys that a section may have."""
    return [spec.name for spec in fields(section)]
