import json
import math
import statistics
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers import random_model, tiny_config
from thoughtbubbles import ThoughtbubblesConfig, ThoughtbubblesForCausalLM
from thoughtbubbles.cli.evaluation import describe_perplexity
from thoughtbubbles.data import PreparedData
from thoughtbubbles.evaluation.perplexity import TextSize, evaluate_perplexity, read_blocks, token_losses
from thoughtbubbles.support.errors import InputError


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


def test_the_error_is_that_of_a_sample_of_blocks(blocks: Tensor) -> None:
    per_block = token_losses(model("causal"), blocks).double().mean(1).tolist()
    expected = statistics.stdev(per_block) / math.sqrt(5)
    assert evaluate_perplexity(model("causal"), blocks).standard_error == pytest.approx(expected, rel=1e-9)


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


def test_figures_per_byte_and_word_are_of_the_predicted_text(tiny_data: PreparedData) -> None:
    made = random_model(tiny_config(vocab_size=tiny_data.manifest.vocab_size))
    rows = tiny_data.validation[:4]["input_ids"]
    size = TextSize.of(tiny_data.tokenizer(), rows)
    texts = [str(tiny_data.tokenizer().decode(row[1:], skip_special_tokens=True)) for row in rows]
    assert size == TextSize(sum(len(text) for text in texts), sum(len(text.split()) for text in texts))
    result = evaluate_perplexity(made, rows, size=size)
    nats = result.loss * result.tokens
    assert result.byte_perplexity == pytest.approx(math.exp(nats / size.bytes))
    assert result.word_perplexity == pytest.approx(math.exp(nats / size.words))
    bare = evaluate_perplexity(made, rows)
    assert (bare.byte_perplexity, bare.word_perplexity) == (None, None)


def test_bytes_are_those_of_utf_8(tiny_data: PreparedData) -> None:
    tokenizer = tiny_data.tokenizer()
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer.encode("zwölf €"), tokenizer.eos_token_id]])
    assert TextSize.of(tokenizer, ids) == TextSize(bytes=10, words=2)
    assert TextSize.of(tokenizer, ids[:, -2:]).words <= 1


def test_text_without_words_has_no_figure_per_word(tiny_data: PreparedData) -> None:
    made = random_model(tiny_config(vocab_size=tiny_data.manifest.vocab_size))
    result = evaluate_perplexity(made, tiny_data.validation[:1]["input_ids"], size=TextSize(3, 0))
    assert result.word_perplexity is None


def test_a_text_file_is_one_document_in_blocks(tmp_path: Path, tiny_data: PreparedData) -> None:
    tokenizer, path = tiny_data.tokenizer(), tmp_path / "text.txt"
    path.write_text("the gate of the root " * 20)
    ids = [tokenizer.eos_token_id, *tokenizer.encode(path.read_text())]
    blocks = read_blocks(path, tokenizer, 16)
    assert blocks.shape == (len(ids) // 16, 16)
    assert blocks.flatten().tolist() == ids[: blocks.numel()]
    assert read_blocks(path, tokenizer, 9999).tolist() == [ids]
    path.write_text("")
    with pytest.raises(InputError, match="expected some text"):
        read_blocks(path, tokenizer, 16)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"text.txt is not UTF-8"):
        read_blocks(path, tokenizer, 16)


def test_one_block_has_no_standard_error(blocks: Tensor) -> None:
    found = evaluate_perplexity(random_model(tiny_config(vocab_size=23)), blocks[:1])
    assert found.standard_error is None
    assert "NaN" not in json.dumps(asdict(found))
    line = describe_perplexity(found)
    assert "nan" not in line
    assert "+-" not in line
    assert f"loss {found.loss:.4f} nats per token" in line
