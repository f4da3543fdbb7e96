"""Perplexity over blocks of tokens, blockwise and from prefixes alone (Design 5.2)."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor

from thoughtbubbles.budget import Budget
from thoughtbubbles.modeling import ThoughtbubblesForCausalLM

MODES = ("blockwise", "prefix")
BUDGET_RULES = ("proportional", "fixed")


@dataclass(frozen=True)
class Perplexity:
    """The loss of a model over blocks.

    Attributes:
        mode: `blockwise` (one forward over the block) or `prefix` (each prediction from its prefix alone).
        loss: mean in nats per predicted token.
        standard_error: of the loss, over blocks; nan for a single block.
        perplexity: exp of the loss.
        tokens: predicted.
        blocks: evaluated.
        budget: streams per token, as text.
        budget_rule: in prefix mode, `proportional` (kappa t streams for a prefix of t tokens) or `fixed` (kappa T).
        leaks: whether the predictions saw later tokens, so that the loss is not the likelihood of a left-to-right
            model: blockwise with routing `topk`.
    """

    mode: str
    loss: float
    standard_error: float
    perplexity: float
    tokens: int
    blocks: int
    budget: str
    budget_rule: str | None
    leaks: bool


@torch.inference_mode()
def evaluate_perplexity(
    model: ThoughtbubblesForCausalLM,
    blocks: Tensor,
    mode: str = "blockwise",
    budget: Budget | None = None,
    budget_rule: str = "proportional",
    batch_size: int = 16,
    on_progress: Callable[[int], None] | None = None,
) -> Perplexity:
    """Loss of a model over `blocks` [n, T] int64; every token but a block's first is predicted.

    Prefix mode runs T - 1 forwards a block, about T / 2 times the work of blockwise.

    Args:
        budget: streams per token in place of the configured.
        budget_rule: in prefix mode, see `Perplexity`; `fixed` is the rule that the paper tries beside its own.
        on_progress: called with the number of tokens predicted since the last call.

    Raises:
        ValueError: for an unknown mode or rule, blocks of fewer than two tokens, or a bad budget.
    """
    check_options(mode, budget_rule)
    if blocks.dim() != 2 or blocks.shape[0] == 0 or blocks.shape[1] < 2:
        raise ValueError(f"blocks of shape {tuple(blocks.shape)}: expected at least one block of at least two tokens")
    kappa = model.config.exact_budget(budget)
    was_training = model.training
    model.eval()
    sums = []
    for batch in blocks.to(model.device).split(batch_size):
        parts = _blockwise(model, batch, kappa) if mode == "blockwise" else _prefix(model, batch, kappa, budget_rule)
        total = torch.zeros(len(batch), dtype=torch.float64, device=batch.device)
        for losses in parts:
            total += losses.double().sum(1)
            if on_progress is not None:
                on_progress(losses.numel())
        sums.append(total.cpu())
    model.train(was_training)
    per_block = torch.cat(sums) / (blocks.shape[1] - 1)
    loss = per_block.mean().item()
    return Perplexity(
        mode=mode,
        loss=loss,
        standard_error=per_block.std().item() / math.sqrt(len(per_block)) if len(per_block) > 1 else math.nan,
        perplexity=math.exp(loss),
        tokens=blocks.shape[0] * (blocks.shape[1] - 1),
        blocks=blocks.shape[0],
        budget=str(kappa),
        budget_rule=budget_rule if mode == "prefix" else None,
        leaks=mode == "blockwise" and model.config.routing == "topk",
    )


def check_options(mode: str, budget_rule: str) -> None:
    """Raise the ValueError of `evaluate_perplexity` for an unknown mode or rule."""
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: expected one of {', '.join(MODES)}")
    if budget_rule not in BUDGET_RULES:
        raise ValueError(f"budget_rule={budget_rule!r}: expected one of {', '.join(BUDGET_RULES)}")


def _blockwise(model: ThoughtbubblesForCausalLM, batch: Tensor, budget: Fraction) -> Iterator[Tensor]:
    """Losses [B, T - 1] from one forward."""
    logits = model(batch, budget=budget).logits[:, :-1]
    yield F.cross_entropy(logits.transpose(1, 2).float(), batch[:, 1:], reduction="none")


def _prefix(model: ThoughtbubblesForCausalLM, batch: Tensor, budget: Fraction, rule: str) -> Iterator[Tensor]:
    """Losses [B, 1] of one token after another, each from a forward over what stands before it."""
    length = batch.shape[1]
    layers = len(model.config.gated_layers)
    most = Fraction(2**layers)  # a bubble cannot grow larger, whatever the budget
    for end in range(1, length):
        # Where nothing is gated, every token has its streams, as many as the budget says, in whatever length.
        streams = budget if rule == "proportional" or not layers else min(budget * length / end, most)
        logits = model(batch[:, :end], budget=streams, logits_to_keep=1).logits[:, 0]
        yield F.cross_entropy(logits.float(), batch[:, end], reduction="none")[:, None]
