"""Weights and moments in checkpoints, whole or divided, read by a run that holds them whole or divided.

A divided run stores them in the folder `sharded` by torch.distributed.checkpoint, each process its share; any number of
processes reads them. A run that holds them whole stores what transformers does.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME

from thoughtbubbles.support.errors import RunError, one_line

SHARDED_NAME = "sharded"
OPTIMIZER_NAME = "optimizer.pt"
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)


def is_sharded(checkpoint: Path) -> bool:
    """Whether a divided run wrote a checkpoint."""
    return (checkpoint / SHARDED_NAME).is_dir()


def save_sharded(checkpoint: Path, model: PreTrainedModel, optimizer: Optimizer) -> None:
    """Write what this process holds of weights and moments; all processes must, each its share.

    Raises:
        RunError: on all of them, if one cannot.
    """
    content = {"model": _weights(model), "optimizer": _moments(model, optimizer)}
    with _failures_said(checkpoint):
        state_dict_saver.save(content, checkpoint_id=checkpoint / SHARDED_NAME)


def load_sharded_weights(checkpoint: Path, model: PreTrainedModel) -> None:
    """Read weights that `save_sharded` wrote into a model, whole or divided."""
    weights = _weights(model)
    _read({"model": weights}, checkpoint)
    set_model_state_dict(model, weights, options=StateDictOptions(strict=False))


def load_sharded_moments(checkpoint: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """The same of moments. Learning rates stay: they are the schedule's."""
    moments = _moments(model, optimizer)
    _read({"optimizer": moments}, checkpoint)
    _set_moments(model, optimizer, moments, StateDictOptions())


def _read(content: dict[str, Any], checkpoint: Path) -> None:
    """Fill tensors with what the checkpoint has of the same names."""
    with _failures_said(checkpoint), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process may read alone
        state_dict_loader.load(content, checkpoint_id=checkpoint / SHARDED_NAME)


@contextmanager
def _failures_said(checkpoint: Path) -> Iterator[None]:
    """What torch raises of the processes that failed is no `Exception`, and holds their traces."""
    try:
        yield
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise RunError(f"checkpoint {checkpoint}: {one_line(cause)}") from error


def divide_whole_weights(checkpoint: Path, model: PreTrainedModel) -> None:
    """Read weights that transformers stored into a divided model."""
    weights: dict[str, Any] = load_file(checkpoint / SAFE_WEIGHTS_NAME)
    set_model_state_dict(model, weights, options=WHOLE)


def divide_whole_moments(checkpoint: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """The same of moments, which are stored in the order of the optimizer's parameters."""
    stored = torch.load(checkpoint / OPTIMIZER_NAME, map_location="cpu", weights_only=True)["state"]
    names = {parameter: name for name, parameter in model.named_parameters()}
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    moments = {name: stored[place] for place, name in enumerate(order)}
    _set_moments(model, optimizer, moments, WHOLE)


def whole_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """All weights on the CPU of the first process, nothing on the others; all processes must ask."""
    return _weights(model, WHOLE)


def _weights(model: PreTrainedModel, options: StateDictOptions | None = None) -> dict[str, Any]:
    """By name; one that is another by another name is left out."""
    weights = get_model_state_dict(model, options=options)
    return {name: weight for name, weight in weights.items() if name not in model.all_tied_weights_keys}


def _moments(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """By name of the weight; zeros before the first step."""
    state: dict[str, Any] = get_optimizer_state_dict(model, optimizer)
    moments: dict[str, Any] = state["state"]
    return moments


def _set_moments(model: nn.Module, optimizer: Optimizer, moments: dict[str, Any], options: StateDictOptions) -> None:
    state: dict[str, Any] = get_optimizer_state_dict(model, optimizer)
    set_optimizer_state_dict(model, optimizer, {**state, "state": moments}, options=options)
