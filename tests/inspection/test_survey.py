"""Statistics over blocks, against sums made by hand, and the curves and words that they are made of."""

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers import random_ids, tiny_model
from tests.inspection.test_trace import Letters
from thoughtbubbles import ThoughtbubblesForCausalLM, trace_bubbles
from thoughtbubbles.inspection.ablation import ablate
from thoughtbubbles.inspection.survey import LAGS, CorpusStatistics, gather_statistics
from thoughtbubbles.inspection.trace import predictions
from thoughtbubbles.inspection.words import FIRST, LATER, OTHER, count_words, split_words
from thoughtbubbles.support.statistics import banded_means, means_at, means_by_name, windows


class Words:
    """A tokenizer of a few pieces of words."""

    pieces = ("<s>", " the", " for", "king", ",", " a")

    def encode(self, text: str, **_: bool) -> list[int]:
        return []

    def decode(self, ids: list[int], **_: bool) -> str:
        return "".join(self.pieces[token % 6] for token in ids)


def gather(model: ThoughtbubblesForCausalLM, blocks: Tensor, **arguments: Any) -> CorpusStatistics:
    return gather_statistics(model, Words(), blocks, **arguments)


@pytest.fixture(scope="module")
def blocks() -> Tensor:
    return random_ids(5, 24)


def test_means_are_those_of_all_tokens_and_bands_hold_them() -> None:
    curve = banded_means([0, 1, 2], [[2, 0, 0], [10, 6, 0], [6, 2, 0]], [[2, 0, 0], [4, 3, 0], [2, 1, 0]])
    assert (curve.x, curve.mean, curve.count) == ([0, 1], [18 / 8, 2.0], [8, 4])
    assert 1 <= curve.low[0] < 18 / 8 < curve.high[0] <= 3
    assert curve.low[1] == curve.high[1] == 2


def test_bands_cover_the_truth_as_often_as_they_say() -> None:
    """Blocks whose tokens go together: bands over tokens would be far too narrow."""
    random, covered = np.random.default_rng(1), 0
    for _ in range(200):
        sums = 16 * random.normal(3, 1, size=(40, 1))
        curve = banded_means([0], sums, np.full((40, 1), 16))
        covered += curve.low[0] <= 3 <= curve.high[0]
    assert 180 <= covered <= 198


def test_one_block_has_no_band() -> None:
    curve = banded_means([0], [[3.0]], [[2]])
    assert (curve.mean, curve.low, curve.high) == ([1.5], [None], [None])


def test_a_place_between_two_bins_is_of_the_upper() -> None:
    curve = means_at(np.arange(5.0)[None], np.arange(5.0)[None], 4)
    assert (curve.x, curve.count) == ([0, 1, 2, 3.5], [1, 1, 1, 2])


def test_bins_hold_equally_many_tokens_and_skip_what_is_not_known() -> None:
    x = np.array([[0.0, 1, 2, 3], [4, 5, np.nan, 7]])
    y = np.array([[1.0, 1, 2, 2], [3, 3, 100, np.nan]])
    curve = means_at(x, y, 3)
    assert curve.x == [0.5, 2.5, 4.5]
    assert (curve.mean, curve.count) == ([1, 2, 3], [2, 2, 2])
    assert means_at(np.full((1, 2), np.nan), np.ones((1, 2)), 3).x == []
    assert means_at(np.ones((2, 2)), np.array([[1.0, 2], [3, 4]]), 3).mean == [2.5]


def test_names_and_windows() -> None:
    curve = means_by_name(np.array([["a", "b"], ["a", "a"]]), np.array([[1.0, 5], [2, 3]]), ("b", "a", "c"))
    assert (curve.x, curve.mean, curve.count) == (["b", "a"], [5, 2], [1, 3])
    assert windows(np.arange(10.0)[None], 4).tolist() == [[1.5, 5.5]]


@pytest.mark.parametrize(
    ("pieces", "kinds", "words"),
    [
        ([" for", "king", ","], [FIRST, LATER, OTHER], ["forking", "forking", ""]),
        (["The", " old", "\n", "man"], [FIRST, FIRST, OTHER, FIRST], ["the", "old", "", "man"]),
        ([" na", "\ufffd", "\ufffd", "ve"], [FIRST, LATER, LATER, LATER], ["na\ufffd\ufffdve"] * 4),
        ([" don", "'t", " 42", "nd"], [FIRST, FIRST, FIRST, LATER], ["don", "'t", "42nd", "42nd"]),
        ([], [], []),
    ],
)
def test_pieces_make_words(pieces: list[str], kinds: list[str], words: list[str]) -> None:
    assert split_words(pieces) == (kinds, words)


def test_words_are_counted_once_each_time() -> None:
    assert count_words(Words(), [[1, 2, 3, 4], [2, 3, 1, 2]]) == Counter({"the": 2, "forking": 2, "for": 1})


