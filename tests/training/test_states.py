"""Weights and moments that one run stores and another, which holds them otherwise, reads."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers.utils import SAFE_WEIGHTS_NAME

from tests.helpers import random_ids, tiny_model
from thoughtbubbles import ThoughtbubblesForCausalLM
from thoughtbubbles.support.errors import RunError
from thoughtbubbles.training import states


def trained(steps: int, **shape: Any) -> tuple[ThoughtbubblesForCausalLM, torch.optim.AdamW]:
    """A model and its optimizer after some steps; matrices and vectors in groups of their own, as in a run."""
    model, ids = tiny_model(**shape), random_ids(2, 9)
    parameters = list(model.parameters())
    groups = [{"params": [p for p in parameters if (p.dim() > 1) is matrices]} for matrices in (True, False)]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    for _ in range(steps):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def moments(model: ThoughtbubblesForCausalLM, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, torch.Tensor]]:
    return {name: optimizer.state[parameter] for name, parameter in model.named_parameters()}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("tied", [True, False])
def test_a_run_that_divides_nothing_reads_what_divided_ones_store(tmp_path: Path, tied: bool) -> None:
    model, optimizer = trained(3, tie_word_embeddings=tied)
    other, others_optimizer = trained(0, tie_word_embeddings=tied)
    assert not states.is_sharded(tmp_path)
    states.save_sharded(tmp_path, model, optimizer)
    assert states.is_sharded(tmp_path)
    states.load_sharded_weights(tmp_path, other)
    states.load_sharded_moments(tmp_path, other, others_optimizer)
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)
    expected = moments(model, optimizer)
    torch.testing.assert_close(moments(other, others_optimizer), expected, rtol=0, atol=0)
    assert all(state["step"] == 3 and state["exp_avg_sq"].abs().max() > 0 for state in expected.values())
    assert [group["lr"] for group in others_optimizer.param_groups] == [1e-2, 1e-2]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_cannot_be_written_or_read_is_one_line(tmp_path: Path) -> None:
    model, optimizer = trained(1)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / states.SHARDED_NAME).touch()
    with pytest.raises(RunError, match=r"^checkpoint .*taken: .+exists"):
        states.save_sharded(tmp_path / "taken", model, optimizer)
    states.save_sharded(tmp_path, model, optimizer)
    for part in (tmp_path / states.SHARDED_NAME).glob("*.distcp"):
        part.unlink()
    with pytest.raises(RunError, match=r"^checkpoint .*: .+No such file"):
        states.load_sharded_weights(tmp_path, model)


def test_what_transformers_stores_finds_its_weight_by_the_order_of_the_optimizer(tmp_path: Path) -> None:
    model, optimizer = trained(3)
    other, others_optimizer = trained(0)
    save_file(states.whole_weights(model), tmp_path / SAFE_WEIGHTS_NAME)
    torch.save(optimizer.state_dict(), tmp_path / states.OPTIMIZER_NAME)
    states.divide_whole_weights(tmp_path, other)
    states.divide_whole_moments(tmp_path, other, others_optimizer)
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(moments(other, others_optimizer), moments(model, optimizer), rtol=0, atol=0)
