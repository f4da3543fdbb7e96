"""Recipes: one YAML file a run, every key checked."""

import inspect
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator
from pydantic.dataclasses import dataclass

from thoughtbubbles.model.budget import Budget, parse_budget
from thoughtbubbles.recipes.options import option
from thoughtbubbles.recipes.values import (
    STRICT,
    Count,
    Number,
    Positive,
    Seed,
    Share,
    UserPath,
    check_known,
    check_mapping,
    convert,
    describe_section,
    expand_home,
    key_names,
    parse_section,
    parse_yaml,
    read_yaml,
    wrapped,
)
from thoughtbubbles.support.errors import InputError, shown

if TYPE_CHECKING:
    from thoughtbubbles.model.configuration import ThoughtbubblesConfig

__all__ = ["RecipeError", "load_recipe", "parse_recipe"]

TASKS = ("pretrain", "sft")
Precision = Literal["auto", "float32", "bfloat16"]
Sharding = Literal["ddp", "fsdp"]
MODEL_SOURCES = ("preset", "pretrained")
BLOCK_SOURCES = ("path", "mixture", "stream")
ONE_SOURCE = "expected either `path` or `mixture`, the folders that `thoughtbubbles prepare` wrote, or `stream`"
MOST_LANES = 16
# Beyond, a step has no end.
MOST_ROWS = 2**20


class RecipeError(InputError):
    """A recipe that cannot be used: one line that names the key, the value and what was expected."""


def _check_budget(value: Any) -> Any:
    parse_budget(value)
    return value


def _check_weights(weights: dict[str, float]) -> dict[str, float]:
    if not weights or not min(weights.values()) > 0 or not math.isfinite(sum(weights.values())):
        raise ValueError("expected one or more, with weights above 0 and a finite sum")
    expanded = {expand_home(name): weight for name, weight in weights.items()}
    if len(expanded) < len(weights):
        raise ValueError("expected each once, however it is spelt")
    return expanded


def _check_folders(folders: dict[str, float]) -> dict[str, float]:
    """Refuse two spellings of one folder, whose blocks would count twice."""
    spelt: dict[object, str] = {}
    for folder in folders:
        if (other := spelt.setdefault(folder_identity(folder), folder)) is not folder:
            raise ValueError(f"{other!r} and {folder!r} are the same folder: expected each once")
    return folders


def _check_installed(name: str) -> str:
    if find_spec(name) is None:
        raise ValueError(f"expected it to be installed: pip install {name}")
    return name


AnyBudget = Annotated[Budget, PlainValidator(_check_budget)]
Budgets = Annotated[list[AnyBudget], Field(min_length=1)]
Weights = Annotated[dict[Annotated[str, BeforeValidator(str)], Number], AfterValidator(_check_weights)]
Folders = Annotated[Weights, AfterValidator(_check_folders)]
Reporter = Annotated[Literal["tensorboard", "wandb", "trackio"], AfterValidator(_check_installed)]
Patterns = Annotated[list[str], Field(min_length=1)]
FALLS = {"start": "rise", "end": "fall"}
DECAY_FRACTION = 0.2
"""Of schedules that have a decay of their own length, where the recipe names none."""


@dataclass(config=STRICT)
class LoraSection:
    """Adapters of low rank, of the library peft: they and the gates are trained, all else stays."""

    rank: Count = option("of the update of a matrix, which is scaled by 2")
    targets: Patterns | None = option("names of the linear layers that get one; by default all in the blocks", None)


@dataclass(config=STRICT)
class GroupSection:
    """What differs for some parameters."""

    learning_rate: Positive | None = option("their peak rate", None)
    weight_decay: Annotated[Number, Field(ge=0)] | None = option("theirs, vectors included", None)


def _read_lora(value: Any) -> LoraSection | None:
    if value is None or isinstance(value, LoraSection):
        return value
    return parse_section(LoraSection, "", value, RecipeError)


def _read_groups(values: Any) -> dict[str, GroupSection]:
    check_mapping("", values, RecipeError)
    return {
        str(pattern): each if isinstance(each, GroupSection) else parse_section(GroupSection, "", each, RecipeError)
        for pattern, each in values.items()
    }


