"""What a step of the loop reads back from the device, and what it does from a gradient on that is not finite."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.run_fixtures import tiny_recipe
from tests.training.test_run import comparable
from thoughtbubbles.data import PreparedData
from thoughtbubbles.data.feed.loading import load_run_data
from thoughtbubbles.support.errors import RunError
from thoughtbubbles.support.machine import measured_peak
from thoughtbubbles.training.checkpoints import sealed
from thoughtbubbles.training.configuration import build_config
from thoughtbubbles.training.run import build_loop, build_model, train
from thoughtbubbles.training.session import Callback, Session

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")
"""Operators whose result the host waits for."""


class Readbacks(TorchDispatchMode):
    """Counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITS or (name == "index" and any(each.dtype == torch.bool for each in args[1] if each is not None)):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


class CountReadbacks(Callback):
    """Of each step, but not of its logging, evaluation and saving."""

    def __init__(self) -> None:
        self.counts: list[list[str]] = []

    def on_step_begin(self, session: Session) -> None:
        self._mode = Readbacks()
        self._mode.__enter__()

    def on_step_end(self, session: Session) -> None:
        self._mode.__exit__(None, None, None)
        self.counts.append(self._mode.found)


@pytest.mark.parametrize("routing", ["causal", "topk", "threshold", "random", "none"])
def test_nothing_is_read_back_between_logged_steps(
    tmp_path: Path, tiny_data: PreparedData, monkeypatch: pytest.MonkeyPatch, routing: str
) -> None:
    overrides = [f"model.routing={routing}", "training.micro_batch_size=2", "training.log_every=4"]
    recipe = tiny_recipe(tmp_path, tiny_data.path, *overrides)
    data = load_run_data(recipe)
    count = CountReadbacks()
    (tmp_path / "run").mkdir()
    loop = build_loop(recipe, build_model(recipe, build_config(recipe, data)), data, more=[count])
    # Batches are made on the host, where their targets are counted too.
    batches, targets = list(loop.batches()), torch.tensor(4 * 15)
    monkeypatch.setattr(loop, "batches", lambda: iter(batches))
    monkeypatch.setattr(loop, "_count_targets", lambda _: targets)
    loop.train()
    assert len(count.counts) == 12
    assert [found for number, found in enumerate(count.counts, 1) if number % 4] == [[]] * 9
    if routing != "none":
        assert all(count.counts[number] for number in (3, 7, 11))  # what the forks did is logged


class Spoil(Callback):
    """Makes a weight infinite before a step, or takes that back."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.weights: dict[int, dict[str, torch.Tensor]] = {}
        self.moments: dict[int, list[torch.Tensor]] = {}

    def on_step_begin(self, session: Session) -> None:
        norm = session.model.model.norm.weight.data
        if session.step + 1 == self.at:
            self._kept = norm.clone()
            norm[0] = float("inf")
        if session.step == self.at:
            norm.copy_(self._kept)

    def on_step_end(self, session: Session) -> None:
        names = {name: parameter.detach().clone() for name, parameter in session.model.named_parameters()}
        self.weights[session.step] = names
        states = session.optimizer.state_dict()["state"].values()
        self.moments[session.step] = [value.clone() for state in states for value in state.values()]


def test_from_a_gradient_on_that_is_not_finite_no_update_is_made(tmp_path: Path, tiny_data: PreparedData) -> None:
    overrides = ["training.log_every=100", "training.eval_every=100", "training.save_every=9"]
    spoil = Spoil(at=5)
    with pytest.raises(RunError, match=r"^step 5: loss nan, gradient norm nan: stopped before the update"):
        train(tiny_recipe(tmp_path, tiny_data.path, *overrides), progress=False, callbacks=[spoil])
    assert sorted(spoil.weights) == list(range(1, 10))
    for step in (6, 7, 8, 9):
        torch.testing.assert_close(spoil.weights[step], spoil.weights[4], rtol=0, atol=0)
    for step in (5, 6, 7, 8, 9):
        torch.testing.assert_close(spoil.moments[step], spoil.moments[4], rtol=0, atol=0)
    assert not torch.equal(spoil.weights[4]["model.norm.weight"], spoil.weights[3]["model.norm.weight"])
    found = json.loads((tmp_path / "run" / "diverged.json").read_text())
    assert found["step"] == 5
    assert list(found["samples"]) == ["16", "17", "18", "19"]
    assert not sealed(tmp_path / "run" / "checkpoints")


def test_measuring_the_peak_of_the_machine_draws_nothing_from_the_model(
    tmp_path: Path, tiny_data: PreparedData
) -> None:
    overrides = ["model.hidden_dropout=0.2", "training.steps=4"]
    for name, more in (("given", ["training.peak_flops=1e9"]), ("measured", [])):
        (tmp_path / name).mkdir()
        measured_peak.cache_clear()
        train(tiny_recipe(tmp_path / name, tiny_data.path, *overrides, *more), progress=False)
    assert comparable(tmp_path / "given" / "run") == comparable(tmp_path / "measured" / "run")
