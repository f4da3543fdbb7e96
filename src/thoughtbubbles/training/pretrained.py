"""The trained model that a run starts from, and what becomes of its gates where the recipe changes them."""

from dataclasses import dataclass
from pathlib import Path

import torch

from thoughtbubbles.model.configuration import ThoughtbubblesConfig
from thoughtbubbles.model.loading import load_config, load_weights
from thoughtbubbles.model.modeling import ThoughtbubblesForCausalLM
from thoughtbubbles.model.weights import excused, list_names

GATE_FIELDS = ("routing", "fork_layers", "gate_scores")
"""Fields of the configuration that shape the gates."""
GATES = "model.gates."


@dataclass(frozen=True)
class GateChanges:
    """What a configuration makes of the gates of a stored model.

    Attributes:
        fields: those of `GATE_FIELDS` that differ.
        new: names of tensors that only the new model has.
        dropped: names of tensors that only the stored one has.
    """

    fields: list[str]
    new: set[str]
    dropped: set[str]

    def __str__(self) -> str:
        """In one line; empty where nothing changes."""
        parts = [("new", self.new), ("dropped", self.dropped)]
        said = "; ".join(f"{what} {list_names(names)}" for what, names in parts if names)
        return f"the recipe changes {' and '.join(self.fields)}: {said}" if said else ""


def gate_changes(path: str | Path, config: ThoughtbubblesConfig) -> GateChanges:
    """What `config` makes of the gates of the model at `path`.

    Raises:
        InputError: as `load_config`.
    """
    stored = load_config(path)
    fields = [name for name in GATE_FIELDS if getattr(stored, name) != getattr(config, name)]
    before, after = (_gate_names(each) if fields else set() for each in (stored, config))
    return GateChanges(fields, after - before, before - after)


def start_from(path: str | Path, config: ThoughtbubblesConfig) -> ThoughtbubblesForCausalLM:
    """The model at `path` with another configuration; gates that only this has begin anew.

    Its weights are float32, whatever was saved: updates of bfloat16 weights get lost in rounding.

    Raises:
        InputError: as `load_weights`; gates that `gate_changes` lists are no misfit.
    """
    changes = gate_changes(path, config)
    with excused(changes.new | changes.dropped):
        return load_weights(path, config=config, dtype=torch.float32)


def _gate_names(config: ThoughtbubblesConfig) -> set[str]:
    with torch.device("meta"):
        model = ThoughtbubblesForCausalLM(config)
    return {name for name in model.state_dict() if name.startswith(GATES)}