@dataclass(config=STRICT)
class DataSection:
    """Where the blocks come from: `path` or `mixture`."""

    path: UserPath | None = option("folder that `thoughtbubbles prepare` wrote", None)
    mixture: Folders | None = option(
        "several such folders and their weights, as in {runs/fineweb: 0.7, runs/pes2o: 0.3}; the same tokenizer and "
        "block size in all",
        None,
    )
    eval_blocks: Count | None = option(
        "validation blocks, evenly spaced, of each folder, of the evaluations on the way; null is all", None
    )
    final_eval_blocks: Count | None = option("the same, of the evaluation at the end; null is all", None)

    def __post_init__(self) -> None:
        if (self.path is None) == (self.mixture is None):
            raise ValueError(ONE_SOURCE)


@dataclass(config=STRICT)
class StreamSection:
    """What is read while training, where it is too large to prepare: `stream`."""

    stream: Weights = option(
        "sources as `thoughtbubbles prepare` names them and their weights, as in {hf:NAME?config=C: 0.7, "
        "'more/*.jsonl': 0.3}"
    )
    validation: Folders = option(
        "folders that `thoughtbubbles prepare` wrote and their weights: their validation blocks are evaluated on and "
        "their documents left out of the stream; their tokenizer and block size are the stream's"
    )
    text_field: str = option("field of rows that holds the text, where a source names none", "text")
    lanes: Count | None = option(
        "parts of the stream that are read side by side, which processes share; a divisor of training.batch_size; "
        f"null is the largest common divisor with {MOST_LANES}",
        None,
    )
    shuffle_blocks: Count = option("blocks of each source that are shuffled together, all lanes counted", 8192)
    eval_blocks: Count | None = option(
        "validation blocks, evenly spaced, of each folder, of the evaluations on the way; null is all", None
    )
    final_eval_blocks: Count | None = option("the same, of the evaluation at the end; null is all", None)


@dataclass(config=STRICT)
class FineTuningSection:
    """Where the conversations, or the prompts and their completions, come from."""

    source: UserPath = option(
        "rows to train on: a .jsonl or .parquet file, a folder or glob of them, or hf:NAME?split=..."
    )
    validation_source: UserPath | None = option("rows to evaluate on; null holds some of `source` out", None)
    validation_fraction: Annotated[Number, Field(gt=0, lt=1)] = option(
        "share of the rows held out where there is no validation_source", 0.05
    )
    messages: str | None = option(
        "field that holds a conversation, a list of messages with role and content, which the tokenizer's chat "
        "template writes: the loss is on the assistant's answers and what ends them; null is 'messages' if the first "
        "row has it and neither prompt nor completion is given",
        None,
    )
    prompt: str | None = option(
        "the prompt, a text in quotes with the fields of a row in braces, as in 'Question: {question}'; {{ and }} are "
        "braces themselves; null is '{prompt}'",
        None,
    )
    completion: str | None = option(
        "what the model shall answer, in the same way: the loss is on this and on the end of text after it; null is "
        "'{completion}'",
        None,
    )
    chat_template: UserPath | None = option(
        "file of Jinja that writes conversations, kept with the model; null is the tokenizer's own", None
    )
    max_length: Annotated[Count, Field(ge=2)] = option(
        "tokens of the longest row, all that mark its start and its end included; longer ones are left out and counted",
        512,
    )
    packing: Literal["padded", "packed"] = option(
        "padded, each row of the source by itself, filled up to the longest of its forward pass; or packed, several of "
        "them in one row of training of at most max_length tokens, which attention does not tell apart; validation is "
        "always padded",
        "padded",
    )
    tokenizer: UserPath | None = option("tokenizer folder or hub name; null is that of model.pretrained", None)
    eval_rows: Count | None = option("validation rows, evenly spaced, of the evaluations on the way; null is all", None)
    final_eval_rows: Count | None = option("the same, of the evaluation at the end; null is all", None)

    def __post_init__(self) -> None:
        if self.messages is not None and (self.prompt is not None or self.completion is not None):
            raise ValueError("expected either `messages`, or `prompt` and `completion`")


