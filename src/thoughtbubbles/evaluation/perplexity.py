"""Perplexity over blocks of tokens, blockwise and from prefixes alone."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from thoughtbubbles.data.tokenizer import Encoder
from thoughtbubbles.evaluation.finite import check_finite
from thoughtbubbles.model.budget import Budget
from thoughtbubbles.model.modeling import ThoughtbubblesForCausalLM
from thoughtbubbles.support.errors import InputError
from thoughtbubbles.support.text import decode_after, start_document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

__all__ = ["TextSize", "evaluate_perplexity", "token_losses"]

MODES = ("blockwise", "prefix")
BUDGET_RULES = ("proportional", "fixed")
# Perplexities beyond are not numbers in double precision.
MOST_NATS = 700.0


@dataclass(frozen=True)
class Perplexity:
    """The loss of a model over blocks.

    Attributes:
        mode: `blockwise` (one forward over the block) or `prefix` (each prediction from its prefix alone).
        loss: mean in nats per predicted token.
        standard_error: of the loss, over blocks; None for a single block.
        perplexity: exp of the loss.
        tokens: predicted.
        blocks: evaluated.
        budget: streams per token, as text.
        budget_rule: in prefix mode, `proportional` (kappa t streams for a prefix of t tokens) or `fixed` (kappa T).
        byte_perplexity: exp of the nats per byte of the predicted text; None where the text is not known.
        word_perplexity: exp of the nats per word, a run of characters that are no white space; None likewise.
        leaks: whether the predictions saw later tokens, so that the loss is not the likelihood of a left-to-right
            model: blockwise with routing `topk`.
    """

    mode: str
    loss: float
    standard_error: float | None
    perplexity: float
    tokens: int
    blocks: int
    budget: str
    budget_rule: str | None
    byte_perplexity: float | None
    word_perplexity: float | None
    leaks: bool


@dataclass(frozen=True)
class TextSize:
    """How much text some blocks predict, so that models with different tokenizers can be compared.

    Attributes:
        bytes: in UTF-8, special tokens left out; a character that a block's border cuts counts as U+FFFD
            at a block's end.
        words: runs of characters that are no white space; one that a block's border cuts counts in both.
    """

    bytes: int
    words: int

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase", blocks: Tensor) -> "TextSize":
        """The text of every token but the first of blocks [n, T]."""
        texts = [decode_after(tokenizer, block, 1) for block in blocks.tolist()]
        return cls(sum(len(text.encode()) for text in texts), sum(len(text.split()) for text in texts))


def read_blocks(path: Path, tokenizer: "PreTrainedTokenizerFast", length: int, text_field: str = "text") -> Tensor:
    """A file's documents as blocks [n, length] of tokens, the same as `prepare` makes of it.

    Before each document stands what precedes a text. What is left after the last whole block is not used, unless the
    text is shorter than one: then it is the block.

    Args:
        path: as `read_texts` takes it.
        tokenizer: the model's.
        length: tokens a block.
        text_field: the field that holds the text, where the file has rows.

    Raises:
        InputError: a file that cannot be read, is not UTF-8, or has no text.
    """
    from thoughtbubbles.data.sources.reading import read_texts

    start, encoder = start_document(tokenizer), Encoder(tokenizer, threads=1)
    ids = [token for text in read_texts(path, text_field) for token in [*start, *encoder.encode_one(text).tolist()]]
    if len(ids) < 2:
        raise InputError(f"data {path}: expected some text")
    length = min(length, len(ids))
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def evaluate_perplexity(
    model: ThoughtbubblesForCausalLM,
    blocks: Tensor,
    mode: str = "blockwise",
    budget: Budget | None = None,
    budget_rule: str = "proportional",
    batch_size: int = 16,
    on_progress: Callable[[int], None] | None = None,
    size: TextSize | None = None,
) -> Perplexity:
    """Loss of a model over `blocks` [n, T] int64; every token but a block's first is predicted.

    Prefix mode runs T - 1 forwards a block, about T / 2 times the work of blockwise.

    Args:
        budget: streams per token in place of the configured.
        budget_rule: in prefix mode, see `Perplexity`; `fixed` is the rule that the paper tries beside its own.
        on_progress: called with the number of tokens predicted since the last call.
        size: of the text of these blocks, for the figures per byte and per word.

    Raises:
        ValueError: for an unknown mode or rule, blocks of fewer than two tokens, or a bad budget.
        InputError: for a model whose losses are not finite.
    """
    losses = token_losses(model, blocks, mode, budget, budget_rule, batch_size, on_progress=on_progress)
    per_block = losses.double().mean(1)
    loss = per_block.mean().item()
    tokens = blocks.shape[0] * (blocks.shape[1] - 1)
    return Perplexity(
        mode=mode,
        loss=loss,
        standard_error=per_block.std().item() / math.sqrt(len(per_block)) if len(per_block) > 1 else None,
        perplexity=math.exp(loss),
        tokens=tokens,
        blocks=blocks.shape[0],
        budget=str(model.config.exact_budget(budget)),
        budget_rule=budget_rule if mode == "prefix" else None,
        byte_perplexity=_per(loss * tokens, None if size is None else size.bytes),
        word_perplexity=_per(loss * tokens, None if size is None else size.words),
        leaks=mode == "blockwise" and model.config.leaks,
    )


@torch.inference_mode()
def token_losses(
    model: ThoughtbubblesForCausalLM,
    blocks: Tensor,
    mode: str = "blockwise",
    budget: Budget | None = None,
    budget_rule: str = "proportional",
    batch_size: int = 16,
    positions: Sequence[int] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Losses in nats of the predictions that `evaluate_perplexity` takes the mean of, [n, predicted] float32.

    Args:
        positions: tokens of a block to predict, from 1 to T - 1, in ascending order; None is all of them. Prefix mode
            takes a forward for each.

    Raises:
        ValueError: as `evaluate_perplexity`, and for positions that no block has.
        InputError: as `evaluate_perplexity`.
    """
    check_options(mode, budget_rule)
    if blocks.dim() != 2 or blocks.shape[0] == 0 or blocks.shape[1] < 2:
        raise ValueError(f"blocks of shape {tuple(blocks.shape)}: expected at least one block of at least two tokens")
    length = blocks.shape[1]
    places = list(range(1, length)) if positions is None else list(positions)
    if not places or not all(0 < place < length for place in places):
        raise ValueError(f"positions={places}: expected some from 1 to {length - 1}")
    kappa = model.config.exact_budget(budget)
    was_training = model.training
    model.eval()
    rows = []
    for batch in blocks.to(model.device).split(batch_size):
        parts = []
        for losses in _forwards(model, batch, mode, kappa, budget_rule, places):
            parts.append(losses.cpu())
            if on_progress is not None:
                on_progress(losses.numel())
        rows.append(torch.cat(parts, dim=1))
    model.train(was_training)
    losses = torch.cat(rows)
    check_finite(losses, f"{mode} losses")
    return losses


