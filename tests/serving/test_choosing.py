"""How tokens are chosen: rules of one row, whatever the others are."""

from typing import Any

import pytest
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from thoughtbubbles.serving.choosing import (
    LEAST_LOGPROB,
    Choosing,
    NotFiniteError,
    TokenChooser,
    TokenScore,
    _keep_likeliest,
    _keep_mass,
    score_tokens,
)

GREEDY = Choosing(temperature=0)


def chosen(logits: torch.Tensor, *rules: Choosing) -> list[int]:
    """The tokens that rules choose by logits [R, V]."""
    chooser = TokenChooser(len(rules))
    for slot, rule in enumerate(rules):
        chooser.begin(slot, rule)
    return [score.token for score in chooser.choose(logits, range(len(rules)))]


def test_greedy_takes_the_likeliest_with_bias() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0]] * 3)
    rules = GREEDY, Choosing(temperature=0, bias={2: 1.5}), Choosing(temperature=1e-9, bias={1: -100, 2: -100})
    assert chosen(logits, *rules) == [1, 2, 0]


def test_penalties_count_the_tokens_of_the_answer() -> None:
    chooser = TokenChooser(2)
    chooser.begin(0, Choosing(temperature=0, frequency_penalty=0.4))
    chooser.begin(1, Choosing(temperature=0, presence_penalty=1.1))
    logits = torch.tensor([[0.0, 1.0]] * 2)
    steps = [[score.token for score in chooser.choose(logits, [0, 1])] for _ in range(5)]
    assert [first for first, _ in steps] == [1, 1, 1, 0, 1]
    assert [second for _, second in steps] == [1, 0, 1, 1, 1]
    chooser.begin(0, Choosing(temperature=0, frequency_penalty=0.4))
    assert chooser.choose(logits[:1], [0])[0].token == 1


def test_likeliest_and_mass_are_those_of_transformers() -> None:
    logits = torch.randn(4, 50, dtype=torch.float64)
    counts, masses = [1, 7, 0, 60], [0.1, 0.5, 0.9, 1.0]
    kept = _keep_likeliest(logits, counts)
    shares = _keep_mass(logits.softmax(-1), masses)
    for row, (count, mass) in enumerate(zip(counts, masses, strict=True)):
        one = logits[row : row + 1]
        expected = TopKLogitsWarper(count)(None, one) if count else one
        assert torch.equal(kept[row], expected[0])
        assert torch.equal(
            shares[row] > 0, (TopPLogitsWarper(mass)(None, one)[0] > -torch.inf) if mass < 1 else one[0] < 99
        )
    assert int((_keep_mass(logits.softmax(-1), [0.0] * 4) > 0).sum()) == 4


@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0])
def test_mass_of_a_large_vocabulary_is_that_of_transformers(spread: float) -> None:
    logits = spread * torch.randn(3, 5000, dtype=torch.float64)
    shares = _keep_mass(logits.softmax(-1), [0.3, 0.9, 0.99])
    for row, mass in enumerate([0.3, 0.9, 0.99]):
        expected = TopPLogitsWarper(mass)(None, logits[row : row + 1])[0] > -torch.inf
        assert torch.equal(shares[row] > 0, expected)


def test_a_choice_is_read_back_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = [GREEDY, Choosing(seed=1, top_k=3), Choosing(bias={1: 2.0}, presence_penalty=1.0, alternatives=2)]
    chooser = TokenChooser(3)
    for slot, rule in enumerate(rules):
        chooser.begin(slot, rule)
    logits, read = torch.randn(3, 20), []
    for name in ("tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__"):
        real = getattr(torch.Tensor, name)

        def counted(tensor: torch.Tensor, *rest: object, real: Any = real, name: str = name) -> object:
            read.append(name)
            return real(tensor, *rest)

        monkeypatch.setattr(torch.Tensor, name, counted)
    for step in range(1, 4):
        chooser.choose(logits, [0, 1, 2])
        assert read == ["tolist"] * step


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -50.0]], dtype=torch.float64)
    chooser = TokenChooser(1)
    chooser.begin(0, Choosing(temperature=2.0, seed=5))
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[chooser.choose(logits, [0])[0].token] += 1
    torch.testing.assert_close(counts / 4000, (logits[0] / 2).softmax(-1).float(), atol=0.025, rtol=0)


def test_a_row_draws_alike_wherever_and_beside_whatever_it_stands() -> None:
    logits = torch.randn(6, 1, 40)
    rule = Choosing(temperature=1.3, top_p=0.9, seed=11)
    others = Choosing(temperature=0.7, top_k=3, seed=11, number=1), Choosing(bias={3: 9.0}, alternatives=4), GREEDY

    def drawn(slot: int, *rules: Choosing) -> list[int]:
        chooser = TokenChooser(len(rules))
        for place, each in enumerate(rules):
            chooser.begin(place, each)
        steps = [chooser.choose(row.expand(len(rules), -1), range(len(rules))) for row in logits]
        return [step[slot].token for step in steps]

    alone = drawn(0, rule)
    assert alone == drawn(2, *others[:2], rule, others[2]) == drawn(0, rule, *others)
    assert alone != drawn(0, Choosing(temperature=1.3, top_p=0.9, seed=12))
    assert alone != drawn(0, Choosing(temperature=1.3, top_p=0.9, seed=11, number=1))


def test_scores_are_the_models_own_whatever_the_rule() -> None:
    logits = torch.randn(2, 30, dtype=torch.float64)
    expected = logits.log_softmax(-1)
    chooser = TokenChooser(2)
    chooser.begin(0, Choosing(temperature=0, bias={4: 50.0}, alternatives=3))
    chooser.begin(1, Choosing(temperature=0))
    first, second = chooser.choose(logits, [0, 1])
    top = expected[0].topk(3)
    assert first == TokenScore(
        4, float(expected[0, 4]), tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    )
    assert second == TokenScore(int(logits[1].argmax()))
    scores = score_tokens(logits, [7, 8], 2)
    assert [score.logprob for score in scores] == [float(expected[0, 7]), float(expected[1, 8])]
    assert [len(score.top) for score in scores] == [2, 2]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_fails_alone(bad: float) -> None:
    logits = torch.zeros(2, 4)
    logits[0, 1] = bad
    chooser = TokenChooser(2)
    chooser.begin(1, GREEDY)
    first, second = chooser.choose(logits, [0, 1])
    assert isinstance(first, NotFiniteError)
    assert second == TokenScore(0)


def test_a_token_that_cannot_come_has_a_number() -> None:
    logits = torch.tensor([[0.0, -torch.inf]])
    assert score_tokens(logits, [1], 2)[0] == TokenScore(1, LEAST_LOGPROB, ((0, 0.0), (1, LEAST_LOGPROB)))
