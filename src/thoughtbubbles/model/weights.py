"""Reading weights: what does not fit the configuration is refused, in place of random numbers for what is missing."""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import load_state_dict

MOST_NAMES = 12
"""Tensors that a message names: those of a block."""
EMBEDDING, UNEMBEDDING = "model.embed_tokens.weight", "lm_head.weight"
_excused: ContextVar[frozenset[str]] = ContextVar("excused", default=frozenset())


class CheckedModel(PreTrainedModel):
    """A model that `from_pretrained` loads whole or not at all, whichever class or tool calls it."""

    @staticmethod
    def _load_pretrained_model(
        model: Any,
        state_dict: dict[str, Tensor] | None,
        checkpoint_files: list[str] | None,
        load_config: Any,
        expected_keys: list[str] | None = None,
    ) -> tuple[Any, Any]:
        """The step of `from_pretrained` that fills the model, before what is missing would be drawn anew.

        Raises:
            ValueError: naming the tensors that are missing, left over, of another shape or of another kind of number.
        """
        found, offloaded = PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, expected_keys
        )
        if expected_keys is None:  # an adapter of peft lists its own
            stored = _tensors(state_dict, checkpoint_files, load_config)
            _untie(model, found.missing_keys, load_config)
            _refuse_misfits(model, found, stored, load_config.ignore_mismatched_sizes)
        return found, offloaded


@contextmanager
def excused(names: Iterable[str]) -> Iterator[None]:
    """While the context lasts, tensors of these names may be missing, and are then drawn anew, or left over."""
    token = _excused.set(frozenset(names))
    try:
        yield
    finally:
        _excused.reset(token)


def list_names(names: Iterable[str]) -> str:
    """Names of tensors in one line, the first of many."""
    ordered = sorted(names)
    more = len(ordered) - MOST_NAMES
    return ", ".join(islice(ordered, MOST_NAMES)) + (f" and {more} more" if more > 0 else "")


def _tensors(state_dict: Mapping[str, Tensor] | None, files: list[str] | None, load_config: Any) -> dict[str, Tensor]:
    """What is stored, by name; from files shapes and types alone. Quantised numbers are their library's matter."""
    if load_config.is_quantized:
        return {}
    if state_dict is not None:
        return dict(state_dict)
    return {name: tensor for file in files or () for name, tensor in load_state_dict(file, "meta").items()}


def _untie(model: Any, missing: set[str], load_config: Any) -> None:
    """Start an unembedding of its own from the embedding that a stored model ties it to."""
    config, folder = model.config, load_config.pretrained_model_name_or_path
    wanted = UNEMBEDDING in missing and EMBEDDING not in missing and not config.tie_word_embeddings
    if not wanted or folder is None:
        return
    stored, _ = type(config).get_config_dict(folder, **(load_config.download_kwargs or {}))
    if stored.get("tie_word_embeddings", type(config).tie_word_embeddings):
        matrix: Any = nn.Parameter(model.get_parameter(EMBEDDING).detach().clone())
        matrix._is_hf_initialized = True  # else transformers draws it
        model.lm_head.weight = matrix
        missing.discard(UNEMBEDDING)


def _refuse_misfits(model: Any, found: Any, stored: Mapping[str, Tensor], any_shape: bool) -> None:
    may_miss, tied = _excused.get(), model.all_tied_weights_keys
    missing = found.missing_keys - may_miss
    # One of two tied matrices is enough.
    missing -= {name for pair in tied.items() for name in pair if len(missing & set(pair)) == 1}
    unused = {name for name in found.unexpected_keys if not _is_ignored(model, name)} - may_miss
    shapes = [] if any_shape else sorted(found.mismatched_keys)
    wrongs = [
        f"missing: {list_names(missing)}" if missing else "",
        f"not expected: {list_names(unused)}" if unused else "",
        "; ".join(f"{name}: of shape {list(has)}, expected {list(needs)}" for name, has, needs in shapes[:MOST_NAMES]),
        _other_kinds(model, stored),
        "" if missing else _untied(model, found.missing_keys),
    ]
    if any(wrongs):
        raise ValueError(f"weights that do not fit the configuration: {'; '.join(filter(None, wrongs))}")
    # What is excused is drawn anew without a report of transformers.
    model._keys_to_ignore_on_load_missing = {re.escape(name) for name in may_miss}
    model._keys_to_ignore_on_load_unexpected = {re.escape(name) for name in found.unexpected_keys}


def _is_ignored(model: Any, name: str) -> bool:
    """Whether a model has no use for a tensor by its nature: one without an unembedding for that."""
    return name == UNEMBEDDING and not hasattr(model, "lm_head")


def _other_kinds(model: Any, stored: Mapping[str, Tensor]) -> str:
    """Which stored tensors are whole or complex numbers in the place of real ones, or the reverse."""
    prefix = f"{model.base_model_prefix}."
    wrong = []
    for name, tensor in model.state_dict().items():
        there = next((stored[n] for n in (name, prefix + name, name.removeprefix(prefix)) if n in stored), None)
        if there is not None and _kind(there) != _kind(tensor):
            wrong.append(f"{name}: of type {str(there.dtype).removeprefix('torch.')}, expected {_kind(tensor)} numbers")
    return "; ".join(wrong[:MOST_NAMES])


def _kind(tensor: Tensor) -> str:
    return "floating-point" if tensor.is_floating_point() else "complex" if tensor.is_complex() else "whole"


def _untied(model: Any, missing: set[str]) -> str:
    """Which matrices that the configuration ties are stored apart and differ."""
    for pair in model.all_tied_weights_keys.items():
        one, other = map(model.get_parameter, pair)
        both_there = not missing & set(pair) and "meta" not in (one.device.type, other.device.type)
        if both_there and not torch.equal(one, other.to(one.device)):
            return f"{' and '.join(pair)} differ, expected equal ones, since tie_word_embeddings=True"
    return ""