@dataclass(config=STRICT)
class TrainingSection:
    """How to train."""

    output: UserPath = option("folder of the run: metrics, checkpoints, the trained model")
    steps: Count = option("optimizer steps")
    batch_size: Annotated[Count, Field(le=MOST_ROWS)] = option(
        "blocks (or rows) per optimizer step, all processes together", 16
    )
    micro_batch_size: Count | None = option(
        "blocks of one forward pass on one device: gradients accumulate over as many passes as batch_size needs; "
        "null is all that the device gets",
        None,
    )
    precision: Precision = option(
        "auto, float32 or bfloat16 (autocast); auto is bfloat16 on GPUs and processors with units for it, and what it "
        "came to when the run began is kept",
        "auto",
    )
    learning_rate: Positive = option("peak learning rate of AdamW", 1e-3)
    weight_decay: Annotated[Number, Field(ge=0)] = option("weight decay, on matrices only", 0.1)
    schedule: Literal["wsd", "wsd-sqrt", "cosine", "constant"] = option(
        "how the learning rate goes on after its warm-up: wsd stays at the peak and then falls linearly, wsd-sqrt as "
        "1 - sqrt; cosine falls as half a cosine to the end; constant stays",
        "wsd",
    )
    warmup_fraction: Share = option("share of the steps in which the learning rate rises linearly", 0.05)
    decay_fraction: Share | None = option(
        f"share of the steps, at the end, in which wsd and wsd-sqrt let it fall; null is {DECAY_FRACTION} there", None
    )
    start_fraction: Share = option("where it rises from, as a share of the peak", 0.0)
    end_fraction: Share = option("where it falls to, as a share of the peak", 0.0)
    groups: Annotated[dict[str, GroupSection], PlainValidator(_read_groups)] = option(
        "rates and decay of parameters by patterns of their names, the first that fits, as in "
        "{'*embed_tokens*': {weight_decay: 0}, '*gates*': {learning_rate: 3e-3}}",
        {},
    )
    freeze: list[str] = option("patterns of names of parameters that stay as they are, as in ['*layers.0.*']", [])
    lora: Annotated[LoraSection | None, PlainValidator(_read_lora)] = option(
        "train adapters of rank `rank` beside the linear layers `targets`, and the gates, as in {rank: 16}; all else "
        "stays; without targets all linear layers of the blocks; needs model.pretrained and thoughtbubbles[peft]",
        None,
    )
    moments_from: UserPath | None = option(
        "folder of another run, whose newest checkpoint gives AdamW's moments to begin with", None
    )
    max_grad_norm: Positive = option("gradients are clipped to this norm", 1.0)
    training_budgets: Budgets | None = option(
        "budgets of which each step draws one, so that one model serves them all; null is the model's own", None
    )
    budget_ramp: Share = option(
        "share of the steps in which the budget rises from 1 to the model's own, in eight rungs", 0.0
    )
    eval_budgets: Budgets | None = option("budgets to evaluate at beside the model's own, as in [1, 1.5, 4]", None)
    eval_tasks: list[str] | None = option(
        "benchmarks to score at each evaluation into tasks.jsonl, as in [gsm8k]; needs thoughtbubbles[eval]", None
    )
    eval_tasks_dir: UserPath | None = option("folder of their files; null takes them from the Hugging Face hub", None)
    eval_tasks_documents: Count = option("documents of each, evenly spread", 32)
    gradient_checkpointing: bool = option("recompute activations in the backward pass to save memory", False)
    sharding: Sharding = option(
        "how the processes of torchrun share the model: ddp, a whole one on each, or fsdp, its weights, gradients and "
        "moments divided over them (FSDP2); one process holds everything",
        "ddp",
    )
    compile: Literal["none", "blocks", "whole"] = option(
        "none; blocks, each block and each gate with its routing by itself, made in seconds; or whole, the model as "
        "one graph for each budget in training and one in evaluation, made in minutes",
        "none",
    )
    log_every: Count = option("steps between lines in metrics.jsonl", 10)
    eval_every: Count = option("steps between evaluations", 100)
    save_every: Count = option("steps between checkpoints", 200)
    keep_checkpoints: Count = option("newest checkpoints to keep; the one of lowest validation loss is kept too", 2)
    peak_flops: Positive | None = option(
        "operations per second of which `mfu` in the metrics is the share that a device does; null measures its "
        "fastest matrix product when the run starts",
        None,
    )
    report_to: list[Reporter] = option("also report to some of tensorboard, wandb and trackio, as in [trackio]", [])
    seed: Seed = option("seed of the initial weights and of the order of the blocks", 0)

    def __post_init__(self) -> None:
        if self.decay_fraction is not None and not self.schedule.startswith("wsd"):
            raise ValueError(
                f"decay_fraction={self.decay_fraction}: expected null with schedule={self.schedule}, which has none"
            )
        if self.warmup_fraction + self.decay_share > 1:
            raise ValueError(
                f"warmup_fraction={self.warmup_fraction}, decay_fraction={self.decay_share}: expected shares of the "
                "steps, together at most 1"
            )
        for name, without in (("start", self.warmup_fraction == 0), ("end", self.decay_share == 0)):
            if without and (value := getattr(self, f"{name}_fraction")):
                raise ValueError(f"{name}_fraction={value}: expected 0 where the rate does not {FALLS[name]}")
        if self.budget_ramp and self.training_budgets is not None:
            raise ValueError(f"budget_ramp={self.budget_ramp}: expected 0 with training_budgets, which are drawn")

    @property
    def decay_share(self) -> float:
        """Share of the steps in which the rate falls."""
        if self.schedule == "constant":
            return 0.0
        if self.schedule == "cosine":
            return 1.0 - self.warmup_fraction
        return DECAY_FRACTION if self.decay_fraction is None else self.decay_fraction


