"""How many streams each token carries through the layers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from thoughtbubbles.budget import Budget
from thoughtbubbles.modeling import ThoughtbubblesForCausalLM


@torch.inference_mode()
def bubble_sizes(model: ThoughtbubblesForCausalLM, input_ids: Tensor, budget: Budget | None = None) -> Tensor:
    """Streams of each token in each block, [B, L, T] int64, for rows without padding, input_ids [B, T].

    Raises:
        ValueError: as `ThoughtbubblesModel.forward`.
    """
    was_training = model.training
    model.eval()
    out = model.model(input_ids.to(model.device), budget=budget, output_streams=True)
    model.train(was_training)
    return torch.stack([streams.bubble_sizes() for streams in out.streams[:-1]], dim=1)


def final_bubbles(model: ThoughtbubblesForCausalLM, ids: list[int], budget: Budget | None = None) -> list[int]:
    """Streams that each token of one row ends with, in its last block."""
    sizes: list[int] = bubble_sizes(model, torch.tensor([ids]), budget)[0, -1].tolist()
    return sizes


def mark_bubbles(pieces: Sequence[str], sizes: Sequence[int]) -> str:
    """Text in which each token that carries a bubble is followed by its streams, as in `word⟨3⟩`."""
    return "".join(piece if size == 1 else f"{piece}⟨{size}⟩" for piece, size in zip(pieces, sizes, strict=True))
