"""What `generate` of transformers has to know about streams (Design 3.8)."""

import inspect
from typing import Any

from transformers import GenerationConfig, GenerationMixin
from transformers.utils.generic import ModelOutput

from .cache import StreamCache
from .configuration import ThoughtbubblesConfig

# Renamed in transformers 5.24.
CACHE_NAME = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)
"""What `generate` of the installed transformers calls the cache that it hands on."""


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
        if from_embeddings and settings.use_cache is False and self.config.admission_rule == "topk":
            raise ValueError(
                "use_cache=False with inputs_embeds: expected input_ids, since `generate` continues embeddings with a "
                "cache alone, where topk routes causally"
            )
        return settings, model_kwargs

    def _prepare_cache_for_generation(  # type: ignore[override]  # its other arguments change with the version
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Start with an empty cache of ours, unless there is one or `generate` was told to use none."""
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r}: expected None, since streams need "
                "a StreamCache"
            )
        if (given := model_kwargs.pop("cache", None)) is not None:
            model_kwargs[CACHE_NAME] = given
        if generation_config.use_cache and model_kwargs.get(CACHE_NAME) is None:
            model_kwargs[CACHE_NAME] = StreamCache()

    def _update_model_kwargs_for_generation(
        self, outputs: ModelOutput, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Hand the cache on to the next pass under the name that `generate` looks for."""
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        if outputs.get("cache") is not None:
            model_kwargs[CACHE_NAME] = outputs["cache"]
        return model_kwargs


def refuse_unknown(kwargs: dict[str, Any]) -> None:
    """transformers passes arguments on freely; one that asks for something must not be ignored."""
    kwargs.pop("tokenizer", None)  # which `generate` needs for stop strings and hands on
    unused = [name for name, value in kwargs.items() if value is not None and value is not False]
    if unused:
        raise ValueError(f"{', '.join(unused)}: not an argument of a Thoughtbubbles model")
