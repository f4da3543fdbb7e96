"""The trained model that a run starts from, and what becomes of its gates where the recipe changes them."""

import torch

from thoughtbubbles.model.configuration import ThoughtbubblesConfig
from thoughtbubbles.model.loading import load_config, load_weights
from thoughtbubbles.model.modeling import ThoughtbubblesForCausalLM
from thoughtbubbles.model.weights import excused, list_names

GATE_FIELDS = ("routing", "fork_layers", "gate_scores", "gate_start", "fork_content")
"""Fields of the configuration that shape the gates."""
GATES = "model.gates."


def start_from(path: str, config: ThoughtbubblesConfig) -> tuple[ThoughtbubblesForCausalLM, str]:
    """The model at `path` with another configuration, and in a line what that makes of its gates; "" is nothing.

    Gates that only the new one has begin anew, others are dropped. The weights are float32, whatever was saved: updates
    of bfloat16 weights get lost in rounding.

    Raises:
        InputError: as `load_weights`; where a field changes that shapes the gates, these gates are no misfit.
    """
    stored = load_config(path)
    fields = [name for name in GATE_FIELDS if getattr(stored, name) != getattr(config, name)]
    before, after = (_gate_names(each) if fields else set() for each in (stored, config))
    parts = [("new", after - before), ("dropped", before - after)]
    said = "; ".join(f"{what} {list_names(names)}" for what, names in parts if names)
    with excused(before ^ after):
        model = load_weights(path, config=config, dtype=torch.float32)
    return model, f"the recipe changes {' and '.join(fields)}: {said}" if said else ""


def _gate_names(config: ThoughtbubblesConfig) -> set[str]:
    with torch.device("meta"):
        model = ThoughtbubblesForCausalLM(config)
    return {name for name in model.state_dict() if name.startswith(GATES)}
