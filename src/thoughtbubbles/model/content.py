"""What a fork brings along beside its embedding, where `fork_content` is `attended` (method: Gate).

Shape letters: B batch, N streams that enter a fork layer, D hidden size.
"""

from torch import Tensor, nn

from .attention import ResidualProjection, attenuated_attention, rotary_angles, rotate
from .cache import AttentionMemory
from .configuration import ThoughtbubblesConfig
from .rotary import Rotary
from .streams import Streams

FORK_CHANNELS = 64
"""Of the head, whatever those of the blocks have."""


class AttendedContent(nn.Module):
    """One head of attention over the streams that enter a fork layer, for the forks that survive there (method: Gate).

    Like the gate it belongs to the method and not to the block: a LayerNorm, no biases, and all channels turn, at the
    frequencies of the model.
    """

    def __init__(self, config: ThoughtbubblesConfig, layer: int) -> None:
        super().__init__()
        self.rule = config.attenuation
        # Before the first fork all scores are 0; the release gives up a channel there too.
        scored = {"paper": layer > config.gated_layers[0], "released": True, "none": False}
        self.is_scored = scored[config.attenuation]
        self.rotary = Rotary(config, FORK_CHANNELS)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=config.use_bias)
        # Not named as a block's, so that adapters of those leave these alone, which are new with their gate.
        self.qkv = nn.Linear(config.hidden_size, 3 * FORK_CHANNELS, bias=False)
        self.output = ResidualProjection(FORK_CHANNELS, config.hidden_size, bias=False)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def attend(self, streams: Streams, memory: AttentionMemory | None = None) -> Tensor:
        """What each stream that enters the layer sees at or left of it, as wide as a head.

        Args:
            streams: before routing.
            memory: of a cache, to which they are added and of which they see what it holds.

        Returns:
            [B, N, FORK_CHANNELS], in dead slots no matter what.
        """
        # Where the log score takes a channel that has turned, it shows where counting begins.
        angles = rotary_angles(streams.positions(origin=int(self.rule == "released")), self.rotary)
        q, k, v = self.qkv(self.norm(streams.residual))[:, None].chunk(3, dim=-1)
        placement = None if memory is None else memory.place(streams.ordinal, streams.alive)
        log_score = streams.log_score if self.is_scored else None
        q, k = rotate(q, *angles), rotate(k, *angles)
        return attenuated_attention(q, k, v, log_score, self.rule, memory, placement)[:, 0]

    def project(self, attended: Tensor) -> Tensor:
        """[..., FORK_CHANNELS] to what is added to residuals, [..., D]."""
        content: Tensor = self.dropout(self.output(attended))
        return content
