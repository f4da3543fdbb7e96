"""Streams, their positions and merges, and the column map (method: State, Positions, Merge)."""

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from thoughtbubbles.model.streams import ColumnMap, Streams

WIDTH = 3
VOCABULARY = 5

# Bubble sizes of each token of each row; rows have different numbers of tokens, some none.
batches = st.lists(st.lists(st.integers(1, 4), max_size=5), min_size=1, max_size=4).filter(any)


def build(batch: list[list[int]], spare_tokens: int = 1, spare_slots: int = 2) -> Streams:
    """Streams in float64 with the given bubbles, random residuals and scores, and dead slots at the right."""
    num_tokens = max(len(row) for row in batch) + spare_tokens
    slots = max(max(sum(row) for row in batch), num_tokens) + spare_slots
    generator = torch.Generator().manual_seed(slots)
    tokens = [[t for t, size in enumerate(row) for _ in range(size)] for row in batch]
    token = torch.tensor([row + [num_tokens] * (slots - len(row)) for row in tokens])
    alive = token < num_tokens
    residual = torch.randn(len(batch), slots, WIDTH, generator=generator, dtype=torch.float64)
    log_score = -2 * torch.rand(len(batch), slots, generator=generator, dtype=torch.float64)
    return Streams(
        residual=torch.where(alive[..., None], residual, 0),
        log_score=torch.where(alive, log_score, 0),
        token=token,
        alive=alive,
        num_tokens=num_tokens,
        origin=torch.where(alive, 2 * torch.arange(slots) + 1, -1),
    )


def members(batch: list[list[int]], row: int, token: int) -> range:
    """The slots of a token's bubble."""
    start = sum(batch[row][:token])
    return range(start, start + batch[row][token])


def bubbles(batch: list[list[int]]) -> list[tuple[int, int, range]]:
    return [(row, t, members(batch, row, t)) for row in range(len(batch)) for t in range(len(batch[row]))]


@given(batches)
def test_positions_of_a_bubble_are_equal_fractions_that_end_at_its_token(batch: list[list[int]]) -> None:
    positions = build(batch).positions()
    for row, t, slots in bubbles(batch):
        for i, slot in enumerate(slots, start=1):
            expected = float(t - 1 + Fraction(i, len(slots)))
            assert positions[row, slot].item() == pytest.approx(expected, abs=1e-15 * (t + 1))


def test_positions_of_one_example() -> None:
    # Tokens of ordinals 0, 1, 2 and bubbles of 1, 2 and 4 streams.
    streams = build([[1, 2, 4]], spare_tokens=0, spare_slots=0)
    assert streams.positions().tolist() == [[0, 0.5, 1, 1.25, 1.5, 1.75, 2]]
    assert streams.positions(origin=1).tolist() == [[1, 1.5, 2, 2.25, 2.5, 2.75, 3]]


def test_positions_of_a_late_token_are_float32_close() -> None:
    streams = Streams(
        torch.zeros(1, 3, 1), torch.zeros(1, 3), torch.tensor([[4095] * 3]), torch.ones(1, 3, dtype=torch.bool), 4096
    )
    assert streams.positions().dtype == torch.float32
    assert torch.allclose(streams.positions(), torch.tensor([4094 + 1 / 3, 4094 + 2 / 3, 4095]), rtol=1e-7, atol=0)


def test_positions_in_dead_slots_are_finite() -> None:
    assert build([[1], [2, 3]]).positions().isfinite().all()


@given(batches)
def test_bubble_sizes(batch: list[list[int]]) -> None:
    streams = build(batch)
    assert streams.bubble_sizes().tolist() == [row + [0] * (streams.num_tokens - len(row)) for row in batch]


@given(batches)
def test_root_is_the_rightmost_stream_of_its_token(batch: list[list[int]]) -> None:
    expected = torch.zeros_like(build(batch).alive)
    for row, _, slots in bubbles(batch):
        expected[row, slots[-1]] = True
    assert torch.equal(build(batch).is_root, expected)


