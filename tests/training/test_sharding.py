"""Weights divided over processes, of which all but this one are imagined; real ones are in test_processes.py."""

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from tests.helpers import tiny_model
from tests.run_fixtures import PROCESSES
from thoughtbubbles import ThoughtbubblesForCausalLM
from thoughtbubbles.training.sharding import divide

pytestmark = pytest.mark.usefixtures("imagined_processes")


def divided() -> ThoughtbubblesForCausalLM:
    model = tiny_model()
    divide(model, PROCESSES, "cpu", bfloat16=False)
    return model


def test_each_block_is_a_group_and_the_gates_are_of_the_rest() -> None:
    model = divided()
    groups = {name for name, module in model.named_modules() if isinstance(module, FSDPModule)}
    assert groups == {"", *(f"model.layers.{layer}" for layer in range(len(model.model.layers)))}
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
