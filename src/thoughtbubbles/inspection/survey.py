"""Statistics over a corpus: where a model forks, what it attends to there, and what the forks are worth."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from thoughtbubbles.inspection.ablation import ablate
from thoughtbubbles.inspection.observing import evaluating
from thoughtbubbles.inspection.trace import BubbleTrace, describe_setting, predictions, trace_bubbles
from thoughtbubbles.inspection.words import KINDS, OTHER, split_words
from thoughtbubbles.model.budget import Budget
from thoughtbubbles.model.modeling import ThoughtbubblesForCausalLM
from thoughtbubbles.support.statistics import CONFIDENCE, Array, Curve, banded_means, means_at, means_by_name, windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ATTENDED = ("self", "forks", "siblings", "others")
WINDOW = 4
LAGS = 16
BINS = 10


@dataclass(frozen=True)
class CorpusStatistics:
    """What a model does with its streams over many blocks.

    The bubble size of a token is the mean of its streams over the blocks from the first fork layer on. Entropy is that
    of the prediction made at a token, surprisal that of the token which comes next. Curves of windows average both
    over 4 tokens before they are binned, as the paper does; bins hold about equally many tokens.

    Attributes:
        routing, budget: of the model and of the call.
        leaks: whether early tokens see later ones.
        blocks, tokens: how much was read.
        loss: of the model, in nats per token; where it leaks not that of a left-to-right model.
        reference_loss: of the independent model, if there is one.
        confidence: of all bands, bootstrapped over blocks.
        size_by_entropy, size_by_surprisal: bubble size; `model` and `reference` say who measured, `model, windows of 4`
            and `reference, windows of 4` that windows were averaged.
        attention: of the roots that have forks, by layer: the share on the root itself (`self`), on the `forks` made
            directly from it, on their `siblings` in the bubble, which are forks of forks, and on the streams of
            earlier tokens (`others`).
        attention_per_stream: the same share for each of the streams that it falls on.
        streams_by_layer: streams of a token.
        size_by_position: bubble size by the token's place in its block.
        size_by_word_frequency: by occurrences of the token's word in a million, one added to its count.
        size_by_piece: for first and later pieces of words, and for what is no word.
        ablation: how much surprisal grows, in nats, so many tokens after one whose forks are all deleted; None for a
            model without gates.
    """

    routing: str
    leaks: bool
    budget: str
    blocks: int
    tokens: int
    loss: float
    reference_loss: float | None
    size_by_entropy: dict[str, Curve]
    size_by_surprisal: dict[str, Curve]
    attention: dict[str, Curve]
    attention_per_stream: dict[str, Curve]
    streams_by_layer: Curve
    size_by_position: Curve
    size_by_word_frequency: Curve
    size_by_piece: Curve
    ablation: Curve | None
    confidence: float = CONFIDENCE

    @property
    def setting(self) -> str:
        """What ran, for a title: `dense`, or the routing with its budget."""
        return describe_setting(self.routing, self.budget, self.leaks)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON knows it."""
        return asdict(self)


@dataclass
class _Gathered:
    """What each block showed, a place in each list for each block."""

    size: list[Array] = field(default_factory=list)  # [T] bubble size
    streams: list[Array] = field(default_factory=list)  # [L] streams in a block
    entropy: list[list[float]] = field(default_factory=list)
    surprisal: list[list[float]] = field(default_factory=list)
    reference_entropy: list[list[float]] = field(default_factory=list)
    reference_surprisal: list[list[float]] = field(default_factory=list)
    attention: list[Array] = field(default_factory=list)  # [kinds, 3, L] sums of shares, of streams, of roots
    kinds: list[list[str]] = field(default_factory=list)
    frequency: list[list[float]] = field(default_factory=list)
    ablation: list[Array] = field(default_factory=list)  # [2, lags] sums of changes and their number


def gather_statistics(
    model: ThoughtbubblesForCausalLM,
    tokenizer: "PreTrainedTokenizerBase",
    blocks: Tensor,
    word_counts: Mapping[str, int] | None = None,
    budget: Budget | None = None,
    reference: ThoughtbubblesForCausalLM | None = None,
    ablations: int = 4,
    on_progress: Callable[[int], None] | None = None,
) -> CorpusStatistics:
    """Trace every block and sum up.

    Args:
        blocks: [n, T] int64.
        word_counts: occurrences of words in some larger text; None counts those of the blocks.
        budget: streams per token, in place of the model's own.
        reference: an independent dense model of the same tokens, to measure entropy and surprisal too.
        ablations: tokens of each block, drawn from those with forks, whose forks are deleted.
        on_progress: called with the number of tokens read since the last call.

    Raises:
        ValueError: for no blocks, or as `trace_bubbles`.
    """
    if blocks.dim() != 2 or blocks.shape[0] == 0 or blocks.shape[1] < WINDOW + 1:
        raise ValueError(
            f"blocks of shape {tuple(blocks.shape)}: expected at least one of at least {WINDOW + 1} tokens"
        )
    gathered = _Gathered()
    pieces: list[list[str]] = []
    for index, ids in enumerate(blocks):
        trace = trace_bubbles(model, tokenizer, ids, budget)
        pieces.append(trace.tokens)
        _gather(gathered, trace)
        if reference is not None:
            _measure(gathered, reference, ids)
        if model.config.gated_layers:
            gathered.ablation.append(_ablate_some(model, trace, ablations, index))
        if on_progress is not None:
            on_progress(len(ids))
    _add_words(gathered, pieces, word_counts)
    return _sum_up(gathered, trace)