def test_root_of_a_full_row_is_found_at_its_end() -> None:
    assert build([[2, 1]], spare_tokens=0, spare_slots=0).is_root.tolist() == [[False, True, True]]


@given(batches)
def test_roots(batch: list[list[int]]) -> None:
    streams = build(batch)
    expected = streams.residual.new_zeros(len(batch), streams.num_tokens, WIDTH)
    for row, t, slots in bubbles(batch):
        expected[row, t] = streams.residual[row, slots[-1]]
    assert torch.equal(streams.roots(), expected)


@given(batches, st.booleans())
def test_residuals_merge_by_their_scores(batch: list[list[int]], weighted: bool) -> None:
    streams = build(batch)
    expected = streams.residual.new_zeros(len(batch), streams.num_tokens, WIDTH)
    for row, t, slots in bubbles(batch):
        for slot in slots:
            p = math.exp(streams.log_score[row, slot].item()) if weighted else 1
            expected[row, t] += p * streams.residual[row, slot]
    merged = streams.merge_residuals(streams.log_score.exp() if weighted else None)
    assert torch.allclose(merged, expected, rtol=0, atol=1e-12)


@given(batches)
def test_shares_are_scores_over_the_sum_of_their_bubble(batch: list[list[int]]) -> None:
    streams = build(batch)
    shares = streams.shares()
    for row, _, slots in bubbles(batch):
        p = streams.log_score[row, slots.start : slots.stop].exp()
        assert torch.allclose(shares[row, slots.start : slots.stop], p / p.sum(), rtol=0, atol=1e-12)


def test_shares_of_scores_far_below_zero_do_not_underflow() -> None:
    streams = build([[2, 3]])
    low = replace(streams, log_score=torch.where(streams.alive, streams.log_score - 1000, 0))
    assert torch.allclose(low.shares()[streams.alive], streams.shares()[streams.alive], rtol=0, atol=1e-12)


def test_gradients_of_the_shares() -> None:
    streams = build([[1, 3], [2]])

    def merged(log_score: Tensor) -> Tensor:
        scored = replace(streams, log_score=log_score)
        return scored.merge_residuals(scored.shares())

    assert torch.autograd.gradcheck(merged, (streams.log_score.clone().requires_grad_(),))


def mixture(streams: Streams, log_probs: Tensor, batch: list[list[int]], weighted: bool) -> Tensor:
    """The merge `probability` by loops over probabilities, not logs; zeros where there is no token."""
    expected = log_probs.new_zeros(len(batch), streams.num_tokens, VOCABULARY)
    for row, t, slots in bubbles(batch):
        weights = [math.exp(streams.log_score[row, slot].item()) if weighted else 1.0 for slot in slots]
        distributions = [log_probs[row, slot].exp() for slot in slots]
        mixed = torch.stack([w * d for w, d in zip(weights, distributions, strict=True)]).sum(0)
        expected[row, t] = (mixed / sum(weights)).log()
    return expected


@given(batches, st.booleans())
def test_probabilities_mix_by_their_scores(batch: list[list[int]], weighted: bool) -> None:
    streams = build(batch)
    log_probs = torch.randn(*streams.token.shape, VOCABULARY, dtype=torch.float64).log_softmax(-1)
    mixed = streams.mix_log_probs(log_probs, weighted)
    assert torch.allclose(mixed, mixture(streams, log_probs, batch, weighted), rtol=0, atol=1e-12)


def test_mixture_of_scores_far_below_zero_does_not_underflow() -> None:
    streams = build([[2, 3]])
    low = Streams(
        streams.residual,
        torch.where(streams.alive, streams.log_score - 1000, 0),
        streams.token,
        streams.alive,
        streams.num_tokens,
    )
    log_probs = torch.randn(*streams.token.shape, VOCABULARY, dtype=torch.float64).log_softmax(-1)
    assert torch.allclose(low.mix_log_probs(log_probs, True), streams.mix_log_probs(log_probs, True), rtol=0, atol=1e-9)


