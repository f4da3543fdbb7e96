"""The trace of a text: which streams every token carries through the layers, and what the model predicts from them.

Shape letters: T tokens, N streams, L layers, R rows of a stream table.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from thoughtbubbles.inspection.observing import evaluating, observing
from thoughtbubbles.inspection.stream_table import StreamTable, tabulate
from thoughtbubbles.model.budget import Budget, budget_text
from thoughtbubbles.model.modeling import ThoughtbubblesForCausalLM
from thoughtbubbles.support.errors import InputError, one_line
from thoughtbubbles.support.files import replacing
from thoughtbubbles.support.text import encode_text, start_document, token_pieces

if TYPE_CHECKING:
    from pandas import DataFrame
    from transformers import PreTrainedTokenizerBase

_METADATA = b"thoughtbubbles.trace"
_FORMAT = 1


@dataclass(frozen=True)
class Lifetime:
    """One stream of a trace from its fork to its end.

    Attributes:
        stream: its number in the trace.
        token: ordinal of its token.
        source: the stream that it was forked from; None for one that a token begins with.
        forked_at: the layer that it enters first: the fork layer that made it, or 0.
        deleted_at: the fork layer that deleted it; None if it lives to the end.
        is_root: whether it is the root.
    """

    stream: int
    token: int
    source: int | None
    forked_at: int
    deleted_at: int | None
    is_root: bool


@dataclass(frozen=True)
class BubbleTrace:
    """Where a model thinks over one text.

    Attributes:
        tokens: T, the text of each token.
        ids: T, their ids.
        routing: of the model.
        leaks: whether an early token's streams depend on later tokens.
        budget: streams per token, as text.
        num_layers: L; where blocks are applied several times, each time counts.
        fork_layers: the layers at whose input streams may be made.
        entropy: T, of the next-token distribution at each token, in nats.
        surprisal: T - 1, of the token that does come next, in nats; the last token has none.
        streams: a row for each layer and stream.
    """

    tokens: list[str]
    ids: list[int]
    routing: str
    leaks: bool
    budget: str
    num_layers: int
    fork_layers: list[int]
    entropy: list[float]
    surprisal: list[float]
    streams: StreamTable

    @property
    def setting(self) -> str:
        """What ran, for a title: `dense`, or the routing with its budget."""
        return describe_setting(self.routing, self.budget, self.leaks)

    def bubble_sizes(self) -> npt.NDArray[np.int64]:
        """[L, T] streams of each token in each block."""
        return self._sum_over_bubbles(np.ones(len(self.streams), dtype=np.int64))

    def attention_on_forks(self) -> npt.NDArray[np.float64]:
        """[L, T] attention that each token's forks receive in each block, in queries: all N streams together give N."""
        return self._sum_over_bubbles(np.where(self.streams.is_root, 0, self.streams.received))

    def lifetimes(self, token: int | None = None) -> list[Lifetime]:
        """The streams of one token, or of all, by their number: the family tree.

        Raises:
            ValueError: for a token that the text does not have.
        """
        if token is not None and not 0 <= token < len(self.tokens):
            raise ValueError(f"token={token}: expected one from 0 to {len(self.tokens) - 1}")
        table = self.streams
        numbers, first = np.unique(table.stream, return_index=True)
        deleted = {int(table.stream[row]): int(table.layer[row]) for row in np.flatnonzero(~table.survives)}
        found = [
            Lifetime(
                stream=int(number),
                token=int(table.token[row]),
                source=None if table.source[row] < 0 else int(table.source[row]),
                forked_at=int(table.layer[row]),
                deleted_at=deleted.get(int(number)),
                is_root=bool(table.is_root[row]),
            )
            for number, row in zip(numbers, first, strict=True)
        ]
        return [each for each in found if token is None or each.token == token]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON knows it: lists, and None where there is no number."""
        return {**self._header(), "streams": self.streams.to_dict()}

    def to_dataframe(self) -> "DataFrame":
        """The stream table as a pandas frame, R rows, with the text, entropy and surprisal of each row's token."""
        import pandas as pd

        token = self.streams.token
        surprisal = np.array([*self.surprisal, np.nan])
        frame = pd.DataFrame(self.streams.columns())
        return frame.assign(
            text=[self.tokens[t] for t in token], entropy=np.array(self.entropy)[token], surprisal=surprisal[token]
        )

    def save(self, path: str | Path) -> None:
        """Write a Parquet file: the stream table, and the rest as JSON in its metadata."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        header = json.dumps({"format": _FORMAT, **self._header()}).encode()
        table = pa.table(self.streams.columns()).replace_schema_metadata({_METADATA: header})
        with replacing(Path(path)) as partial:
            pq.write_table(table, partial)

    @classmethod
    def load(cls, path: str | Path) -> "BubbleTrace":
        """Read what `save` wrote; nothing is lost on the way.

        Raises:
            InputError: no such file, or not a trace.
        """
        import pyarrow.parquet as pq

        try:
            table = pq.read_table(Path(path))
            header = json.loads((table.schema.metadata or {})[_METADATA])
            if header.pop("format") != _FORMAT:
                raise ValueError(f"expected format {_FORMAT}")
            return cls(**header, streams=StreamTable.from_columns({c: table[c].to_numpy() for c in table.column_names}))
        except KeyError:
            raise InputError(f"trace {path}: expected a Parquet file that a trace was saved to") from None
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"trace {path}: {one_line(error)}") from None

    def _header(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "streams"}

    def _sum_over_bubbles(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        alive = self.streams.survives
        sums = np.zeros((self.num_layers, len(self.tokens)), dtype=values.dtype)
        np.add.at(sums, (self.streams.layer[alive], self.streams.token[alive]), values[alive])
        return sums


def trace_bubbles(
    model: ThoughtbubblesForCausalLM,
    tokenizer: "PreTrainedTokenizerBase",
    text_or_ids: str | Sequence[int] | Tensor,
    budget: Budget | None = None,
) -> BubbleTrace:
    """Run one text and note where the model forks and deletes.

    The model runs once, observed by hooks; its attention is computed a second time, in matrices of N x N.

    Args:
        text_or_ids: a text, in front of which the document separator is put, as in the training data; or the ids of
            one row [T], taken as they are.
        budget: streams per token, in place of the model's own.

    Raises:
        ValueError: for no tokens at all, more than the model takes, ids outside its vocabulary, or a bad budget.
    """
    ids = to_ids(tokenizer, text_or_ids)
    check_row(model, ids)
    kappa = model.config.exact_budget(budget)
    with evaluating(model), observing(model) as seen:
        row = torch.tensor([ids], device=model.device)
        out = model(row, budget=kappa, output_streams=True)
        entropy, surprisal = predictions(out.logits, row)
    fork_layers = [*model.config.gated_layers, *model.config.copied_layers]
    return BubbleTrace(
        tokens=token_pieces(tokenizer, ids),
        ids=ids,
        routing=model.config.routing,
        leaks=model.config.leaks,
        budget=str(kappa),
        num_layers=model.config.depth,
        fork_layers=fork_layers,
        entropy=entropy[0].tolist(),
        surprisal=surprisal[0].tolist(),
        streams=tabulate(out.streams[:-1], fork_layers, seen),
    )


def describe_setting(routing: str, budget: Budget, leaks: bool) -> str:
    """What ran, for a title: `dense`, or the routing with its budget and, where there is one, its leak."""
    if routing == "none":
        return "dense"
    leak = "; early tokens see later ones" if leaks else ""
    return f"{routing}, budget {budget_text(budget)}{leak}"


def predictions(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy [B, T] and surprisal of the next token [B, T - 1], in nats; logits [B, T, V], ids [B, T]."""
    log_probs = logits.float().log_softmax(-1)
    surprisal = -log_probs[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    return torch.special.entr(log_probs.exp()).sum(-1), surprisal


def to_ids(tokenizer: "PreTrainedTokenizerBase", text_or_ids: str | Sequence[int] | Tensor) -> list[int]:
    """The ids of a text, the document separator in front, or given ids [T] as a list.

    Raises:
        ValueError: for ids that are not one row.
    """
    if isinstance(text_or_ids, str):
        ids: list[int] = start_document(tokenizer) + encode_text(tokenizer, text_or_ids)
        return ids
    if isinstance(text_or_ids, Tensor) and text_or_ids.dim() != 1:
        raise ValueError(f"ids of shape {tuple(text_or_ids.shape)}: expected one row, [T]")
    return [int(token) for token in text_or_ids]


def check_row(model: ThoughtbubblesForCausalLM, ids: Sequence[int]) -> None:
    """Check that a model can read one row of ids.

    Raises:
        ValueError: no ids, more than the model takes, or some outside its vocabulary.
    """
    longest, size = model.config.max_position_embeddings, model.config.vocab_size
    if not 0 < len(ids) <= longest:
        raise ValueError(f"text of {len(ids)} tokens: expected from 1 to {longest}")
    strangers = [token for token in ids if not 0 <= token < size]
    if strangers:
        raise ValueError(f"token {strangers[0]}: expected an id below the model's vocabulary of {size}")


def family_order(family: Sequence[Lifetime]) -> list[Lifetime]:
    """The streams of one token from left to right: each fork directly left of its source, the root last."""
    ordered = [each for each in family if each.source is None]
    for fork in sorted((each for each in family if each.source is not None), key=lambda each: each.stream):
        source = next(i for i, each in enumerate(ordered) if each.stream == fork.source)
        ordered.insert(source, fork)
    return ordered
