"""Weights divided over processes, of which all but this one are imagined; real ones are in test_processes.py."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.helpers import tiny_model
from tests.run_fixtures import PROCESSES
from thoughtbubbles import ThoughtbubblesForCausalLM
from thoughtbubbles.support.errors import RunError
from thoughtbubbles.training.sharding import check_sharding, divide

pytestmark = pytest.mark.usefixtures("imagined_processes")


def divided() -> ThoughtbubblesForCausalLM:
    model = tiny_model()
    divide(model, PROCESSES, "cpu", bfloat16=False)
    return model


def half_divided() -> ThoughtbubblesForCausalLM:
    """The blocks alone."""
    model = tiny_model()
    for block in model.model.layers:
        fully_shard(block, mesh=init_device_mesh("cpu", (PROCESSES,)))
    return model


def divided_over_two() -> ThoughtbubblesForCausalLM:
    model = tiny_model()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("nodes", "gpus"))
    fully_shard(model, mesh=mesh["gpus"])
    return model


def test_each_block_is_a_group_and_the_gates_are_of_the_rest() -> None:
    model = divided()
    groups = {name for name, module in model.named_modules() if isinstance(module, FSDPModule)}
    assert groups == {"", *(f"model.layers.{layer}" for layer in range(len(model.model.layers)))}
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_what_the_recipe_says_is_in_effect() -> None:
    check_sharding(divided(), "fsdp", PROCESSES)
    check_sharding(DistributedDataParallel(tiny_model()), "ddp", PROCESSES)
    for sharding in ("ddp", "fsdp"):
        check_sharding(tiny_model(), sharding, 1)
        check_sharding(DistributedDataParallel(tiny_model()), sharding, 1)


def test_what_the_recipe_says_is_not_in_effect() -> None:
    divided_words = "every weight divided by FSDP2"
    copied = DistributedDataParallel(tiny_model())
    for model, sharding, processes, found in (
        (tiny_model(), "fsdp", PROCESSES, "a model that nothing shares"),
        (tiny_model(), "ddp", PROCESSES, "a model that nothing shares"),
        (copied, "fsdp", PROCESSES, "one that DDP copies to all of them"),
        (divided(), "ddp", PROCESSES, divided_words),
        (divided(), "fsdp", 1, "weights of which some are divided otherwise or not at all"),
        (half_divided(), "fsdp", PROCESSES, "weights of which some are divided otherwise or not at all"),
        (divided_over_two(), "fsdp", PROCESSES, "weights of which some are divided otherwise or not at all"),
    ):
        with pytest.raises(RunError, match=f"^training.sharding={sharding} on {processes} .*, found {found}"):
            check_sharding(model, sharding, processes)