def test_gradients_of_the_mixture() -> None:
    batch = [[1, 3], [2]]
    streams = build(batch)
    log_probs = torch.randn(*streams.token.shape, VOCABULARY, dtype=torch.float64).log_softmax(-1)

    def mix(log_score: Tensor, log_probs: Tensor) -> Tensor:
        scored = Streams(streams.residual, log_score, streams.token, streams.alive, streams.num_tokens)
        return scored.mix_log_probs(log_probs, True)

    inputs = (streams.log_score.clone().requires_grad_(), log_probs.requires_grad_())
    assert torch.autograd.gradcheck(mix, inputs)


def test_embeddings_become_one_stream_a_token() -> None:
    embeddings = torch.randn(2, 3, WIDTH)
    streams = Streams.from_embeddings(embeddings)
    assert streams.token.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert streams.alive.all()
    assert not streams.log_score.any()
    assert torch.equal(streams.residual, embeddings)


def test_fresh_tokens_merge_into_themselves() -> None:
    embeddings = torch.randn(2, 3, WIDTH)
    streams = Streams.from_embeddings(embeddings, torch.tensor([[True, True, True], [True, False, False]]))
    assert torch.equal(streams.merge_residuals(streams.shares()), streams.residual)
    assert torch.equal(streams.roots(), streams.residual)


def test_embeddings_of_padding_become_dead_slots() -> None:
    embeddings = torch.full((1, 3, WIDTH), torch.nan)
    embeddings[0, 0] = 1
    streams = Streams.from_embeddings(embeddings, torch.tensor([[True, False, False]]))
    assert streams.token.tolist() == [[0, 3, 3]]
    assert streams.residual[0].sum(1).tolist() == [WIDTH, 0, 0]


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_log_scores_are_float32_or_wider(dtype: torch.dtype, expected: torch.dtype) -> None:
    assert Streams.from_embeddings(torch.zeros(1, 2, WIDTH, dtype=dtype)).log_score.dtype == expected


# --- Columns ---

masks = st.integers(1, 7).flatmap(
    lambda length: st.lists(st.lists(st.sampled_from([0, 1]), min_size=length, max_size=length), min_size=1, max_size=4)
)


@given(masks)
def test_real_tokens_are_compacted_to_the_left_in_their_order(mask: list[list[int]]) -> None:
    columns = ColumnMap.from_mask(torch.tensor(mask))
    values = torch.arange(100, 100 + len(mask[0])).expand(len(mask), -1)
    compacted = columns.compact(values)
    for row, bits in enumerate(mask):
        real = [100 + column for column, bit in enumerate(bits) if bit]
        assert compacted[row, : len(real)].tolist() == real
        assert columns.alive[row].tolist() == [True] * len(real) + [False] * (len(bits) - len(real))


@given(masks)
def test_restoring_puts_real_tokens_back_into_their_columns(mask: list[list[int]]) -> None:
    columns = ColumnMap.from_mask(torch.tensor(mask))
    values = torch.randn(len(mask), len(mask[0]), WIDTH)
    restored = columns.restore(columns.compact(values))
    assert torch.equal(restored[columns.real], values[columns.real])
    assert columns.real.tolist() == [[bit == 1 for bit in bits] for bits in mask]


@given(masks)
def test_padding_columns_get_values_of_their_own_row(mask: list[list[int]]) -> None:
    columns = ColumnMap.from_mask(torch.tensor(mask))
    assert ((columns.ordinal >= 0) & (columns.ordinal < len(mask[0]))).all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_masks_of_any_type(dtype: torch.dtype) -> None:
    columns = ColumnMap.from_mask(torch.tensor([[0, 1, 0, 2]]).to(dtype))
    assert columns.column[0, :2].tolist() == [1, 3]
