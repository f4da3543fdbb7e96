"""Dense models of other classes as Thoughtbubbles models, and the way back (method: Retrofit).

A retrofitted model has the dense model's weights under our names, and new gates. With `gate_scores="forks"` no root is
ever attenuated: at budget 1, where nothing forks, its logits are the dense model's. With `gate_start` its forks begin
nearly closed, so that at larger budgets too it begins near the dense model.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging

from thoughtbubbles.model.belongings import (
    LICENCES,
    bring_generation,
    bring_licences,
    bring_tokenizer,
    read_generation,
    usable,
)
from thoughtbubbles.model.budget import Budget
from thoughtbubbles.model.configuration import ThoughtbubblesConfig
from thoughtbubbles.model.families import FAMILIES, Family, check_supported, fields_of
from thoughtbubbles.model.gate import ForkGate
from thoughtbubbles.model.loading import HUB_NAME, find_model, load_config
from thoughtbubbles.model.modeling import ThoughtbubblesForCausalLM
from thoughtbubbles.model.sharing import AUTO_MAP, copy_code, write_model_card
from thoughtbubbles.model.stored import StoredWeights, same_numbers, write_weights
from thoughtbubbles.model.weights import EMBEDDING, UNEMBEDDING, list_names
from thoughtbubbles.support.errors import InputError, RunError, is_network, library_reason, one_line
from thoughtbubbles.support.files import made_folder, read_record, replacing, user_path
from thoughtbubbles.support.folders import check_output

__all__ = ["Retrofitted", "retrofit", "retrofit_folder", "to_dense", "to_dense_folder"]

GATE_START = 0.02
GATES = "model.gates."
FETCHED = ["*.json", "*.jinja", "*.txt", "tokenizer.model", *LICENCES]
FIXED = {"gate_scores": "forks", "num_loops": 1}
"""Without which budget 1 is not the dense model."""
Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class Retrofitted:
    """What a folder was made of.

    Attributes:
        config: of the model in it.
        kind: `model_type` of the dense model.
        left_out: tensors that the dense model's own class has no use for either.
        document_start: the token that precedes a text, as recorded with the tokenizer; None without a tokenizer.
    """

    config: ThoughtbubblesConfig
    kind: str
    left_out: list[str]
    document_start: str | None


@dataclass(frozen=True)
class _Plan:
    """How our tensors come from a dense model's.

    Attributes:
        config: ours.
        sources: of each of our tensors but the gates', the stored names that it is joined of.
        left_out: stored names that nobody reads.
    """

    config: ThoughtbubblesConfig
    family: Family
    sources: dict[str, list[str]]
    left_out: list[str]

    def tensor(self, ours: str, read: Read) -> Tensor:
        return self.family.join(ours, [read(name) for name in self.sources[ours]], self.config)


def retrofit(
    model: PreTrainedModel | str | Path,
    *,
    fork_layers: list[int] | None = None,
    budget: Budget = 2,
    gate_start: float | None = GATE_START,
    **choices: Any,
) -> ThoughtbubblesForCausalLM:
    """The Thoughtbubbles model of a dense one, in evaluation mode; its gates are new.

    Args:
        model: of the class of a family (llama, mistral, qwen2, qwen3, gpt_neox), whose weights are copied; or a folder
            or hub name, from which it is read without being held twice.
        fork_layers: as in `ThoughtbubblesConfig`; None is a quarter, a half and three quarters of the depth.
        budget: streams per token that may exist.
        gate_start: the score that the new gates give to a fork.
        choices: other fields of `ThoughtbubblesConfig` that are about streams, such as `merge="probability"`.

    Raises:
        InputError: for a folder that cannot be read, or that holds a model that is not supported.
        ValueError: for a model in memory that is not; for a choice that the dense model makes, or that would make
            another function of it at budget 1.
    """
    choices = {"fork_layers": fork_layers, "budget": budget, "gate_start": gate_start, **choices}
    if isinstance(model, PreTrainedModel):
        weights = _weights_of(model)
        plan = _plan(model.config, weights, weights.__getitem__, choices, model.dtype)
        return _assembled(plan, weights.__getitem__, model.generation_config)
    folder = _found(model)
    with _said(f"source {model}"):
        dense, stored = _dense_config(folder), StoredWeights(folder)
        plan = _plan(dense, stored.shapes, stored.read, choices)
        return _assembled(plan, stored.read, read_generation(folder))


def retrofit_folder(
    source: str | Path,
    output: str | Path,
    *,
    fork_layers: list[int] | None = None,
    budget: Budget = 2,
    gate_start: float | None = GATE_START,
    **choices: Any,
) -> Retrofitted:
    """Write the folder of the Thoughtbubbles model of a dense one, a few tensors at a time.

    Tokenizer, chat template, generation settings and licences come along. What the tokenizer puts before a text is
    recorded with it. The other arguments are those of `retrofit`.

    Args:
        source: a folder or a hub name.
        output: a new or empty folder.

    Raises:
        InputError: as `retrofit`, or for an output that something is in; no output is left.
    """
    choices = {"fork_layers": fork_layers, "budget": budget, "gate_start": gate_start, **choices}
    folder = _found(source)
    with _new_folder(user_path(output)) as made, _said(f"source {source}"):
        dense, stored = _dense_config(folder), StoredWeights(folder)
        plan = _plan(dense, stored.shapes, stored.read, choices)
        new = _new_parts(plan.config)
        plan.config.auto_map = dict(AUTO_MAP)
        plan.config.save_pretrained(made)
        shapes = {name: plan.tensor(name, stored.shapes.__getitem__) for name in plan.sources}
        write_weights(
            {**shapes, **new},
            lambda name: new[name] if name in new else plan.tensor(name, stored.read).contiguous(),
            made,
            stored.close,
        )
        bring_generation(folder, made)
        start = bring_tokenizer(str(source if folder != user_path(source) else folder), folder, made)
        bring_licences(folder, made)
        copy_code(made)
        write_model_card(made, plan.config, {"made from": f"a dense model of the family {dense.model_type}"})
        return Retrofitted(plan.config, dense.model_type, plan.left_out, start)


def to_dense(model: ThoughtbubblesForCausalLM) -> PreTrainedModel:
    """The dense model of the class that a model was retrofitted from: the same function at budget 1, and no more.

    Its weights are copies.

    Raises:
        ValueError: for a model that was not retrofitted, carries adapters, or is another function at budget 1.
    """
    weights = _weights_of(model)
    dense, parts = _dense_parts(model.config, weights)
    tensors = {name: part(weights.__getitem__).clone() for name, part in parts.items()}
    made: PreTrainedModel = _filled(_class_of(dense), dense, tensors, model.generation_config)
    return made


def to_dense_folder(folder: str | Path, output: str | Path) -> str:
    """Write the folder of the dense model of a retrofitted one, as `to_dense`; returns the name of its class.

    Args:
        folder: of the model, or of the run that trained it.
        output: a new or empty folder.

    Raises:
        InputError: for a folder that cannot be read, a model as in `to_dense`, or an output that something is in; no
            output is left.
    """
    name = find_model(folder)
    config, path = load_config(name), Path(name)
    with _new_folder(user_path(output)) as made, _said(f"model {name}"):
        stored = StoredWeights(path)
        dense, parts = _dense_parts(config, stored.shapes)
        dense.architectures = [_class_of(dense).__name__]
        dense.save_pretrained(made)
        shapes = {theirs: part(stored.shapes.__getitem__) for theirs, part in parts.items()}
        write_weights(shapes, lambda theirs: parts[theirs](stored.read).contiguous(), made, stored.close)
        bring_generation(path, made)
        bring_tokenizer(name, path, made)
        bring_licences(path, made)
        return _class_of(dense).__name__


# --- From a dense model ---


def _plan(
    dense: PreTrainedConfig,
    shapes: Mapping[str, Tensor],
    read: Read,
    choices: Mapping[str, Any],
    dtype: torch.dtype | None = None,
) -> _Plan:
    """What becomes of a dense model of some configuration and weights.

    Args:
        dtype: of its numbers; None is what transformers would load them as.

    Raises:
        ValueError: for what is not supported, weights that do not fit the configuration, or a choice.
    """
    fields, family = fields_of(dense), FAMILIES[dense.model_type]
    _check_choices(choices, fields)
    shorter = not any(stored.startswith(family.prefix) for stored in shapes)
    names = {family.full_name(stored, shorter): stored for stored in shapes}
    embedding, head = family.names(EMBEDDING)[0], family.names(UNEMBEDDING)[0]
    if fields["tie_word_embeddings"] and head in names:
        # transformers ties what is equal or not there, and keeps what differs.
        names.setdefault(embedding, names[head])
        fields["tie_word_embeddings"] = same_numbers(read(names[embedding]), read(names[head]))
    config = ThoughtbubblesConfig(
        **{**fields, **FIXED, **choices},
        dtype=dtype or dense.dtype or _first_type(shapes),
        dense_config=_described(dense),
    )
    empty = _empty_weights(config)
    expected = {theirs: part for ours, part in empty.items()
                for theirs, part in zip(family.names(ours), family.split(ours, part, config), strict=True)}  # fmt: skip
    _check_weights(expected, {name: shapes[stored] for name, stored in names.items() if name in expected})
    sources = {ours: [names[theirs] for theirs in family.names(ours)] for ours in empty}
    used = {stored for several in sources.values() for stored in several} | {names.get(head)}
    left_out = sorted(stored for stored in shapes if stored not in used and not family.is_unused(stored))
    if sinks := [name for name in left_out if "sink" in name]:
        raise ValueError(f"{list_names(sinks)}: expected attention without sinks")
    return _Plan(config, family, sources, left_out)


def _check_choices(choices: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    for name, value in choices.items():
        if name in fields or name in ("dtype", "dense_config"):
            raise ValueError(f"{name}={value!r}: expected it unsaid, the dense model's own")
        if FIXED.get(name, value) != value:
            raise ValueError(f"{name}={value!r}: expected {FIXED[name]!r}, with which budget 1 is the dense model")
    if choices.get("attenuation") == "released":
        raise ValueError("attenuation='released': expected another, since it overwrites a channel of every head")


def _check_weights(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    if missing := expected.keys() - found.keys():
        raise ValueError(f"weights that do not fit config.json: missing: {list_names(missing)}")
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape:
            shapes = f"{list(tensor.shape)}, expected {list(expected[name].shape)}"
            raise ValueError(f"weights that do not fit config.json: {name}: of shape {shapes}")
        if not tensor.is_floating_point() or tensor.itemsize < 2:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"{name}: of type {kind}, expected weights that are not quantized")


def _empty_weights(config: ThoughtbubblesConfig) -> dict[str, Tensor]:
    """The tensors of a model that a dense one has too, without numbers."""
    with torch.device("meta"):
        model = ThoughtbubblesForCausalLM(config)
    tied = {UNEMBEDDING} if config.tie_word_embeddings else set()
    kept = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    return {name: tensor for name, tensor in kept.items() if not name.startswith((GATES, "model.copier."))}


def _new_parts(config: ThoughtbubblesConfig) -> dict[str, Tensor]:
    """The tensors of what a dense model has not, drawn as for any new model."""
    with torch.device("meta"):
        model = ThoughtbubblesForCausalLM(config)
    parts: dict[str, nn.Module] = {f"gates.{layer}": ForkGate(config, layer) for layer in config.gated_layers}
    if model.model.copier is not None:
        parts["copier"] = model.model._copier()
    found: dict[str, Tensor] = {}
    for place, part in parts.items():
        for module in part.modules():
            model._init_weights(module)
        found |= part.to(config.dtype).state_dict(prefix=f"model.{place}.")
    return found


def _assembled(plan: _Plan, read: Read, settings: GenerationConfig | None) -> ThoughtbubblesForCausalLM:
    weights = {name: plan.tensor(name, read).clone() for name in plan.sources} | _new_parts(plan.config)
    made: ThoughtbubblesForCausalLM = _filled(ThoughtbubblesForCausalLM, plan.config, weights, settings)
    return made


def _filled(
    kind: type[PreTrainedModel], config: PreTrainedConfig, weights: dict[str, Tensor], settings: GenerationConfig | None
) -> Any:
    """A model in evaluation mode with these weights, in the type that its configuration names."""
    logging.disable_progress_bar()
    made = kind.from_pretrained(None, config=config, state_dict=weights, dtype=config.dtype)
    made.name_or_path = made.config._name_or_path = ""
    if settings is not None:
        made.generation_config = usable(settings)
    return made


def _first_type(shapes: Mapping[str, Tensor]) -> torch.dtype:
    """The type that transformers takes where a configuration names none."""
    return next((t.dtype for t in shapes.values() if t.is_floating_point()), torch.float32)


def _described(dense: PreTrainedConfig) -> dict[str, Any]:
    return {name: value for name, value in dense.to_diff_dict().items() if name != "transformers_version"}


def _weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


# --- And back ---


def _dense_parts(
    config: ThoughtbubblesConfig, names: Mapping[str, Any]
) -> tuple[PreTrainedConfig, dict[str, Callable[[Read], Tensor]]]:
    """The configuration of the dense model, and how each of its tensors comes from those of ours.

    Raises:
        ValueError: as `to_dense`.
    """
    if config.dense_config is None:
        raise ValueError("dense_config=None: expected a model that was retrofitted")
    if config.gated_layers and config.gate_scores != FIXED["gate_scores"]:
        raise ValueError(f"gate_scores={config.gate_scores!r}: at budget 1 it is no dense model, expected 'forks'")
    if config.attenuation == "released" or config.num_loops > 1:
        raise ValueError(
            f"attenuation={config.attenuation!r}, num_loops={config.num_loops}: at budget 1 it is no dense model"
        )
    dense = CONFIG_MAPPING[config.dense_config["model_type"]].from_dict(
        {**config.dense_config, "vocab_size": config.vocab_size, "tie_word_embeddings": config.tie_word_embeddings}
    )
    dense.dtype = config.dtype
    family, ours = FAMILIES[dense.model_type], _empty_weights(config)
    if missing := ours.keys() - names.keys():
        raise ValueError(f"expected the weights of a model without adapters, merged: missing: {list_names(missing)}")
    parts: dict[str, Callable[[Read], Tensor]] = {}
    for name in ours:
        for place, theirs in enumerate(family.names(name)):
            parts[theirs] = partial(_split, family, config, name, place)
    return dense, parts


def _split(family: Family, config: ThoughtbubblesConfig, ours: str, place: int, read: Read) -> Tensor:
    return family.split(ours, read(ours), config)[place]


def _class_of(dense: PreTrainedConfig) -> type[PreTrainedModel]:
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(dense)]
    kind: type[PreTrainedModel] = found
    return kind


# --- Folders ---


def _found(source: str | Path) -> Path:
    """The folder of a dense model, fetched where it is one of the hub."""
    path = user_path(source)
    if path.exists() or not HUB_NAME.fullmatch(str(source)):
        if not (path / "config.json").is_file():
            raise InputError(f"source {path}: expected a folder with config.json, or a hub model")
        return path
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(str(source), allow_patterns=[*FETCHED, "model*.safetensors"]))
        if not any(folder.glob("model*.safetensors")):
            snapshot_download(str(source), allow_patterns=["pytorch_model*.bin"])
    except Exception as error:
        if is_network(error):
            raise RunError(f"source {source} cannot be fetched: {library_reason(error)}") from error
        raise InputError(f"source {source}: expected a folder, or a hub model: {library_reason(error)}") from error
    return folder


def _dense_config(folder: Path) -> PreTrainedConfig:
    check_supported(read_record(folder / "config.json"))
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # of the libraries, any
        raise ValueError(f"config.json: {library_reason(error)}") from error
    return config


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `path`; if the block raises, nothing is left."""
    check_output(path, {}, "OUT")
    with made_folder(path.parent), replacing(path) as made:
        made.mkdir()
        yield made


@contextmanager
def _said(of: str) -> Iterator[None]:
    """Say what the arguments' checks refuse as bad input."""
    try:
        yield
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{of}: {one_line(error)}") from error
