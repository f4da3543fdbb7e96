import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from thoughtbubbles import ThoughtbubblesConfig, ThoughtbubblesForCausalLM
from thoughtbubbles.evaluation.perplexity import evaluate_perplexity


def model(routing: str, budget: float = 1.5) -> ThoughtbubblesForCausalLM:
    torch.manual_seed(0)
    made = ThoughtbubblesForCausalLM(
        ThoughtbubblesConfig(
            vocab_size=23,
            hidden_size=16,
            num_hidden_layers=4,
            num_attention_heads=2,
            fork_layers=[1, 2],
            routing=routing,
            budget=budget,
            initializer_range=0.3,
        )
    )
    made.eval()
    return made


@pytest.fixture
def blocks() -> Tensor:
    return torch.randint(23, (5, 11), generator=torch.Generator().manual_seed(1))


def test_blockwise_is_the_mean_cross_entropy(blocks: Tensor) -> None:
    made = model("causal")
    result = evaluate_perplexity(made, blocks, batch_size=2)
    logits = made(blocks).logits[:, :-1]
    losses = F.cross_entropy(logits.transpose(1, 2), blocks[:, 1:], reduction="none")
    assert result.loss == pytest.approx(losses.mean().item(), abs=1e-6)
    assert result.perplexity == pytest.approx(math.exp(losses.mean().item()), rel=1e-5)
    assert result.standard_error == pytest.approx(losses.mean(1).std().item() / math.sqrt(5), rel=1e-4)
    assert (result.tokens, result.blocks, result.leaks) == (50, 5, False)


@pytest.mark.parametrize("routing", ["causal", "none", "random", "uniform"])
def test_both_modes_agree_left_to_right(blocks: Tensor, routing: str) -> None:
    made = model(routing)
    blockwise = evaluate_perplexity(made, blocks)
    assert evaluate_perplexity(made, blocks, "prefix").loss == pytest.approx(blockwise.loss, abs=1e-5)


def test_topk_leaks_and_says_so(blocks: Tensor) -> None:
    made = model("topk")
    blockwise, prefix = evaluate_perplexity(made, blocks), evaluate_perplexity(made, blocks, "prefix")
    assert (blockwise.leaks, prefix.leaks) == (True, False)
    assert abs(blockwise.loss - prefix.loss) > 1e-3


@pytest.mark.parametrize(("rule", "budget_at"), [("proportional", lambda end: 1.5), ("fixed", lambda end: 16.5 / end)])
def test_prefix_mode_sees_prefixes_alone(blocks: Tensor, rule: str, budget_at) -> None:
    made = model("topk")
    losses = [
        F.cross_entropy(made(blocks[:, :end], budget=budget_at(end)).logits[:, -1], blocks[:, end])
        for end in range(1, 11)
    ]
    result = evaluate_perplexity(made, blocks, "prefix", budget_rule=rule)
    assert result.loss == pytest.approx(torch.stack(losses).mean().item(), abs=1e-5)


def test_copies_are_as_many_whatever_the_rule(blocks: Tensor) -> None:
    made = model("copy", budget=2)
    fixed = evaluate_perplexity(made, blocks, "prefix", budget_rule="fixed")
    assert fixed.loss == pytest.approx(evaluate_perplexity(made, blocks).loss, abs=1e-5)


def test_budget_overrides_the_configured_one(blocks: Tensor) -> None:
    made = model("causal", budget=2.0)
    result = evaluate_perplexity(made, blocks, budget="5/4")
    assert result.budget == "5/4"
    assert result.loss == pytest.approx(evaluate_perplexity(model("causal", budget=1.25), blocks).loss, abs=1e-7)
    assert result.loss != evaluate_perplexity(made, blocks).loss


def test_batch_size_does_not_change_the_loss(blocks: Tensor) -> None:
    made = model("causal")
    losses = [evaluate_perplexity(made, blocks, batch_size=size).loss for size in (1, 2, 5)]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-6)


def test_dropout_is_off_and_training_mode_comes_back(blocks: Tensor) -> None:
    made = model("causal").train()
    made.model.dropout.p = 0.9
    first = evaluate_perplexity(made, blocks).loss
    assert made.training
    assert evaluate_perplexity(made, blocks).loss == first


@pytest.mark.parametrize(("mode", "calls"), [("blockwise", [40, 10]), ("prefix", [4] * 10 + [1] * 10)])
def test_progress_counts_predicted_tokens(blocks: Tensor, mode: str, calls: list[int]) -> None:
    seen: list[int] = []
    evaluate_perplexity(model("causal"), blocks, mode, batch_size=4, on_progress=seen.append)
    assert seen == calls


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "sideways"}, "mode='sideways': expected one of blockwise, prefix"),
        ({"budget_rule": "none"}, "budget_rule='none': expected one of proportional, fixed"),
        ({"budget": 0.5}, "budget=0.5: expected"),
        ({"blocks": torch.zeros(0, 4, dtype=torch.int64)}, r"blocks of shape \(0, 4\): expected at least one block"),
        ({"blocks": torch.zeros(2, 1, dtype=torch.int64)}, "at least two tokens"),
    ],
)
def test_bad_arguments(blocks: Tensor, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_perplexity(model("causal"), **{"blocks": blocks, **arguments})
