"""Memory of sharded training against what torch's FSDP2 leaves on a process."""

import pytest
from torch import nn

from tests.run_fixtures import PROCESSES
from thoughtbubbles import ThoughtbubblesConfig, ThoughtbubblesForCausalLM
from thoughtbubbles.model.accounting import process_bytes, state_bytes
from thoughtbubbles.training.sharding import divide

CONFIG = ThoughtbubblesConfig(
    vocab_size=61, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, fork_layers=[1, 2]
)


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_one_process_shares_nothing(sharding: str) -> None:
    assert process_bytes(CONFIG, "bfloat16", True, 1, sharding) == state_bytes(CONFIG, "bfloat16", True)


def test_ddp_holds_everything_and_buckets_for_the_gradients() -> None:
    ours, alone = process_bytes(CONFIG, "bfloat16", processes=8), state_bytes(CONFIG, "bfloat16")
    assert ours.exchange == alone.gradients
    assert ours.total == alone.total + alone.gradients


@pytest.mark.usefixtures("imagined_processes")
def test_fsdp_holds_the_share_that_torch_leaves_on_a_process() -> None:
    model = ThoughtbubblesForCausalLM(CONFIG)
    divide(model, PROCESSES, "cpu", bfloat16=False)
    held = sum(parameter.to_local().numel() for parameter in model.parameters())  # type: ignore[attr-defined]
    ours = process_bytes(CONFIG, processes=PROCESSES, sharding="fsdp")
    # torch divides each parameter by its rows, and the first process has what does not come out even.
    assert ours.weights == ours.gradients == pytest.approx(4 * held, rel=0.01)
    assert ours.optimizer == 2 * ours.weights
    assert ours.casts == 0


@pytest.mark.parametrize(("precision", "item"), [("float32", 4), ("bfloat16", 2)])
def test_fsdp_gathers_the_rest_and_a_block_at_a_time(precision: str, item: int) -> None:
    model = ThoughtbubblesForCausalLM(CONFIG)
    block = size(model.model.layers[0])
    rest = size(model) - CONFIG.num_hidden_layers * block
    found = process_bytes(CONFIG, precision, processes=PROCESSES, sharding="fsdp")
    assert found.exchange == 4 * 2 * rest + item * 3 * block + 4 * block
    assert found.casts == 0
    assert found.loss == state_bytes(CONFIG, precision).loss > 4 * model.lm_head.weight.numel()


def test_more_processes_hold_less_each_but_gather_as_much() -> None:
    few, many = (process_bytes(CONFIG, processes=count, sharding="fsdp") for count in (2, 8))
    assert few.weights == pytest.approx(4 * many.weights, rel=1e-3)
    assert few.exchange == many.exchange


def test_another_sharding_is_refused() -> None:
    with pytest.raises(ValueError, match="sharding='zero': expected one of ddp, fsdp"):
        process_bytes(CONFIG, processes=2, sharding="zero")
