"""The gate before a fork layer: scores, survivors, fork embedding (method: Gate)."""

import math
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .budget import RowBudgets
from .cache import AttentionMemory
from .configuration import ThoughtbubblesConfig
from .content import AttendedContent
from .memory import RouteMemory
from .routing import Candidates
from .streams import Streams

MIN_LOG_SIGMOID = -20.0


class ForkGate(nn.Module):
    """Scores a fork and a keep of every stream and lets the router choose who goes on (method: Gate)."""

    def __init__(self, config: ThoughtbubblesConfig, layer: int = 0) -> None:
        super().__init__()
        self.config = config
        assert config.rule.router is not None
        self.router = config.rule.router(config, layer)
        self.histogram = self.router.histogram
        self.gate_scores = config.gate_scores
        if self.gate_scores != "fixed":
            self.norm = WideLayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=config.use_bias)
            self.projection = WideLinear(config.hidden_size, 2, bias=False)
        self.start = None if self.gate_scores == "fixed" else config.gate_start
        # Of one dimension, since FSDP shards none of none.
        self.fork_bias = None if self.start is None else nn.Parameter(torch.empty(1))
        self.is_relative = config.fork_embedding == "relative"
        self.is_normal = config.fork_embedding_init == "normal"
        self.fork_embedding = nn.Parameter(torch.empty(config.hidden_size))
        self.content = AttendedContent(config, layer) if config.fork_content == "attended" else None
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Draw the fork embedding, as the configuration says or half as large as the residual that it is added to.

        The bias of the fork begins where a stream that the projection says nothing of has the configured start.
        """
        if self.fork_bias is not None and self.start is not None:
            init.constant_(self.fork_bias, math.log(self.start) - math.log1p(-self.start))
        size = 1 / math.sqrt(self.fork_embedding.numel())
        if self.is_relative or self.is_normal:
            init.normal_(self.fork_embedding, std=0.5 if self.is_relative else size)
        else:
            init.uniform_(self.fork_embedding, b=size)

    def forward(
        self,
        streams: Streams,
        budget: Fraction | RowBudgets,
        memory: RouteMemory | None = None,
        step: Tensor | int = 0,
        attended: AttentionMemory | None = None,
    ) -> Streams:
        """The streams that enter the fork layer's block, at most N' of them a row (method: State).

        With the memory of a cache the causal rule goes on from what it holds, in place of topk too (method: Cache), the
        new candidates are added to it, and it says the width. `step` as in `draw_scores`, `attended` the memory of
        `AttendedContent`.
        """
        scores = self.candidate_scores(streams)
        token = streams.ordinal.repeat_interleave(2, dim=1)
        alive = streams.alive.repeat_interleave(2, dim=1)
        optional = torch.stack([streams.alive, streams.alive & ~streams.is_root], dim=2).flatten(1)
        rivals = self.router.rivals(scores, token, step)
        survive = self._route(Candidates(rivals, token, optional, alive, budget, streams.num_tokens == 1), memory)
        if memory is None:
            width = self.config.rule.width_after(streams.token.shape[1], streams.num_tokens, budget)
        else:
            width = memory.width(survive)
        origin, alive = pack_left(survive, width)
        return self.select(streams, scores, origin, alive, attended)

    def _route(self, candidates: Candidates, memory: RouteMemory | None) -> Tensor:
        """[B, 2N] bool: which of the candidates survive."""
        survive = self.router.whole(candidates) if memory is None else self.router.further(candidates, memory)
        if self.training:
            self.router.observe(candidates)
        return survive

    def candidate_scores(self, streams: Streams) -> Tensor:
        """[B, 2N] log scores of the candidates, (fork, keep) where each stream stood."""
        if self.gate_scores == "fixed":
            return streams.log_score.repeat_interleave(2, dim=1) - math.log(2)
        with torch.autocast(streams.residual.device.type, enabled=False):
            logits = self.projection(self.norm(streams.residual))
            if self.fork_bias is not None:
                logits = logits + F.pad(self.fork_bias.to(logits.dtype), (0, 1))
            gates = F.logsigmoid(logits).clamp(min=MIN_LOG_SIGMOID)
        if self.gate_scores == "forks":
            fork, keep = gates.unbind(-1)
            gates = torch.stack([fork, keep.masked_fill(streams.is_root, 0)], dim=-1)
        return (streams.log_score[..., None] + gates).flatten(1)

    def select(
        self,
        streams: Streams,
        scores: Tensor,
        origin: Tensor,
        alive: Tensor,
        attended: AttentionMemory | None = None,
    ) -> Streams:
        """The streams that the candidates `origin` [B, N'] become; slots not alive are emptied."""
        source = origin // 2
        rows = torch.arange(len(source), device=source.device)[:, None] * streams.token.shape[1]
        places = source + rows
        residual = _take(streams.residual, places)
        added = self.fork_embedding * (root_mean_square(residual) if self.is_relative else 1)
        if self.content is not None:
            added = added + self.content.project(_take(self.content.attend(streams, attended), places))
        is_fork = (origin % 2 == 0)[..., None]
        residual = residual + is_fork.to(residual.dtype) * added.to(residual.dtype)
        return Streams(
            residual=torch.where(alive[..., None], residual, 0),
            log_score=torch.where(alive, scores.gather(1, origin), 0),
            token=torch.where(alive, streams.token.gather(1, source), streams.num_tokens),
            alive=alive,
            num_tokens=streams.num_tokens,
            origin=torch.where(alive, origin, -1),
            offset=streams.offset,
        )


def _take(values: Tensor, places: Tensor) -> Tensor:
    """Of values [B, N, C] those at `places` [B, N'], counted through all rows: [B, N', C]."""
    return values.flatten(0, 1).index_select(0, places.flatten()).view(*places.shape, -1)


def pack_left(survive: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """[B, width] indices of each row's survivors, in order and packed left, 0 past them; and which are real."""
    batch, candidates = survive.shape
    place = torch.where(survive, survive.cumsum(1) - 1, width)
    index = torch.zeros(batch, width + 1, dtype=torch.int64, device=survive.device)
    index.scatter_(1, place, torch.arange(candidates, device=survive.device).expand(batch, -1))
    alive = torch.arange(width, device=survive.device) < survive.sum(1, keepdim=True)
    return torch.where(alive, index[:, :width], 0), alive


class WideLayerNorm(nn.LayerNorm):
    """LayerNorm in float32 or wider, whatever the type of input and weights."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the parent's name)
        """[..., D] -> [..., D]."""
        wide = torch.promote_types(input.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(wide)
        return F.layer_norm(input.to(wide), self.normalized_shape, self.weight.to(wide), bias, self.eps)


class WideLinear(nn.Linear):
    """Linear map to few outputs in float32 or wider; a module, so that adapters can wrap it.

    Sums over the last dimension, since the kernels of a product of matrices add up one row otherwise than the same row
    among others, which could tell equal streams apart.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the parent's name)
        """[..., D] -> [..., 2]."""
        return torch.stack([(input * row).sum(-1) for row in self.weight.to(input.dtype)], dim=-1)


def root_mean_square(x: Tensor) -> Tensor:
    """[..., D] -> [..., 1]."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # At a mean square of 0, that of an empty slot, the root has no gradient.
    return wide.square().mean(-1, keepdim=True).clamp(min=1e-12).sqrt()