@pytest.mark.parametrize("rules", [{"routing": "causal"}, {"routing": "topk", "budget": "5/3"}])
def test_statistics_are_sums_over_traces(blocks: Tensor, rules: dict[str, Any]) -> None:
    model = tiny_model(**rules)
    found = gather(model, blocks, ablations=100)
    traces = [trace_bubbles(model, Letters(), ids) for ids in blocks]
    sizes = np.stack([trace.bubble_sizes() for trace in traces])  # [blocks, L, T]
    bubble = sizes[:, 1:].mean(1)
    assert (found.blocks, found.tokens, found.budget) == (5, 120, traces[0].budget)
    assert found.loss == pytest.approx(np.mean([trace.surprisal for trace in traces]))
    assert found.streams_by_layer.mean == pytest.approx(sizes.mean((0, 2)))
    assert found.size_by_position.mean[0] == pytest.approx(bubble[:, 0].mean())
    entropy = np.array([trace.entropy for trace in traces])
    lowest = entropy <= np.quantile(entropy, 0.1)
    by_entropy = found.size_by_entropy["model"]
    assert by_entropy.mean[0] == pytest.approx(bubble[lowest].mean())
    assert sum(by_entropy.count) == 120
    assert np.average(by_entropy.mean, weights=by_entropy.count) == pytest.approx(bubble.mean())
    assert sum(found.size_by_entropy["model, windows of 4"].count) == 30
    assert sum(found.size_by_surprisal["model"].count) == 115
    changes = [
        ablate(model, trace.ids, [t for t in range(23) if size[:, t].max() > 1])
        for trace, size in zip(traces, sizes, strict=True)
    ]
    for lag in (0, 1, LAGS - 1):
        values = [value for each in changes for value in each.at_lag(lag)]
        assert found.ablation.mean[lag] == pytest.approx(np.mean(values), abs=1e-6)
        assert found.ablation.count[lag] == len(values)


def test_attention_is_of_roots_with_forks(blocks: Tensor) -> None:
    model = tiny_model(budget=2.5)
    found = gather(model, blocks)
    shares: dict[str, list[float]] = {"self": [], "forks": [], "siblings": [], "others": []}
    per_stream: dict[str, int] = dict.fromkeys(shares, 0)
    for ids in blocks:
        table = trace_bubbles(model, Letters(), ids).streams
        here = np.flatnonzero((table.layer == 3) & table.survives)
        for row in here[table.is_root[here]]:
            bubble = here[table.token[here] == table.token[row]]
            if len(bubble) > 1:
                own = int((table.source[bubble] == table.stream[row]).sum())
                counts = (1, own, len(bubble) - 1 - own, int((table.token[here] < table.token[row]).sum()))
                for (kind, values), count in zip(shares.items(), counts, strict=True):
                    values.append(float(getattr(table, f"to_{kind}")[row]))
                    per_stream[kind] += count
    for kind, values in shares.items():
        place = found.attention[kind].x.index(3)
        assert found.attention[kind].mean[place] == pytest.approx(np.mean(values))
        place = found.attention_per_stream[kind].x.index(3)
        assert found.attention_per_stream[kind].mean[place] == pytest.approx(sum(values) / per_stream[kind])
    assert 0 not in found.attention["self"].x


def test_words_have_their_frequency(blocks: Tensor) -> None:
    model = tiny_model(budget=2.5)
    found = gather(model, blocks, word_counts={"the": 989, "a": 10})
    occurrences = found.size_by_word_frequency.x
    assert min(occurrences) == pytest.approx(1e6 / 1000)
    assert max(occurrences) <= 990e3
    assert found.size_by_piece.x == [FIRST, LATER, OTHER]
    assert sum(found.size_by_piece.count) == 120
    own = gather(model, blocks)
    assert own.size_by_word_frequency.x != occurrences


def test_a_reference_model_measures_too(blocks: Tensor) -> None:
    model, dense = tiny_model(), tiny_model(seed=3, routing="none")
    found = gather(model, blocks, reference=dense)
    entropy, surprisal = predictions(dense(blocks).logits, blocks)
    assert found.reference_loss == pytest.approx(surprisal.mean().item(), abs=1e-5)
    by_reference = found.size_by_entropy["reference"]
    mean: float = np.average(by_reference.x, weights=by_reference.count)
    assert mean == pytest.approx(entropy.mean().item(), abs=1e-5)
    assert found.size_by_entropy["model"] == gather(model, blocks).size_by_entropy["model"]


@pytest.mark.parametrize(("routing", "size"), [("none", 1), ("copy", 2), ("pause", 2)])
def test_models_without_gates(blocks: Tensor, routing: str, size: int) -> None:
    found = gather(tiny_model(routing=routing, budget=2), blocks)
    assert found.ablation is None
    assert set(found.size_by_entropy["model"].mean) == {size}
    assert (found.attention["self"].x == []) == (routing == "none")


def test_statistics_are_json_and_repeat(blocks: Tensor) -> None:
    model = tiny_model()
    found = json.dumps(gather(model, blocks).to_dict(), allow_nan=False)
    assert found == json.dumps(gather(model, blocks).to_dict())
    json.dumps(gather(model, blocks[:1]).to_dict(), allow_nan=False)


def test_progress_counts_tokens(blocks: Tensor) -> None:
    seen: list[int] = []
    gather(tiny_model(), blocks, on_progress=seen.append)
    assert seen == [24] * 5


@pytest.mark.parametrize("shape", [(0, 8), (2, 4), (8,)])
def test_too_little_text(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected at least one of at least 5 tokens"):
        gather(tiny_model(), torch.zeros(shape, dtype=torch.int64))
