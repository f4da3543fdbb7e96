"""What `generate` of transformers has to know about streams and their cache, and what a forward pass refuses."""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, StoppingCriteria, StoppingCriteriaList
from transformers.utils import logging
from transformers.utils.generic import ModelOutput

from .budget import Budget
from .cache import StreamCache
from .configuration import ThoughtbubblesConfig
from .graph import StepGraph
from .static import StaticStreamCache
from .streams import ColumnMap


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
CACHE_IMPLEMENTATIONS = (None, "dynamic", "static")
"""Whether a cache grows or is made at its full size; None is the first."""
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

    def _prepare_cache_for_generation(  # type: ignore[override]  # it returns what nobody reads
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Start with an empty cache of ours, unless there is one or `generate` was told to use none."""
        if (named := generation_config.cache_implementation) not in CACHE_IMPLEMENTATIONS:
            raise ValueError(
                f"cache_implementation={named!r}: expected None, 'dynamic' or 'static': streams need a cache of ours"
            )
        if (given := model_kwargs.pop("cache", None)) is not None:
            model_kwargs[CACHE_NAME] = given
        if generation_config.use_cache and model_kwargs.get(CACHE_NAME) is None:
            rows = batch_size * max(generation_config.num_beams, generation_config.num_return_sequences)
            model_kwargs[CACHE_NAME] = (
                self._static_cache(rows, max_cache_length, model_kwargs.get("budget"))
                if named == "static"
                else StreamCache()
            )

    def _static_cache(self: Any, rows: int, longest: int, budget: Budget | list[Budget] | None) -> StreamCache:
        given = budget if isinstance(budget, list) else [budget]
        most = max(self.config.exact_budget(each) for each in given)
        cache = StaticStreamCache(rows, longest, most, self.device)
        if cache.device.type == "cuda":
            cache.graph = StepGraph(self.advance, cache)
        return cache

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
