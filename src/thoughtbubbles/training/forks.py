"""What the gates do while a model trains: streams, bubbles and scores after each fork layer."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from thoughtbubbles.gate import ForkGate
from thoughtbubbles.streams import Streams

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
# torch.quantile takes no more numbers than this.
MOST_SCORES = 1 << 24


class ForkStatistics:
    """Watches the forward passes of an optimizer step.

    `summary` gives, for each fork layer L: `forks/L/streams_per_token`, the mean over real tokens;
    `forks/L/bubble_share`, the share of tokens with more than one stream; `forks/L/log_score_qXX`, quantiles of the
    survivors' log scores, roots included. On several processes, of the first one's share of the batch.
    """

    def __init__(self, model: nn.Module) -> None:
        self._gates = {name.rpartition(".")[2]: gate for name, gate in model.named_modules() if type(gate) is ForkGate}
        self._sizes: dict[str, list[Tensor]] = {}
        self._scores: dict[str, list[Tensor]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note what the gates do in the forward passes inside the block."""
        hooks = [gate.register_forward_hook(self._note_as(layer)) for layer, gate in self._gates.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def summary(self) -> dict[str, float]:
        """The figures of what was watched since the last summary."""
        found: dict[str, float] = {}
        for layer, sizes in self._sizes.items():
            size, scores = torch.cat(sizes), torch.cat(self._scores[layer])[:MOST_SCORES]
            found[f"forks/{layer}/streams_per_token"] = size.double().mean().item()
            found[f"forks/{layer}/bubble_share"] = (size > 1).double().mean().item()
            levels = torch.tensor(QUANTILES, dtype=scores.dtype, device=scores.device)
            for level, value in zip(QUANTILES, torch.quantile(scores, levels).tolist(), strict=True):
                found[f"forks/{layer}/log_score_q{round(100 * level):02}"] = value
        self._sizes, self._scores = {}, {}
        return found

    def gradient_norm(self) -> float:
        """Norm of the gradient of all gates' parameters."""
        gradients = [p.grad for gate in self._gates.values() for p in gate.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return float(whole)

    def __bool__(self) -> bool:
        return bool(self._gates)

    def _note_as(self, layer: str) -> Any:
        def note(_module: nn.Module, _arguments: Any, streams: Streams) -> None:
            sizes = streams.bubble_sizes()
            self._sizes.setdefault(layer, []).append(sizes[sizes > 0].flatten())
            self._scores.setdefault(layer, []).append(streams.log_score.detach()[streams.alive])

        return note
