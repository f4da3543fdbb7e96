"""What the gates of a model do while it trains."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from thoughtbubbles.model.gate import ForkGate
from thoughtbubbles.model.streams import Streams
from thoughtbubbles.training.sharding import whole

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
# torch.quantile takes no more numbers than this.
MOST_SCORES = 1 << 24


class ForkStatistics:
    """Watches the forward passes of an optimizer step.

    `summary` gives, for each fork layer L: `forks/L/streams_per_token`, the mean over real tokens;
    `forks/L/bubble_share`, the share of tokens with more than one stream; `forks/L/log_score_qXX`, quantiles of the
    survivors' log scores, roots included; and `gate_grad_norm`, of the gradient of all gates' parameters. On several
    processes, figures of forks are of the first one's share of the batch.
    """

    def __init__(self, model: nn.Module) -> None:
        self._gates = {name.rpartition(".")[2]: gate for name, gate in model.named_modules() if type(gate) is ForkGate}
        # They stay: a compiled graph would not notice hooks that come later.
        self._taps = {layer: _Tap(gate) for layer, gate in self._gates.items()}
        self._sizes: dict[str, list[Tensor]] = {}
        self._scores: dict[str, list[Tensor]] = {}

    def watch(self) -> None:
        """Note what the gates did in the last forward pass."""
        for layer, tap in self._taps.items():
            assert tap.streams is not None
            sizes = tap.streams.bubble_sizes()
            self._sizes.setdefault(layer, []).append(sizes[sizes > 0])
            self._scores.setdefault(layer, []).append(tap.streams.log_score[tap.streams.alive])

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
        gradients = [p.grad for gate in self._gates.values() for p in gate.parameters() if p.grad is not None]
        return {**found, "gate_grad_norm": float(whole(nn.utils.get_total_norm(gradients)))} if self._gates else {}


class _Tap:
    """The streams that left a gate last, without their residuals."""

    def __init__(self, gate: ForkGate) -> None:
        self.streams: Streams | None = None
        gate.register_forward_hook(self._note)

    def _note(self, _gate: nn.Module, _arguments: Any, streams: Streams) -> None:
        nothing = streams.log_score.new_zeros(*streams.token.shape, 0)
        self.streams = replace(streams, residual=nothing, log_score=streams.log_score.detach())