def _gather(gathered: _Gathered, trace: BubbleTrace) -> None:
    sizes = trace.bubble_sizes()
    gathered.size.append(sizes[min(trace.fork_layers, default=0) :].mean(0))
    gathered.streams.append(sizes.sum(1).astype(float))
    gathered.entropy.append(trace.entropy)
    gathered.surprisal.append([*trace.surprisal, np.nan])
    gathered.attention.append(_attention_of_roots(trace))


def _attention_of_roots(trace: BubbleTrace) -> Array:
    """[kinds, 3, L]: of the roots with forks the summed shares, the streams that they fall on, and the roots."""
    table = trace.streams
    sizes = trace.bubble_sizes()
    alive = np.flatnonzero(table.survives)
    forks = Counter(zip(table.layer[alive].tolist(), table.source[alive].tolist(), strict=True))
    earlier = np.concatenate([np.zeros((len(sizes), 1), dtype=int), sizes.cumsum(1)[:, :-1]], axis=1)
    sums = np.zeros((len(ATTENDED), 3, trace.num_layers))
    for row in alive[table.is_root[alive]]:
        layer, token = table.layer[row], table.token[row]
        if sizes[layer, token] == 1:
            continue
        own = forks[int(layer), int(table.stream[row])]
        streams = (1, own, sizes[layer, token] - 1 - own, earlier[layer, token])
        for kind, count in enumerate(streams):
            share = getattr(table, f"to_{ATTENDED[kind]}")[row]
            sums[kind, :, layer] += (share, count, 1)
    return sums


def _measure(gathered: _Gathered, reference: ThoughtbubblesForCausalLM, ids: Tensor) -> None:
    row = ids[None].to(reference.device)
    with evaluating(reference):
        entropy, surprisal = predictions(reference(row).logits, row)
    gathered.reference_entropy.append(entropy[0].tolist())
    gathered.reference_surprisal.append([*surprisal[0].tolist(), np.nan])


def _ablate_some(model: ThoughtbubblesForCausalLM, trace: BubbleTrace, count: int, seed: int) -> Array:
    """[2, lags]: summed changes and how many there are, for some tokens with forks of one block."""
    able = np.flatnonzero(trace.bubble_sizes().max(0)[:-1] > 1)
    chosen = np.random.default_rng(seed).permutation(able)[:count]
    made = ablate(model, trace.ids, sorted(chosen.tolist()), trace.budget)
    changes = [made.at_lag(lag) for lag in range(LAGS)]
    return np.array([[sum(change) for change in changes], [len(change) for change in changes]], dtype=float)


def _add_words(gathered: _Gathered, pieces: Sequence[Sequence[str]], counts: Mapping[str, int] | None) -> None:
    split = [split_words(row) for row in pieces]
    if counts is None:
        counts = Counter(
            word for kinds, words in split for kind, word in zip(kinds, words, strict=True) if kind == KINDS[0]
        )
    million = (sum(counts.values()) + 1) / 1e6
    for kinds, words in split:
        gathered.kinds.append(kinds)
        gathered.frequency.append(
            [
                np.nan if kind == OTHER else (counts.get(word, 0) + 1) / million
                for kind, word in zip(kinds, words, strict=True)
            ]
        )


def _sum_up(gathered: _Gathered, trace: BubbleTrace) -> CorpusStatistics:
    size, surprisal = np.array(gathered.size), np.array(gathered.surprisal)
    blocks, tokens = size.shape
    place = np.broadcast_to(np.arange(float(tokens)), size.shape)
    attention, ablation = np.array(gathered.attention), np.array(gathered.ablation)
    layers = list(range(trace.num_layers))
    measured = [("model", gathered.entropy, gathered.surprisal)]
    if gathered.reference_entropy:
        measured.append(("reference", gathered.reference_entropy, gathered.reference_surprisal))
    return CorpusStatistics(
        routing=trace.routing,
        leaks=trace.leaks,
        budget=trace.budget,
        blocks=blocks,
        tokens=size.size,
        loss=float(np.nanmean(surprisal)),
        reference_loss=float(np.nanmean(gathered.reference_surprisal)) if gathered.reference_surprisal else None,
        size_by_entropy=_by_uncertainty({name: np.array(entropy) for name, entropy, _ in measured}, size),
        size_by_surprisal=_by_uncertainty({name: np.array(values) for name, _, values in measured}, size),
        attention=_by_layer(attention[:, :, 0], attention[:, :, 2], layers),
        attention_per_stream=_by_layer(attention[:, :, 0], attention[:, :, 1], layers),
        streams_by_layer=banded_means(layers, gathered.streams, np.full((blocks, len(layers)), tokens)),
        size_by_position=means_at(place, size, min(2 * BINS, tokens)),
        size_by_word_frequency=means_at(np.array(gathered.frequency), size, BINS),
        size_by_piece=means_by_name(np.array(gathered.kinds), size, KINDS),
        ablation=banded_means(list(range(LAGS)), ablation[:, 0], ablation[:, 1]) if len(ablation) else None,
    )


def _by_uncertainty(measures: Mapping[str, Array], size: Array) -> dict[str, Curve]:
    """Bubble size by each measure [blocks, T], for tokens and for windows."""
    curves = {}
    for name, values in measures.items():
        curves[name] = means_at(values, size, BINS)
        curves[f"{name}, windows of {WINDOW}"] = means_at(windows(values, WINDOW), windows(size, WINDOW), BINS)
    return curves


def _by_layer(sums: Array, counts: Array, layers: Sequence[int]) -> dict[str, Curve]:
    """A curve for each kind of stream that attention falls on; sums and counts [blocks, kinds, L]."""
    return {kind: banded_means(layers, sums[:, i], counts[:, i]) for i, kind in enumerate(ATTENDED)}
