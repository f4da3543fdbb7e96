"""The Thoughtbubbles decoder as transformers models (Design 3, 5.1).

Shape letters: B batch, T tokens, N streams, D hidden size, V vocabulary.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.generic import ModelOutput, can_return_tuple

from thoughtbubbles.attention import ResidualProjection, StreamAttention, rotary_angles
from thoughtbubbles.budget import Budget
from thoughtbubbles.configuration import ThoughtbubblesConfig
from thoughtbubbles.gate import ForkGate
from thoughtbubbles.streams import ColumnMap, Streams

IGNORE_INDEX = -100


@dataclass
class ThoughtbubblesModelOutput(ModelOutput):
    """What `ThoughtbubblesModel` returns.

    Attributes:
        last_hidden_state: [B, T, D] merged and normed; with the merge `probability`, which has no such vector,
            the normed roots.
        hidden_states: if asked for, L + 1 tensors [B, T, D]: the roots entering each block and leaving the last.
        streams: if asked for, L + 1 `Streams`: entering each block, after its gate, and leaving the last.
        final_streams: the streams leaving the last block.
        columns: where the real tokens stand; None without an attention mask.
    """

    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    streams: tuple[Streams, ...] | None = None
    final_streams: Streams | None = None
    columns: ColumnMap | None = None


@dataclass
class ThoughtbubblesCausalLMOutput(ModelOutput):
    """What `ThoughtbubblesForCausalLM` returns.

    Attributes:
        loss: mean cross-entropy in nats over the labelled tokens, if labels were given.
        logits: [B, T, V], finite and meaningless at padding.
        hidden_states, streams: as in `ThoughtbubblesModelOutput`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    streams: tuple[Streams, ...] | None = None


class ThoughtbubblesMLP(nn.Module):
    """The position-wise MLP."""

    def __init__(self, config: ThoughtbubblesConfig) -> None:
        super().__init__()
        assert config.intermediate_size is not None
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.use_bias)
        self.act = ACT2FN[config.hidden_act]
        self.down_proj = ResidualProjection(config.intermediate_size, config.hidden_size, bias=config.use_bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        out: Tensor = self.down_proj(self.act(self.up_proj(x)))
        return out


class ThoughtbubblesBlock(GradientCheckpointingLayer):
    """Pre-norm attention and MLP, their updates scaled by each stream's p (Design 3.5)."""

    def __init__(self, config: ThoughtbubblesConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=config.use_bias)
        self.attention = StreamAttention(config)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=config.use_bias)
        self.mlp = ThoughtbubblesMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, log_score: Tensor | None, update_weight: Tensor | None
    ) -> Tensor:
        """x [B, N, D]; log_score [B, N] of the keys; update_weight [B, N] in both updates. None: 0 and 1."""
        weight = 1 if update_weight is None else update_weight[..., None].to(x.dtype)
        x = x + weight * self.dropout(self.attention(self.attention_norm(x), cos, sin, log_score))
        out: Tensor = x + weight * self.dropout(self.mlp(self.mlp_norm(x)))
        return out


class ThoughtbubblesPreTrainedModel(PreTrainedModel):
    """Initialisation of the weights, and what transformers needs to know."""

    config: ThoughtbubblesConfig
    config_class = ThoughtbubblesConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ThoughtbubblesBlock", "ForkGate"]
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ResidualProjection):
            std = self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers)
            init.normal_(module.weight, std=std)
        elif isinstance(module, ForkGate):
            init.uniform_(module.fork_embedding, b=1 / math.sqrt(self.config.hidden_size))


