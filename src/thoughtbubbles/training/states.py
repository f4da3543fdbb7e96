"""Weights and moments in a checkpoint, which runs that hold them whole or divided read alike.

Both are named by the parameters that they are of. Moments are in the folder `state`, in the form of
torch.distributed.checkpoint, into which each process writes what it holds. So are the weights where they are divided or
under adapters; otherwise they are beside it, as transformers saves a model.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
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

STATE_NAME = "state"
DRAWS_NAME = "draws_{}.pt"
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)


def save_state(checkpoint: Path, model: PreTrainedModel, optimizer: Optimizer, divided: bool, loadable: bool) -> None:
    """Write weights and moments; every process calls it, and the first writes alone what is not divided.

    Args:
        divided: whether each process holds its share.
        loadable: whether the weights are those of a model as transformers saves it.

    Raises:
        RunError: if they cannot be written; on all processes, if one of them cannot.
    """
    content: dict[str, Any] = {"optimizer": _moments(model, optimizer)}
    if divided or not loadable:
        content["model"] = _weights(model)
    main = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    if main and "model" not in content:
        model.save_pretrained(checkpoint)
    if main or divided:
        with _failures_said(checkpoint):
            state_dict_saver.save(content, checkpoint_id=checkpoint / STATE_NAME, no_dist=not divided)


def load_state(checkpoint: Path, model: PreTrainedModel, optimizer: Optimizer) -> None:
    """Read what `save_state` wrote, by as many processes as there are. Learning rates stay: they are the schedule's.

    Raises:
        RunError: if it cannot be read.
    """
    if (checkpoint / SAFE_WEIGHTS_NAME).exists():
        set_model_state_dict(model, {**load_file(checkpoint / SAFE_WEIGHTS_NAME)}, options=WHOLE)
    else:
        weights = _weights(model)
        _read({"model": weights}, checkpoint)
        set_model_state_dict(model, weights, options=StateDictOptions(strict=False))
    moments = _moments(model, optimizer)
    _read({"optimizer": moments}, checkpoint)
    _set_moments(model, optimizer, moments)


def carry_moments(checkpoint: Path, model: PreTrainedModel, optimizer: Optimizer) -> tuple[list[str], list[str]]:
    """Take moments over from another run's checkpoint, of the weights that both have.

    Returns:
        the names of these weights, and of those whose moments begin anew.

    Raises:
        RunError: if it cannot be read.
    """
    with _failures_said(checkpoint):
        stored = FileSystemReader(checkpoint / STATE_NAME).read_metadata().state_dict_metadata
    moments = _moments(model, optimizer)
    taken = {name: state for name, state in moments.items() if _has(stored, name, state)}
    anew = {name: state for name, state in moments.items() if name not in taken}
    for state in anew.values():
        state["step"].zero_()
    _read({"optimizer": taken}, checkpoint)
    _set_moments(model, optimizer, {**anew, **taken})
    return list(taken), list(anew)


def save_draws(checkpoint: Path, process: int, device: torch.device) -> None:
    """Write where the generators stand from which dropout of this process draws."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state()
    torch.save(states, checkpoint / DRAWS_NAME.format(process))


def load_draws(checkpoint: Path, process: int, device: torch.device) -> None:
    """Let them go on from there, where as many processes wrote the checkpoint."""
    path = checkpoint / DRAWS_NAME.format(process)
    states = torch.load(path, weights_only=True) if path.exists() else {}
    for kind, state in states.items():
        if kind == "cpu":
            torch.set_rng_state(state)
        elif kind == device.type:
            torch.get_device_module(device).set_rng_state(state)


def whole_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """All weights on the CPU of the first process, nothing on the others; all processes must ask."""
    return _weights(model, WHOLE)


def _read(content: dict[str, Any], checkpoint: Path) -> None:
    """Fill tensors with what the checkpoint has of the same names."""
    with _failures_said(checkpoint):
        state_dict_loader.load(content, checkpoint_id=checkpoint / STATE_NAME)


@contextmanager
def _failures_said(checkpoint: Path) -> Iterator[None]:
    """What torch raises of the processes that failed is no `Exception`, and holds their traces."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process writes and reads
            yield
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise RunError(f"checkpoint {checkpoint}: {one_line(cause)}") from error
    except FileNotFoundError as error:
        raise RunError(f"checkpoint {checkpoint}: {one_line(error)}") from error


def _weights(model: PreTrainedModel, options: StateDictOptions | None = None) -> dict[str, Any]:
    """By name; one that is another by another name is left out."""
    weights = get_model_state_dict(model, options=options)
    return {name: weight for name, weight in weights.items() if name not in model.all_tied_weights_keys}


def _moments(model: PreTrainedModel, optimizer: Optimizer) -> dict[str, Any]:
    """By name of the weight; zeros before the first step."""
    state: dict[str, Any] = get_optimizer_state_dict(model, optimizer)
    moments: dict[str, Any] = state["state"]
    return moments


def _set_moments(model: PreTrainedModel, optimizer: Optimizer, moments: dict[str, Any]) -> None:
    state: dict[str, Any] = get_optimizer_state_dict(model, optimizer)
    set_optimizer_state_dict(model, optimizer, {**state, "state": moments})


def _has(stored: Mapping[str, Any], name: str, state: Mapping[str, Any]) -> bool:
    """Whether moments of this name and shape are stored."""
    found = (stored.get(f"optimizer.{name}.{moment}") for moment in state)
    shapes = [getattr(each, "size", None) for each in found]
    return shapes == [value.shape if isinstance(value, Tensor) else None for value in state.values()]