@dataclass(config=STRICT)
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
            lines += [f"  {names} [{shown}]", *wrapped(text, "      ")]
    return lines


def read_sections(path: Path, extended_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The sections of a recipe, laid over those of the recipe that it extends.

    Raises:
        RecipeError: no such file, not YAML, not a mapping, or one that extends itself.
    """
    path = Path(convert("recipe", str(path), UserPath, RecipeError))
    if path.resolve() in extended_by:
        raise RecipeError(f"recipe {path}: extends itself")
    content = read_yaml(path, RecipeError)
    if not isinstance(content, dict):
        raise RecipeError(f"recipe {path}: expected the sections {', '.join(key_names(Recipe))}")
    if "extends" not in content:
        return content
    extended = convert("extends", str(content.pop("extends")), UserPath, RecipeError)
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
    check_mapping(section, values, RecipeError)
    values[name] = value


def parse_recipe(content: Mapping[str, Any]) -> Recipe:
    """The recipe that some sections make.

    Raises:
        RecipeError: an unknown or missing key, or a value of the wrong type.
    """
    task = content.get("task", "pretrain")
    if task not in TASKS:
        raise RecipeError(f"task={shown(task)}: expected {' or '.join(TASKS)}")
    for section in content:
        check_known(section, key_names(Recipe), "section", RecipeError)
    recipe = Recipe(
        task=task,
        model=_parse_model(content.get("model", {})),
        data=_parse_data(task, content.get("data", {})),
        training=parse_section(TrainingSection, "training", content.get("training", {}), RecipeError),
    )
    if (compile_ := recipe.training.compile) != "none" and task == "sft":
        raise RecipeError(f"training.compile={compile_}: expected task=pretrain, whose rows are all of one length")
    if recipe.training.lora is not None:
        if recipe.model.get("pretrained") is None:
            raise RecipeError("training.lora: expected model.pretrained, a model for its adapters")
        _check_peft()
    if isinstance(recipe.data, StreamSection):
        stream_lanes(recipe.data, recipe.training.batch_size)
    return recipe


def _check_peft() -> None:
    try:
        _check_installed("peft")
    except ValueError as error:
        raise RecipeError(f"training.lora: {error}") from None


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
        return parse_section(FineTuningSection, "data", values, RecipeError)
    check_mapping("data", values, RecipeError)
    # null takes back what an extended recipe says.
    given = {name: value for name, value in values.items() if name not in BLOCK_SOURCES or value is not None}
    if "stream" not in given:
        return parse_section(DataSection, "data", given, RecipeError)
    if {"path", "mixture"} & given.keys():
        raise RecipeError(f"data: {ONE_SOURCE}")
    return parse_section(StreamSection, "data", given, RecipeError)


def _parse_model(values: Mapping[str, Any]) -> dict[str, Any]:
    from thoughtbubbles.model.configuration import ThoughtbubblesConfig

    check_mapping("model", values, RecipeError)
    for name in values:
        check_known(name, [*MODEL_SOURCES, *ThoughtbubblesConfig.__annotations__], "key", RecipeError, "model.")
    if all(name in values for name in MODEL_SOURCES):
        raise RecipeError("model.preset and model.pretrained: expected at most one of them")
    if isinstance(pretrained := values.get("pretrained"), str):
        return {**values, "pretrained": convert("model.pretrained", pretrained, UserPath, RecipeError)}
    return dict(values)


def folder_identity(path: str) -> object:
    """What is equal for two spellings of one folder: links, `..` and other names of it."""
    try:
        facts = Path(path).stat()
    except OSError:  # it is not there yet
        return Path(path).resolve()
    return facts.st_dev, facts.st_ino