class ThoughtbubblesModel(ThoughtbubblesPreTrainedModel):
    """Embedding, gates and blocks, merge and final norm: token ids to hidden states."""

    def __init__(self, config: ThoughtbubblesConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.gates = nn.ModuleDict({str(layer): ForkGate(config) for layer in config.gated_layers})
        self.layers = nn.ModuleList(ThoughtbubblesBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=config.use_bias)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        budget: Budget | None = None,
        output_hidden_states: bool | None = None,
        output_streams: bool = False,
        **kwargs: Any,
    ) -> ThoughtbubblesModelOutput:
        """Hidden states of every token.

        Args:
            input_ids: [B, T] int64; or else `inputs_embeds` [B, T, D].
            attention_mask: [B, T], non-zero at real tokens; holes and padding may stand anywhere (Design 3.7).
            budget: streams per token, in place of the configured budget (Design 3.9).
            output_hidden_states: also return the roots at every layer.
            output_streams: also return the streams at every layer.

        Raises:
            ValueError: for both or neither of ids and embeddings, a row longer than
                `max_position_embeddings`, a mask of another shape, a bad budget, or an argument without effect.
        """
        _refuse_unknown(kwargs)
        want_hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        kappa = self.config.exact_budget(budget)
        self._check_inputs(input_ids, attention_mask, inputs_embeds)
        columns = None if attention_mask is None else ColumnMap.from_mask(attention_mask)
        trail: list[Streams] = []
        for streams in self._layers(self._embed(input_ids, inputs_embeds, columns), kappa):
            if want_hidden or output_streams:
                trail.append(streams)
        return ThoughtbubblesModelOutput(
            last_hidden_state=_to_columns(self._merge(streams), columns),
            hidden_states=tuple(_to_columns(s.roots(), columns) for s in trail) if want_hidden else None,
            streams=tuple(trail) if output_streams else None,
            final_streams=streams,
            columns=columns,
        )

    def _layers(self, streams: Streams, kappa: Fraction) -> Iterator[Streams]:
        """The streams entering each block, after its gate, and those leaving the last."""
        config = self.config
        cos, sin = rotary_angles(streams.positions(), config.head_dim, config.rope_theta)
        for index, block in enumerate(self.layers):
            # Gate and routing stay outside the block, which may be checkpointed: recomputing them could
            # choose other survivors (Design 3.2).
            if index in config.gated_layers:
                streams = self.gates[str(index)](streams, kappa)
                cos, sin = rotary_angles(streams.positions(), config.head_dim, config.rope_theta)
            yield streams
            streams = streams.with_residual(block(streams.residual, cos, sin, *self._attenuation(streams, index)))
        yield streams

    def _check_inputs(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, inputs_embeds: Tensor | None
    ) -> None:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        given = input_ids if inputs_embeds is None else inputs_embeds[..., 0]
        assert given is not None
        if given.dim() != 2 or given.shape[1] == 0:
            raise ValueError(f"input of shape {tuple(given.shape)}: expected rows of at least one token, [B, T]")
        if given.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"input of {given.shape[1]} tokens: expected at most "
                f"max_position_embeddings={self.config.max_position_embeddings}"
            )
        if attention_mask is not None and attention_mask.shape != given.shape:
            shapes = f"{tuple(attention_mask.shape)}: expected that of the input, {tuple(given.shape)}"
            raise ValueError(f"attention_mask of shape {shapes}")

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, columns: ColumnMap | None) -> Streams:
        given = input_ids if inputs_embeds is None else inputs_embeds
        assert given is not None
        if columns is not None:
            given = columns.compact(given)
        embeddings = self.embed_tokens(given) if inputs_embeds is None else given
        return Streams.from_embeddings(self.dropout(embeddings), None if columns is None else columns.alive)

    def _attenuation(self, streams: Streams, layer: int) -> tuple[Tensor | None, Tensor | None]:
        """The scores [B, N] that attention sees at a layer, and the weights [B, N] of its updates (Design 3.5)."""
        config, gated = self.config, self.config.gated_layers
        forked = bool(gated) and layer >= gated[0]
        scored = forked and config.attenuation != "none"
        weight = streams.log_score.exp() if scored else None
        if streams.padded:
            alive = streams.alive.to(streams.log_score.dtype)
            weight = alive if weight is None else weight * alive
        # The release gives up its last channel in the layers before the first fork too.
        reserved = bool(gated) and config.attenuation == "released"
        return streams.log_score if scored or reserved else None, weight

    def merge_is_weighted(self, streams: Streams) -> bool:
        """Whether the merge weighs streams by p; the release does not where the width is that of the input."""
        unforked = streams.token.shape[1] == streams.num_tokens
        return bool(self.config.gated_layers) and not (self.config.attenuation == "released" and unforked)

    def _merge(self, streams: Streams) -> Tensor:
        """[B, T, D] in token order: merged and normed (Design 3.6)."""
        if self.config.merge == "residual":
            out: Tensor = self.norm(streams.merge_residuals(self.merge_is_weighted(streams)))
        elif self.config.merge == "residual-normed":
            normed = streams.with_residual(self.norm(streams.residual))
            out = normed.merge_residuals(self.merge_is_weighted(streams))
        else:
            out = self.norm(streams.roots())
        return out


