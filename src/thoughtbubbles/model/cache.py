"""The cache of exact decoding, and what `generate` of transformers has to know about it (method: Cache).

With causal routing nothing about a past token ever changes, so everything that later tokens need of it can be kept:
keys and values of its streams, and at each fork layer the scores that its candidates competed with.

Shape letters: B batch, S kept streams or candidates of a row, N new streams, H heads.
"""

import copy
import inspect
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, GenerationMixin, StoppingCriteria, StoppingCriteriaList
from transformers.utils import logging
from transformers.utils.generic import ModelOutput

from .configuration import ThoughtbubblesConfig
from .memory import RouteMemory, RowBuffer, RowMemory
from .streams import ColumnMap

__all__ = ["StreamCache"]

# All but what says nothing about the tokens so far; of budgets a call has its own.
_SETTINGS = sorted(
    set(ThoughtbubblesConfig.__annotations__)
    - {"budget", "hidden_dropout", "initializer_range", "max_position_embeddings", "tie_word_embeddings", "vocab_size"}
    - {"bos_token_id", "eos_token_id", "pad_token_id"}
)


@dataclass(frozen=True)
class Placement:
    """Where the new streams of a pass go in the memory of the layers up to the next fork, and what they see.

    Attributes:
        token: [B, N] ordinals of the new streams in the whole row; meaningless where dead.
        counts: new streams of each row, the first so many of its N.
        mask: [B, 1, N, S] bool, what each new stream attends to; None where that is all up to itself (`is_causal`) or
            all there is.
        is_causal: whether the new streams are all there is and see each other left to right.
    """

    token: Tensor
    counts: list[int]
    mask: Tensor | None
    is_causal: bool


class AttentionMemory(RowMemory):
    """Keys and values of one attention layer, as they enter the product: rotated, with their scores applied."""

    def __init__(self) -> None:
        self.keys, self.values = RowBuffer(2), RowBuffer(2)
        super().__init__(RowBuffer(1), self.keys, self.values)

    def place(self, token: Tensor, counts: list[int]) -> Placement:
        """How a pass of new streams with ordinals [B, N], `counts` of them alive, meets what is kept."""
        starts = self.lengths or [0] * len(counts)
        new = token.shape[1]
        if max(starts) == 0:
            return Placement(token, counts, None, is_causal=True)
        if new == 1 and min(starts) == max(starts):
            return Placement(token, counts, None, is_causal=False)
        begin = torch.tensor(starts, device=token.device)[:, None, None]
        reach = begin + torch.arange(1, new + 1, device=token.device)[None, :, None]
        mask = torch.arange(max(starts) + new, device=token.device) < reach
        return Placement(token, counts, mask[:, None], is_causal=False)

    def append(self, keys: Tensor, values: Tensor, placement: Placement) -> tuple[Tensor, Tensor]:
        """Keep the new streams' keys and values [B, H, N, K]; return those of all streams [B, H, S, K]."""
        starts = self.lengths or [0] * len(keys)
        self.keys.write(keys, starts)
        self.values.write(values, starts)
        self.token.write(placement.token, starts)
        width = max(starts) + keys.shape[2]
        self.lengths = [start + count for start, count in zip(starts, placement.counts, strict=True)]
        return self.keys.read(width), self.values.read(width)


