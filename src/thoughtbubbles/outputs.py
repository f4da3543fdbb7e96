"""What the models return."""

from dataclasses import dataclass
from operator import attrgetter

from torch import Tensor
from transformers.utils.generic import ModelOutput

from .cache import StreamCache
from .columns import ColumnMap
from .streams import Streams


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
        merge_is_weighted: whether the merge weighs them by p (Design 3.6).
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
