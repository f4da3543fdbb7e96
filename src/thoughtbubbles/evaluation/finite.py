"""Numbers that are not finite end an evaluation: no score would mean anything."""

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from thoughtbubbles.support.errors import InputError


def check_finite(values: Tensor, what: str) -> None:
    """Make sure that a model gave numbers.

    Args:
        values: of any shape.
        what: names them in the message.

    Raises:
        InputError: some are nan or infinite.
    """
    if (wrong := int((~values.isfinite()).sum())) > 0:
        raise InputError(
            f"{what}: {wrong:,} of {values.numel():,} numbers of the model are not finite, so that no score would mean "
            "anything: expected finite weights, and a precision that holds what they give"
        )


class FiniteLogits(LogitsProcessor):
    """Ends a generation whose logits are not finite, of which greedy decoding would take the first token."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """The logits [B, V] as they are.

        Raises:
            InputError: for nan or inf; -inf is how tokens are forbidden.
        """
        check_finite(scores.masked_fill(scores == -torch.inf, 0), "generation")
        return scores


def finite_logits() -> LogitsProcessorList:
    """What to pass to `generate` as `logits_processor`."""
    return LogitsProcessorList([FiniteLogits()])
