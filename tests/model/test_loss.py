"""The loss over chunks of rows against the loss of all logits (method: Padding)."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.model.test_attention import record
from thoughtbubbles.model import loss as module
from thoughtbubbles.model.loss import IGNORE_INDEX, assert_in_vocabulary, chunked_next_token_loss, next_token_loss

VOCABULARY, HIDDEN = 37, 8


def inputs(batch: int, length: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, unembedding, targets of which some are ignored."""
    draw = torch.Generator().manual_seed(length)
    hidden = torch.randn(batch, length, HIDDEN, generator=draw).to(dtype).requires_grad_()
    matrix = torch.randn(VOCABULARY, HIDDEN, generator=draw).to(dtype).requires_grad_()
    targets = torch.randint(VOCABULARY, (batch, length), generator=draw)
    targets[torch.rand(batch, length, generator=draw) < 0.3] = IGNORE_INDEX
    return hidden, matrix, targets


def whole(hidden: Tensor, matrix: Tensor, targets: Tensor, num_items: Any = None) -> Tensor:
    return next_token_loss(hidden @ matrix.T, targets, num_items)


@pytest.mark.parametrize("num_items", [None, 5, torch.tensor(7)], ids=str)
@pytest.mark.parametrize(("rows", "alignment"), [(1, 1), (4, 1), (1000, 1), (4, 16)])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 7)])
def test_loss_and_gradients_are_those_of_all_logits(
    batch: int, length: int, rows: int, alignment: int, num_items: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ROWS", rows)
    monkeypatch.setitem(module.ALIGNMENT, "cpu", alignment)
    hidden, matrix, targets = inputs(batch, length)
    targets[0, 0] = 3
    found, expected = (f(hidden, matrix, targets, num_items) for f in (chunked_next_token_loss, whole))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    gradients = (torch.autograd.grad(3 * loss, (hidden, matrix)) for loss in (found, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("num_items", [None, 5, torch.tensor(0)], ids=str)
def test_no_target_at_all_is_what_cross_entropy_makes_of_it(num_items: Any) -> None:
    hidden, matrix, targets = inputs(1, 4)
    nothing = torch.full_like(targets, IGNORE_INDEX)
    found, expected = (f(hidden, matrix, nothing, num_items) for f in (chunked_next_token_loss, whole))
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert found.isnan() == (num_items is None or num_items == 0)
    for loss in (found, expected):
        assert all(gradient.eq(0).all() for gradient in torch.autograd.grad(loss, (hidden, matrix)))


@pytest.mark.parametrize("wrong", [-1, -99, -101, VOCABULARY])
def test_targets_outside_the_vocabulary_are_refused(wrong: int) -> None:
    targets = inputs(2, 5)[2]
    assert_in_vocabulary(targets, VOCABULARY)
    targets[1, 3] = wrong
    with pytest.raises(RuntimeError, match="labels: expected token ids from 0 to 36, or -100"):
        assert_in_vocabulary(targets, VOCABULARY)


def test_no_more_gradients_are_formed_than_are_wanted() -> None:
    hidden, matrix, targets = inputs(2, 5)
    frozen = matrix.detach()
    (found,) = torch.autograd.grad(chunked_next_token_loss(hidden, frozen, targets), hidden)
    torch.testing.assert_close(found, torch.autograd.grad(whole(hidden, matrix, targets), hidden)[0])
    with torch.no_grad():
        recorder = record_operators(lambda: chunked_next_token_loss(hidden, matrix, targets))
    assert recorder.count("aten::mm") == 1


def record_operators(work: Any) -> list[str]:
    from torch.profiler import profile

    with profile() as seen:
        work()
    return [event.name for event in seen.events()]


def test_rows_of_logits_are_not_held_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS", 4)
    hidden, matrix, targets = inputs(4, 64)
    assert record(lambda: whole(hidden, matrix, targets)).largest == 256 * VOCABULARY
    assert record(lambda: chunked_next_token_loss(hidden, matrix, targets)).largest == 256 * HIDDEN


def test_products_are_as_wide_as_the_device_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.ALIGNMENT, "cpu", 16)
    hidden, matrix, targets = inputs(3, 7)
    assert record(lambda: chunked_next_token_loss(hidden, matrix, targets)).largest == 21 * 48


def test_autocast_decides_the_type_of_the_products() -> None:
    hidden, matrix, targets = inputs(3, 50, torch.float32)
    expected = whole(hidden, matrix, targets)
    with torch.autocast("cpu", torch.bfloat16):
        found, plain = (f(hidden, matrix, targets) for f in (chunked_next_token_loss, whole))
    assert found.dtype == torch.float32
    assert found.item() != expected.item()
    assert found.item() == pytest.approx(plain.item(), rel=1e-6)
    for ours, theirs in zip(*(torch.autograd.grad(loss, (hidden, matrix)) for loss in (found, plain)), strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 0.01 * theirs.norm()
