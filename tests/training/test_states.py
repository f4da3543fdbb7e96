"""Weights and moments that one run stores and another reads; divided ones are in test_processes.py."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import AdamW

from tests.helpers import random_ids, tiny_model
from thoughtbubbles import ThoughtbubblesForCausalLM
from thoughtbubbles.support.errors import RunError
from thoughtbubbles.training import states


def trained(steps: int, **shape: Any) -> tuple[ThoughtbubblesForCausalLM, AdamW]:
    """A model and its optimizer after some steps; matrices and vectors in groups of their own, as in a run."""
    model, ids = tiny_model(**shape), random_ids(2, 9)
    parameters = list(model.parameters())
    groups = [{"params": [p for p in parameters if (p.dim() > 1) is matrices]} for matrices in (True, False)]
    optimizer = AdamW(groups, lr=1e-2, fused=True)
    for _ in range(steps):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def moments(model: ThoughtbubblesForCausalLM, optimizer: AdamW) -> dict[str, dict[str, torch.Tensor]]:
    return {name: optimizer.state[parameter] for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("loadable", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_stored_is_read(tmp_path: Path, tied: bool, loadable: bool) -> None:
    model, optimizer = trained(3, tie_word_embeddings=tied)
    other, others_optimizer = trained(0, tie_word_embeddings=tied)
    states.save_state(tmp_path, model, optimizer, divided=False, loadable=loadable)
    assert (tmp_path / "model.safetensors").exists() is loadable
    states.load_state(tmp_path, other, others_optimizer)
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)
    expected = moments(model, optimizer)
    torch.testing.assert_close(moments(other, others_optimizer), expected, rtol=0, atol=0)
    assert all(state["step"] == 3 and state["exp_avg_sq"].abs().max() > 0 for state in expected.values())
    assert [group["lr"] for group in others_optimizer.param_groups] == [1e-2, 1e-2]


def test_moments_find_their_weight_by_its_name_whatever_the_groups(tmp_path: Path) -> None:
    model, optimizer = trained(3)
    states.save_state(tmp_path, model, optimizer, divided=False, loadable=True)
    other = tiny_model()
    others_optimizer = AdamW(list(other.parameters())[::-1], lr=1e-2, fused=True)
    states.load_state(tmp_path, other, others_optimizer)
    torch.testing.assert_close(moments(other, others_optimizer), moments(model, optimizer), rtol=0, atol=0)


def test_moments_are_carried_over_to_the_weights_that_both_have(tmp_path: Path) -> None:
    dense, optimizer = trained(3, routing="none")
    states.save_state(tmp_path, dense, optimizer, divided=False, loadable=True)
    model, fresh = trained(0)
    taken, anew = states.carry_moments(tmp_path, model, fresh)
    assert set(taken) == set(dict(dense.named_parameters()))
    assert anew
    assert all(".gates." in name for name in anew)
    expected, found = moments(dense, optimizer), moments(model, fresh)
    torch.testing.assert_close({name: found[name] for name in taken}, expected, rtol=0, atol=0)
    assert all(not value.any() for name in anew for value in found[name].values())


def test_what_cannot_be_written_or_read_is_one_line(tmp_path: Path) -> None:
    model, optimizer = trained(1)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / states.STATE_NAME).touch()
    with pytest.raises(RunError, match=r"^checkpoint .*taken: .+exists"):
        states.save_state(tmp_path / "taken", model, optimizer, divided=False, loadable=True)
    states.save_state(tmp_path, model, optimizer, divided=False, loadable=True)
    for part in (tmp_path / states.STATE_NAME).glob("*.distcp"):
        part.unlink()
    with pytest.raises(RunError, match=r"^checkpoint .*: .+No such file"):
        states.load_state(tmp_path, model, optimizer)
    with pytest.raises(RunError, match=r"^checkpoint .*nowhere: .+No such file"):
        states.carry_moments(tmp_path / "nowhere", model, optimizer)