class StreamCache(Cache):
    """Everything that decoding needs of the tokens so far (method: Cache).

    Pass an empty one as `cache`; `generate` does so by itself. It serves one model at one budget.
    """

    is_compileable = False
    is_croppable = True

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.reset()

    def reset(self) -> None:
        """Forget everything, the budget included."""
        self.budget: Fraction | None = None
        self.attention: list[AttentionMemory] = []
        self.forks: dict[int, RouteMemory] = {}
        self.attended: dict[int, AttentionMemory] = {}
        self.real: Tensor | None = None
        self._settings: dict[str, Any] | None = None

    def begin(self, config: ThoughtbubblesConfig, budget: Fraction, batch: int) -> None:
        """Get ready for a pass of a model.

        Raises:
            ValueError: if the cache was filled by a model of other settings, at another budget or for another batch.
        """
        settings = {name: getattr(config, name) for name in _SETTINGS}
        if self._settings is None:
            self._settings, self.budget = copy.deepcopy(settings), budget
            self.attention = [AttentionMemory() for _ in range(config.depth)]
            self.forks = {layer: config.rule.memory() for layer in config.gated_layers}
            if config.fork_content == "attended":
                self.attended = {layer: AttentionMemory() for layer in config.gated_layers}
        others = [name for name, value in settings.items() if value != self._settings[name]]
        if others:
            filled, now = ({name: of[name] for name in others} for of in (self._settings, settings))
            raise ValueError(f"cache: filled by a model with {filled}, expected {now}")
        if budget != self.budget:
            raise ValueError(f"budget={budget}: expected {self.budget}, with which the cache was filled")
        if self.real is not None and len(self.real) != batch:
            raise ValueError(f"batch of {batch} rows: expected {len(self.real)}, those of the cache")

    @property
    def tokens(self) -> Tensor | None:
        """[B] real tokens so far; None before the first."""
        return None if self.real is None else self.real.sum(1)

    def place(self, layer: int, token: Tensor, alive: Tensor) -> Placement:
        """Where the new streams [B, N] that enter `layer`, the first or one that forks or copies, go up to the next."""
        return self.attention[layer].place(token, alive.sum(1).tolist())

    def see(self, real: Tensor) -> None:
        """Note the columns [B, q] of a pass, True at real tokens."""
        self.real = real if self.real is None else torch.cat([self.real, real], dim=1)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns so far: tokens of a row, padding included."""
        return 0 if self.real is None else self.real.shape[1]

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """No bound of its own: -1."""
        return -1

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """No bound of its own: -1."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Columns that a pass over `query_length` of them attends to, and the first of them."""
        return self.get_seq_length() + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last columns, as many as the negative of `tokens_to_remove`, which is transformers' convention.

        Raises:
            ValueError: for a positive number, which older versions took for the length to keep.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove={tokens_to_remove}: expected the negative of a number of columns, or 0")
        if self.real is None or tokens_to_remove == 0:
            return
        self.real = self.real[:, : max(self.real.shape[1] + tokens_to_remove, 0)]
        tokens = self.real.sum(1)
        for memory in self._memories():
            memory.crop(tokens)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows `beam_idx` [B], in that order."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row in place."""
        if self.real is not None:
            self.batch_select_indices(torch.arange(len(self.real)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows at `indices`, in that order."""
        if self.real is None:
            return
        self.real = self.real.index_select(0, indices.to(self.real.device))
        for memory in self._memories():
            memory.select_rows(indices)

    def _memories(self) -> list[RowMemory]:
        return [*self.attention, *self.forks.values(), *self.attended.values()]

    @property
    def is_initialized(self) -> bool:
        """Whether a pass was made."""
        return self.real is not None

    @property
    def batch_size(self) -> int:
        """Rows, 0 before the first pass."""
        return 0 if self.real is None else len(self.real)

    @property
    def is_sliding(self) -> list[bool]:
        """No layer forgets."""
        return [False] * len(self.attention)

    @property
    def is_linear(self) -> list[bool]:
        """No layer is linear attention; a cache without layers yet must not pass for one of such layers alone."""
        return [False] * max(len(self.attention), 1)

    @property
    def nbytes(self) -> int:
        """Bytes of memory held."""
        buffers = (buffer for memory in self._memories() for buffer in memory.buffers)
        return sum(buffer.data.nbytes for buffer in buffers if buffer.data is not None)

    def __len__(self) -> int:
        return len(self.attention)

    def __repr__(self) -> str:
        return f"StreamCache(columns={self.get_seq_length()}, rows={self.batch_size}, budget={self.budget})"


def one_cache(cache: StreamCache | None, past_key_values: StreamCache | None) -> StreamCache | None:
    """The cache of a pass, under whichever of its two names it came."""
    if cache is not None and past_key_values is not None:
        raise ValueError("cache and past_key_values: expected one of the two, which are names of the same")
    return past_key_values if cache is None else cache


# Renamed in transformers 5.24.
CACHE_NAME = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)
"""What `generate` of the installed transformers calls the cache that it hands on."""
CACHE_IMPLEMENTATIONS = (None, "dynamic")
"""Those that mean a cache that grows."""
REASONS = {
    "output_attentions": "attention is between streams, and fused kernels keep none of it; `trace_bubbles` has what "
    "each token's forks receive",
    "token_type_ids": "there is one type of token",
    "head_mask": "no head can be left out",
    "cu_seq_lens_q": "rows that hold several texts are told apart by nothing; packing that does not ask for it works, "
    "such as TRL's packing_strategy='wrapped'",
}
"""Why arguments of other models are refused here."""

logger = logging.get_logger(__name__)


class StreamGenerationMixin(GenerationMixin):
    """`generate` with a `StreamCache`."""

    config: ThoughtbubblesConfig

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        """Refuse what transformers would not do: from embeddings it decodes with a cache, whatever it is told."""
        # transformers types `self` as a model that also generates.
        settings, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)  # type: ignore[misc]
        from_embeddings = model_kwargs.get("inputs_embeds") is not None
        if from_embeddings and settings.use_cache is False and self.config.leaks:
            raise ValueError(
                "use_cache=False with inputs_embeds: expected input_ids, since `generate` continues embeddings with a "
                "cache alone, where topk routes causally"
            )
        return settings, model_kwargs

    def _prepare_cache_for_generation(  # type: ignore[override]  # its other arguments change with the version
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Start with an empty cache of ours, unless there is one or `generate` was told to use none."""
        if (named := generation_config.cache_implementation) not in CACHE_IMPLEMENTATIONS:
            raise ValueError(
                f"cache_implementation={named!r}: expected None or 'dynamic', since streams need a StreamCache"
            )
        if (given := model_kwargs.pop("cache", None)) is not None:
            model_kwargs[CACHE_NAME] = given
        if generation_config.use_cache and model_kwargs.get(CACHE_NAME) is None:
            model_kwargs[CACHE_NAME] = StreamCache()

    def _validate_generation_mode(
        self, generation_mode: Any, generation_config: Any, generation_mode_kwargs: dict[str, Any]
    ) -> None:
        """Note the longest row, which an assistant may have shorter.

        Raises:
            ValueError: for an early exit after a layer that there is not.
        """
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)  # type: ignore[misc]
        layers, leave = self.config.num_hidden_layers, generation_config.assistant_early_exit
        if leave is not None and not 1 <= leave <= layers:
            raise ValueError(f"assistant_early_exit={leave}: expected a number of layers from 1 to {layers}")
        readers = [self, generation_mode_kwargs.get("assistant_model") or self]
        generation_config._longest = min(reader.config.max_position_embeddings for reader in readers)

    def _prepare_generated_length(
        self, generation_config: Any, has_default_max_length: bool, *args: Any, **kwargs: Any
    ) -> Any:
        """Let no row grow beyond the longest that the model reads.

        Raises:
            ValueError: for a prompt that leaves no room.
        """
        columns, counted = kwargs["inputs_tensor"].shape[1], kwargs["input_ids_length"]
        longest = generation_config._longest
        if columns >= longest:
            raise ValueError(
                f"prompt of {columns} tokens: expected at most {longest - 1}, since max_position_embeddings={longest}"
            )
        # What transformers generates unasked it cuts by itself.
        unasked = generation_config.max_length + counted if has_default_max_length else 0
        settings: Any = super()._prepare_generated_length(  # type: ignore[misc]
            generation_config, has_default_max_length, *args, **kwargs
        )
        room = longest - (columns - counted)  # of a prompt given as embeddings only what follows counts
        settings._is_cut = max(settings.max_length, 0 if settings.max_new_tokens else unasked) > room
        settings.max_length = min(settings.max_length, room)
        return settings

    def _get_stopping_criteria(self, generation_config: Any, *args: Any, **kwargs: Any) -> StoppingCriteriaList:
        """Those of transformers, and one that says when the longest row is what ends the text."""
        criteria = super()._get_stopping_criteria(generation_config, *args, **kwargs)  # type: ignore[misc]
        if generation_config._is_cut and not generation_config.is_assistant:
            ends = [generation_config._eos_token_tensor, generation_config._pad_token_tensor]
            length, longest = generation_config.max_length, generation_config._longest
            criteria.append(RowEnd(length, longest, [end for end in ends if end is not None]))
        return criteria

    def _update_model_kwargs_for_generation(
        self, outputs: ModelOutput, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Hand the cache on to the next pass under the name that `generate` looks for."""
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        if outputs.get("cache") is not None:
            model_kwargs[CACHE_NAME] = outputs["cache"]
        return model_kwargs


class RowEnd(StoppingCriteria):
    """Warns if a text is still going on where the longest row ends; what stops it is its length.

    Args:
        length: of the ids there.
        longest: tokens of the row.
        ends: ids after which a text does not go on.
    """

    def __init__(self, length: int, longest: int, ends: list[Tensor]) -> None:
        self.length = length
        self.longest = longest
        self.ends = ends

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        """Stops nothing: [B] False."""
        last = input_ids[:, -1]
        if input_ids.shape[1] >= self.length:
            ended = [torch.isin(last, end) for end in self.ends]
            if not ended or not bool(torch.stack(ended).any(0).all()):
                logger.warning(
                    f"stopped at the end of the longest row: {self.longest} tokens (max_position_embeddings)"
                )
        return torch.zeros_like(last, dtype=torch.bool)


def refuse_unknown(kwargs: dict[str, Any]) -> None:
    """transformers passes arguments on freely; one that asks for something must not be ignored.

    Raises:
        ValueError: naming them, and why where there is a reason.
    """
    kwargs.pop("tokenizer", None)  # which `generate` needs for stop strings and hands on
    for name, value in kwargs.items():
        if value is not None and value is not False:
            reason = f": {REASONS[name]}" if name in REASONS else ""
            raise ValueError(f"{name}: not an argument of a Thoughtbubbles model{reason}")


def check_position_ids(position_ids: Tensor | None, columns: ColumnMap | None, given: Tensor) -> None:
    """Check positions that a caller gives against those that a row's tokens have anyway: 0, 1, ... (method: State).

    Args:
        position_ids: [B, T], [1, T] or [T]; those of padding mean nothing. None is no opinion.
        columns: where the real tokens stand; None is everywhere.
        given: ids [B, T] or embeddings [B, T, D] of a row's first pass.

    Raises:
        ValueError: for others.
    """
    if position_ids is None or torch.compiler.is_compiling():
        return
    batch, length = given.shape[:2]
    own = torch.arange(length, device=given.device).expand(batch, -1) if columns is None else columns.ordinal
    theirs = position_ids.to(own.device)
    if theirs.dim() > 2 or theirs.shape[-1] != length or theirs.numel() not in (length, batch * length):
        raise ValueError(f"position_ids of shape {tuple(position_ids.shape)}: expected {(batch, length)}")
    differ = own != theirs
    if bool((differ if columns is None else differ & columns.real).any()):
        raise ValueError(
            "position_ids: expected 0, 1, ... over the real tokens of a row, since streams find their own positions; "
            "rows that hold several texts are told apart by nothing"
        )
