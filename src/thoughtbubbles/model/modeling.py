"""The Thoughtbubbles decoder as transformers models.

Shape letters: B batch, T tokens, N streams, D hidden size, V vocabulary.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging
from transformers.utils.generic import ModelOutput, can_return_tuple

from .attention import ResidualProjection, StreamAttention, rotary_angles
from .budget import Budget, RowBudgets
from .cache import AttentionMemory, Placement, StreamCache
from .configuration import ThoughtbubblesConfig
from .controls import StreamCopier
from .gate import ForkGate
from .generating import StreamGenerationMixin, check_position_ids, one_cache, refuse_unknown
from .loss import (
    IGNORE_INDEX,
    assert_in_vocabulary,
    chunked_next_token_loss,
    chunked_token_losses,
    next_token_loss,
    next_token_targets,
    token_losses,
)
from .mixture import Mixture
from .norms import block_norm
from .rotary import Rotary
from .sharing import SharedModel, register_models
from .static import StaticStreamCache
from .streams import ColumnMap, Streams
from .threshold import ScoreHistogram
from .weights import CheckedModel

logger = logging.get_logger(__name__)


@dataclass
class ThoughtbubblesModelOutput(ModelOutput):
    """What `ThoughtbubblesModel` returns.

    Attributes:
        last_hidden_state: [B, T, D] merged and normed; with the merge `probability`, which has no such vector,
            the normed roots.
        hidden_states: if asked for, L + 1 tensors [B, T, D]: the roots entering each block and leaving the last.
        streams: if asked for, L + 1 `Streams`: entering each block, after its gate, and leaving the last. Where blocks
            are applied several times, L counts each time.
        final_streams: the streams leaving the last block.
        merge_is_weighted: whether the merge weighs them by p (method: Merge).
        columns: where the real tokens stand; None without an attention mask.
        cache: if one was given or asked for; also `past_key_values`, its name before transformers 5.24.
    """

    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    streams: tuple[Streams, ...] | None = None
    final_streams: Streams | None = None
    merge_is_weighted: bool | None = None
    columns: ColumnMap | None = None
    cache: StreamCache | None = None

    past_key_values = property(attrgetter("cache"))


@dataclass
class ThoughtbubblesCausalLMOutput(ModelOutput):
    """What `ThoughtbubblesForCausalLM` returns.

    Attributes:
        loss: mean cross-entropy in nats over the labelled tokens, if labels were given.
        logits: [B, T, V], finite and meaningless at padding.
        cache, hidden_states, streams: as in `ThoughtbubblesModelOutput`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: StreamCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    streams: tuple[Streams, ...] | None = None

    past_key_values = property(attrgetter("cache"))


class ThoughtbubblesMLP(nn.Module):
    """The position-wise MLP."""

    def __init__(self, config: ThoughtbubblesConfig) -> None:
        super().__init__()
        assert config.intermediate_size is not None
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.has_bias("mlp")
        self.gate_proj = nn.Linear(hidden, inner, bias=bias) if config.mlp == "gated" else None
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.act = ACT2FN[config.hidden_act]
        self.down_proj = ResidualProjection(inner, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        up = self.up_proj(x)
        out: Tensor = self.down_proj(self.act(up) if self.gate_proj is None else self.act(self.gate_proj(x)) * up)
        return out


class ThoughtbubblesBlock(GradientCheckpointingLayer):
    """Pre-norm attention and MLP, their updates scaled by each stream's p (method: Attenuation, The block)."""

    def __init__(self, config: ThoughtbubblesConfig) -> None:
        super().__init__()
        self.is_parallel = config.parallel_residual
        self.attention_norm = block_norm(config)
        self.attention = StreamAttention(config)
        self.mlp_norm = block_norm(config)
        self.mlp = ThoughtbubblesMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        log_score: Tensor | None,
        update_weight: Tensor | None,
        memory: AttentionMemory | None = None,
        placement: Placement | None = None,
    ) -> Tensor:
        """x [B, N, D]; log_score [B, N] of the keys; update_weight [B, N] in both updates. None: 0 and 1."""
        weight = 1 if update_weight is None else update_weight[..., None].to(x.dtype)
        attended = self.dropout(self.attention(self.attention_norm(x), cos, sin, log_score, memory, placement))
        if self.is_parallel:
            updated: Tensor = x + weight * (attended + self.dropout(self.mlp(self.mlp_norm(x))))
            return updated
        x = x + weight * attended
        out: Tensor = x + weight * self.dropout(self.mlp(self.mlp_norm(x)))
        return out


