"""How many streams each token carries through the layers."""

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