class ThoughtbubblesForCausalLM(ThoughtbubblesPreTrainedModel, GenerationMixin):
    """The decoder with an unembedding: token ids to next-token logits and loss."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: ThoughtbubblesConfig) -> None:
        super().__init__(config)
        self.model = ThoughtbubblesModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        budget: Budget | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        output_streams: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> ThoughtbubblesCausalLMOutput:
        """Next-token logits and, given labels, the loss.

        Args:
            labels: [B, T] int64, usually the input ids: shifted inside, each real token against the label of the
                next real token of its row; -100 and padding are ignored (Design 3.7).
            logits_to_keep: only the last so many columns' logits, or those at the given indices; 0 is all.
            num_items_in_batch: what to divide the summed loss by, in place of the number of targets.

        The other arguments are those of `ThoughtbubblesModel.forward`.

        Raises:
            ValueError: as there; for an argument that this model has no use for; for labels together with
                `logits_to_keep`.
        """
        _refuse_unknown(kwargs)
        keeps_all = isinstance(logits_to_keep, int) and logits_to_keep == 0
        if labels is not None and not keeps_all:
            raise ValueError(f"logits_to_keep={logits_to_keep!r}: expected 0, since labels need every logit")
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            budget=budget,
            output_hidden_states=output_hidden_states,
            output_streams=output_streams,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        if self.config.merge == "probability":
            logits = _to_columns(self._mix_streams(out.final_streams), out.columns)[:, keep].contiguous()
        else:
            logits = self.lm_head(out.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=None,
                shift_labels=next_token_targets(labels, out.columns),
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
        return ThoughtbubblesCausalLMOutput(
            loss=loss, logits=logits, hidden_states=out.hidden_states, streams=out.streams
        )

    def _mix_streams(self, streams: Streams) -> Tensor:
        """Log of the mixture of all streams' next-token distributions [B, T, V] (Design 3.6, `probability`)."""
        logits = self.lm_head(self.model.norm(streams.residual))
        log_probs = logits.to(streams.log_score.dtype).log_softmax(-1)
        return streams.mix_log_probs(log_probs, self.model.merge_is_weighted(streams))


def next_token_targets(labels: Tensor, columns: ColumnMap | None) -> Tensor:
    """For each column [B, T] the label of its row's next real token; -100 where there is none."""
    if columns is None:
        return F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    ordered = columns.compact(labels).masked_fill(~columns.alive, IGNORE_INDEX)
    targets = columns.restore(F.pad(ordered[:, 1:], (0, 1), value=IGNORE_INDEX))
    return targets.masked_fill(~columns.real, IGNORE_INDEX)


def _to_columns(values: Tensor, columns: ColumnMap | None) -> Tensor:
    return values if columns is None else columns.restore(values)


def _refuse_unknown(kwargs: dict[str, Any]) -> None:
    """transformers passes arguments on freely; one that asks for something must not be ignored."""
    unused = [name for name, value in kwargs.items() if value is not None and value is not False]
    if unused:
        raise ValueError(f"{', '.join(unused)}: not an argument of a Thoughtbubbles model")


AutoConfig.register(ThoughtbubblesConfig.model_type, ThoughtbubblesConfig, exist_ok=True)
AutoModel.register(ThoughtbubblesConfig, ThoughtbubblesModel, exist_ok=True)
AutoModelForCausalLM.register(ThoughtbubblesConfig, ThoughtbubblesForCausalLM, exist_ok=True)