def _per(nats: float, units: int | None) -> float | None:
    """Perplexity of a unit of text; None where there are none."""
    return math.exp(min(nats / units, MOST_NATS)) if units else None


def check_options(mode: str, budget_rule: str) -> None:
    """Raise the ValueError of `evaluate_perplexity` for an unknown mode or rule."""
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: expected one of {', '.join(MODES)}")
    if budget_rule not in BUDGET_RULES:
        raise ValueError(f"budget_rule={budget_rule!r}: expected one of {', '.join(BUDGET_RULES)}")


def _forwards(
    model: ThoughtbubblesForCausalLM, batch: Tensor, mode: str, budget: Fraction, rule: str, positions: Sequence[int]
) -> Iterator[Tensor]:
    """Losses [B, p] of the tokens at `positions`, those of each forward."""
    if mode == "blockwise":
        before = torch.tensor(positions, device=batch.device) - 1
        yield model.token_losses(batch, before, budget=budget)
        return
    length = batch.shape[1]
    layers = len(model.config.gated_layers)
    most = Fraction(2**layers)  # a bubble cannot grow larger, whatever the budget
    for end in positions:
        # Where nothing is gated, every token has its streams, as many as the budget says, in whatever length.
        streams = budget if rule == "proportional" or not layers else min(budget * length / end, most)
        logits = model(batch[:, :end], budget=streams, logits_to_keep=1).logits[:, 0]
        yield F.cross_entropy(logits.float(), batch[:, end], reduction="none")[:, None]
