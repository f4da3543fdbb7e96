"""How many streams each token carries through the layers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from thoughtbubbles.model.budget import Budget
from thoughtbubbles.model.modeling import ThoughtbubblesForCausalLM

if TYPE_CHECKING:
    from rich.text import Text

# Of the 256 colours that terminals share, for bubbles of 1, 2, ... streams: text and ground.
SHADES = (None, ("black", "color(195)"), ("black", "color(153)"), ("black", "color(117)"), ("white", "color(31)"))
LARGEST_SHADE = ("white", "color(18)")


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


def shade_bubbles(pieces: Sequence[str], sizes: Sequence[int]) -> "Text":
    """Text whose tokens stand on a ground that is darker the more streams they carry, and a legend below it."""
    from rich.text import Text

    text = Text()
    for piece, size in zip(pieces, sizes, strict=True):
        # A ground under a line break would colour the rest of the line.
        for part in piece.splitlines(keepends=True):
            line = part.rstrip("\r\n")
            text.append(line, style=_shade(size)).append(part[len(line) :])
    text.append("\n\nstreams of the token: ")
    for size in sorted(set(sizes)):
        text.append(f" {size} ", style=_shade(size))
    return text


def _shade(size: int) -> str:
    shade = SHADES[size - 1] if size <= len(SHADES) else LARGEST_SHADE
    return "" if shade is None else f"{shade[0]} on {shade[1]}"