class ThoughtbubblesPreTrainedModel(SharedModel, CheckedModel):
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
            module.reset()
        elif isinstance(module, ScoreHistogram):
            module.forget()


class ThoughtbubblesModel(ThoughtbubblesPreTrainedModel):
    """Embedding, gates and blocks, merge and final norm: token ids to hidden states."""

    def __init__(self, config: ThoughtbubblesConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.gates = nn.ModuleDict({str(layer): ForkGate(config, layer) for layer in config.gated_layers})
        self.copier = self._copier() if config.copied_layers else None
        self.layers = nn.ModuleList(ThoughtbubblesBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = block_norm(config)
        self.rotary = Rotary(config)
        self.gradient_checkpointing = False
        # The optimizer step, filled in by a trainer: in training `random` and `uniform` draw by it. A tensor, so that
        # one compiled graph serves every step.
        self.routing_step = torch.zeros((), dtype=torch.int64, device="cpu")
        self.post_init()

    def _copier(self) -> StreamCopier:
        config = self.config
        vectors = int(config.exact_budget()) - 1 if config.rule.with_vectors else None
        return StreamCopier(config.hidden_size, vectors, config.hidden_dropout)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: StreamCache | None = None,
        use_cache: bool | None = None,
        budget: Budget | list[Budget] | None = None,
        output_hidden_states: bool | None = None,
        output_streams: bool = False,
        past_key_values: StreamCache | None = None,
        **kwargs: Any,
    ) -> ThoughtbubblesModelOutput:
        """Hidden states of every token.

        Args:
            input_ids: [B, T] int64; or else `inputs_embeds` [B, T, D].
            attention_mask: [B, T], non-zero at real tokens; holes and padding may stand anywhere (method: Padding).
                With a filled cache [B, past + T].
            cache: to go on from and to add to (method: Cache); an empty one to begin with.
            use_cache: whether to make and return a cache where none is given; None is what the configuration says in
                its `use_cache`, and no where it says nothing.
            budget: streams per token, in place of the configured budget, or one for each row (method: Budget at test
                time).
            output_hidden_states: also return the roots at every layer.
            output_streams: also return the streams at every layer.
            past_key_values: another name of `cache`, that of transformers before 5.24.
            kwargs: `position_ids`, which must be what they would be anyway (`check_position_ids`); nothing else.

        Raises:
            ValueError: for both or neither of ids and embeddings, a row longer than
                `max_position_embeddings`, a mask of another shape, a bad budget, an argument without effect, or a
                cache of another class, model, budget or batch, or together with gradient checkpointing.
        """
        position_ids = kwargs.pop("position_ids", None)
        refuse_unknown({"output_attentions": self.config.output_attentions, **kwargs})
        want_hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        cache = self._cache_of(cache, past_key_values, use_cache)
        given = self._check_inputs(input_ids, attention_mask, inputs_embeds, cache)
        kappa = self._exact_budget(budget, given)
        columns = None if attention_mask is None else ColumnMap.from_mask(attention_mask[:, -given.shape[1] :])
        offset = self._open_cache(cache, kappa, given, columns)
        if offset is None:
            check_position_ids(position_ids, columns, given)
        trail: list[Streams] = []
        for streams in self._layers(self._embed(given, columns, offset), kappa, cache):
            if want_hidden or output_streams:
                trail.append(streams)
        weighted, copies = self._merge_is_weighted(kappa), self._copies(kappa)
        return ThoughtbubblesModelOutput(
            last_hidden_state=_to_columns(self._merge(streams, weighted, copies), columns),
            hidden_states=tuple(_to_columns(s.roots(), columns) for s in trail) if want_hidden else None,
            streams=tuple(trail) if output_streams else None,
            final_streams=streams,
            merge_is_weighted=weighted,
            columns=columns,
            cache=cache,
        )

    def advance(self, input_ids: Tensor, alive: Tensor, cache: StaticStreamCache) -> ThoughtbubblesModelOutput:
        """A step over a static cache, which is ready for it: nothing is checked, and no value is read back.

        Args:
            input_ids: [B, 1], a token more of every row.
            alive: [B, 1] bool, in which rows it is one.
        """
        kappa = cache.budget
        assert kappa is not None
        given = Streams.from_embeddings(self.embed_tokens(input_ids), alive, cache.advance(alive))
        *_, streams = self._layers(given, kappa, cache)
        weighted = self._merge_is_weighted(kappa)
        return ThoughtbubblesModelOutput(
            last_hidden_state=self._merge(streams, weighted, self._copies(kappa)),
            final_streams=streams,
            merge_is_weighted=weighted,
        )

    def _exact_budget(self, budget: Budget | list[Budget] | None, given: Tensor) -> Fraction | RowBudgets:
        """The budget of a pass over `given` [B, ...], or those of its rows.

        Raises:
            ValueError: for what is none; for several where rows cannot have their own.
        """
        if not isinstance(budget, list):
            return self.config.exact_budget(budget)
        if len(budget) != len(given):
            raise ValueError(f"budget={budget}: expected one, or one for each of {len(given)} rows")
        if not self.config.has_row_budgets:
            raise ValueError(
                f"budget={budget}: expected one for all rows with routing {self.config.routing} and attenuation "
                f"{self.config.attenuation}"
            )
        return RowBudgets([self.config.exact_budget(each) for each in budget], given.device)

    def _copies(self, kappa: Fraction | RowBudgets) -> int:
        return 1 if self.copier is None or isinstance(kappa, RowBudgets) else int(kappa)

    def _layers(self, streams: Streams, kappa: Fraction | RowBudgets, cache: StreamCache | None) -> Iterator[Streams]:
        """The streams entering each block, after its gate, as often as it is applied, and those leaving the last."""
        config, step = self.config, self.routing_step * self.training
        # Assisted decoding by an early exit lowers the number of layers for a while.
        blocks = [*self.layers[: config.num_hidden_layers]]
        for index, block in enumerate(blocks * config.num_loops):
            # Gate and routing stay outside the block, which may be checkpointed: recomputing them could
            # choose other survivors (method: Gate).
            if index in config.gated_layers:
                forks, attended = (None, None) if cache is None else (cache.forks[index], cache.attended.get(index))
                streams = self.gates[str(index)](streams, kappa, forks, step, attended)
            elif self.copier is not None and index in config.copied_layers:
                streams = self.copier(streams, self._copies(kappa))
            if index == 0 or index in config.gated_layers + config.copied_layers:
                # The channel's pair has turned before: there it shows where counting begins, and the release's at 1.
                cos, sin = rotary_angles(streams.positions(origin=int(self._gives_up_a_channel)), self.rotary)
                placement = None if cache is None else cache.place(index, streams.ordinal, streams.alive)
            yield streams
            memory = None if cache is None else cache.attention[index]
            attenuation = self._attenuation(streams, index)
            streams = streams.with_residual(block(streams.residual, cos, sin, *attenuation, memory, placement))
        yield streams

    @property
    def _gives_up_a_channel(self) -> bool:
        """Whether attention has a channel for the log score, as the release has before the first fork too."""
        return bool(self.config.gated_layers) and self.config.attenuation == "released"

    def _cache_of(
        self, cache: StreamCache | None, past_key_values: StreamCache | None, use_cache: bool | None
    ) -> StreamCache | None:
        """The cache that was given, or a new one if asked for; the configuration's wish yields to checkpointing."""
        if use_cache is None and not (self.training and self.gradient_checkpointing):
            use_cache = self.config.use_cache
        given = one_cache(cache, past_key_values)
        return StreamCache() if given is None and use_cache else given

    def _open_cache(
        self, cache: StreamCache | None, kappa: Fraction | RowBudgets, given: Tensor, columns: ColumnMap | None
    ) -> Tensor | None:
        """Note the columns of a pass in the cache; the tokens of each row that it held before, [B, 1]."""
        if cache is None:
            return None
        cache.begin(self.config, kappa, len(given))
        before = cache.tokens
        cache.see(given.new_ones(given.shape[:2], dtype=torch.bool) if columns is None else columns.real)
        if self.config.leaks:
            logger.warning_once("topk routing needs the whole row: with a cache, decoding routes causally instead")
        return None if before is None else before[:, None]

    def _check_inputs(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        inputs_embeds: Tensor | None,
        cache: StreamCache | None,
    ) -> Tensor:
        """The ids [B, T] or embeddings [B, T, D], checked."""
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        if given.dim() != (2 if inputs_embeds is None else 3) or given.shape[1] == 0:
            raise ValueError(f"input of shape {tuple(given.shape)}: expected rows of at least one token, [B, T]")
        if cache is not None and not isinstance(cache, StreamCache):
            raise ValueError(f"cache of class {type(cache).__name__}: expected a StreamCache")
        if cache is not None and self.training and self.gradient_checkpointing:
            raise ValueError("cache: expected none while gradient checkpointing recomputes the blocks")
        length = given.shape[1] + (0 if cache is None else cache.get_seq_length())
        if length > self.config.max_position_embeddings:
            raise ValueError(
                f"input of {length} tokens: expected at most "
                f"max_position_embeddings={self.config.max_position_embeddings}"
            )
        if attention_mask is not None and attention_mask.shape != (len(given), length):
            raise ValueError(
                f"attention_mask of shape {tuple(attention_mask.shape)}: expected {(len(given), length)}, "
                "that of the input and of what a cache holds; who attends to whom is not for a mask to say"
            )
        return given

    def _embed(self, given: Tensor, columns: ColumnMap | None, offset: Tensor | None) -> Streams:
        """The streams at the input, of ids [B, T] or embeddings [B, T, D]."""
        given = given if columns is None else columns.compact(given)
        embeddings = self.embed_tokens(given) if given.dim() == 2 else given
        return Streams.from_embeddings(self.dropout(embeddings), None if columns is None else columns.alive, offset)

    def _attenuation(self, streams: Streams, layer: int) -> tuple[Tensor | None, Tensor | None]:
        """The scores [B, N] that attention sees at a layer, the weights [B, N] of its updates (method: Attenuation)."""
        config, gated = self.config, self.config.gated_layers
        forked = bool(gated) and layer >= gated[0]
        scored = forked and config.attenuation != "none"
        weight = streams.log_score.exp() if scored else None
        if streams.padded:
            alive = streams.alive.to(streams.log_score.dtype)
            weight = alive if weight is None else weight * alive
        return streams.log_score if scored or self._gives_up_a_channel else None, weight

    def _merge_is_weighted(self, kappa: Fraction | RowBudgets) -> bool:
        """Whether the merge weighs streams by p.

        The release does not where the width stays that of the input: under its own rule, at budget 1.
        """
        return bool(self.config.gated_layers) and (self.config.attenuation != "released" or kappa != 1)

    def _merge(self, streams: Streams, weighted: bool, copies: int) -> Tensor:
        """[B, T, D] in token order: merged and normed (method: Merge). Copies, as many to each token, are averaged."""
        if self.config.merge == "residual":
            # Shares, since the norm's eps would swallow what many fork layers attenuate; the release takes p.
            weights = streams.shares() if self.config.attenuation != "released" else streams.log_score.exp()
            out: Tensor = self.norm(streams.merge_residuals(weights if weighted else None) / copies)
        elif self.config.merge == "residual-normed":
            normed = streams.with_residual(self.norm(streams.residual))
            out = normed.merge_residuals(streams.log_score.exp() if weighted else None) / copies
        else:
            out = self.norm(streams.roots())
        return out


class ThoughtbubblesForCausalLM(ThoughtbubblesPreTrainedModel, StreamGenerationMixin):
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
        cache: StreamCache | None = None,
        use_cache: bool | None = None,
        budget: Budget | list[Budget] | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        output_streams: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        return_logits: bool = True,
        past_key_values: StreamCache | None = None,
        **kwargs: Any,
    ) -> ThoughtbubblesCausalLMOutput:
        """Next-token logits and, given labels, the loss.

        Args:
            labels: [B, T] int64, usually the input ids: shifted inside, each real token against the label of the
                next real token of its row; -100 and padding are ignored (method: Padding). With nothing else the loss
                is nan, as torch's cross-entropy is, and its gradients are zero.
            logits_to_keep: only the last so many columns' logits, or those at the given indices; 0 is all.
            num_items_in_batch: what to divide the summed loss by, in place of the number of targets.
            return_logits: False returns the loss alone, for which some rows' logits are held at a time.

        The other arguments are those of `ThoughtbubblesModel.forward`.

        Raises:
            ValueError: as there; for unknown arguments, labels with `logits_to_keep` or `return_logits=False` without.
            RuntimeError: for labels that are neither -100 nor ids of the vocabulary (-1 is no "ignore").
        """
        position_ids = kwargs.pop("position_ids", None)
        refuse_unknown(kwargs)
        _check_labels(labels, logits_to_keep, return_logits)
        given, more = one_cache(cache, past_key_values), labels is not None or output_hidden_states or output_streams
        if not more and (step := self._step(input_ids, attention_mask, given, budget)) is not None:
            return step
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            cache=given,
            use_cache=use_cache,
            budget=budget,
            output_hidden_states=output_hidden_states,
            output_streams=output_streams,
            position_ids=position_ids,
        )
        loss, targets = None, None if labels is None else next_token_targets(labels, out.columns)
        if targets is not None:
            assert_in_vocabulary(targets, self.config.vocab_size)
        if return_logits or not self._decodes_in_chunks:
            logits = self._logits(out, logits_to_keep)
            loss = None if targets is None else next_token_loss(logits, targets, num_items_in_batch)
        elif targets is not None:
            loss = self._chunked_loss(out, targets, num_items_in_batch)
        kept = logits if return_logits else None
        return ThoughtbubblesCausalLMOutput(loss, kept, out.cache, out.hidden_states, out.streams)

    def _step(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        cache: StreamCache | None,
        budget: Budget | list[Budget] | None,
    ) -> ThoughtbubblesCausalLMOutput | None:
        """A pass that the graph of a static cache makes; None for any other."""
        if input_ids is None or not isinstance(cache, StaticStreamCache):
            return None
        if not cache.takes_step_of(input_ids, attention_mask):
            return None
        cache.begin(self.config, self.model._exact_budget(budget, input_ids), len(input_ids))
        return ThoughtbubblesCausalLMOutput(None, cache.take_step(input_ids, attention_mask), cache)

    @torch.no_grad()
    def advance(self, input_ids: Tensor, alive: Tensor, cache: StaticStreamCache) -> Tensor:
        """Logits [B, V] of a step over a static cache, as `ThoughtbubblesModel.advance`."""
        return self._logits(self.model.advance(input_ids, alive, cache), 1)[:, 0]

    @torch.no_grad()
    def token_losses(
        self, input_ids: Tensor, columns: Tensor, attention_mask: Tensor | None = None, budget: Budget | None = None
    ) -> Tensor:
        """[B, K] losses in nats of the token after each of the columns [K]; 0 where there is none.

        Only some rows of their logits are held at a time. The other arguments are those of `forward`.
        """
        out = self.model(input_ids=input_ids, attention_mask=attention_mask, budget=budget)
        targets = next_token_targets(input_ids, out.columns)[:, columns]
        if not self._decodes_in_chunks:
            return token_losses(self._logits(out, columns), targets)
        if self.config.merge != "probability":
            return chunked_token_losses(out.last_hidden_state[:, columns], self.lm_head.weight, targets)
        mixture = self._mixture(out, columns)
        losses = chunked_token_losses(
            mixture.streams.residual, self.lm_head.weight, mixture.targets(targets), mixture.bubbles()
        )
        return mixture.of_columns(losses).where(targets != IGNORE_INDEX, 0)

    @property
    def _decodes_in_chunks(self) -> bool:
        """Whether the unembedding is a matrix and no more: an adapter may have put something else in its place."""
        return type(self.lm_head) is nn.Linear

    def _chunked_loss(self, out: ThoughtbubblesModelOutput, targets: Tensor, num_items: Tensor | int | None) -> Tensor:
        if self.config.merge != "probability":
            assert out.last_hidden_state is not None
            return chunked_next_token_loss(out.last_hidden_state, self.lm_head.weight, targets, num_items)
        mixture = self._mixture(out, slice(None))
        hidden, of_streams = mixture.streams.residual, mixture.targets(targets)
        return chunked_next_token_loss(hidden, self.lm_head.weight, of_streams, num_items, mixture.bubbles())

    def _logits(self, out: ThoughtbubblesModelOutput, logits_to_keep: int | Tensor) -> Tensor:
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        if self.config.merge == "probability":
            return self._mixture(out, keep).log_probs(self.lm_head)
        assert out.last_hidden_state is not None
        logits: Tensor = self.lm_head(out.last_hidden_state[:, keep])
        return logits

    def _mixture(self, out: ThoughtbubblesModelOutput, keep: slice | Tensor) -> Mixture:
        """What predicts the tokens after the columns `keep`."""
        streams, gates = out.final_streams, len(self.config.gated_layers)
        assert streams is not None
        width = streams.token.shape[1]
        widest = min(2**gates, width) if gates else width // streams.num_tokens
        kept = Mixture.of(streams, out.columns, keep, bool(out.merge_is_weighted), widest)
        return replace(kept, streams=kept.streams.with_residual(self.model.norm(kept.streams.residual)))


def _to_columns(values: Tensor, columns: ColumnMap | None) -> Tensor:
    return values if columns is None else columns.restore(values)


register_models(ThoughtbubblesModel, ThoughtbubblesForCausalLM)


def _check_labels(labels: Tensor | None, logits_to_keep: int | Tensor, return_logits: bool) -> None:
    keeps_all = isinstance(logits_to_keep, int) and logits_to_keep == 0
    if labels is not None and not keeps_all:
        raise ValueError(f"logits_to_keep={logits_to_keep!r}: expected 0, since labels need every logit")
    if labels is None and not return_logits:
        raise ValueError("return_logits=False: expected labels, without which nothing would be left to return")
