"""The streams of one row as a table: who they are, where they were forked and deleted, what they attend to.

Shape letters: N streams, L layers, R rows of the table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from thoughtbubbles.inspection.observing import Observation
from thoughtbubbles.model.streams import Streams

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Booleans = npt.NDArray[np.bool_]

ATTENTION = ("received", "to_self", "to_forks", "to_siblings", "to_others")


@dataclass(frozen=True, eq=False)
class StreamTable:
    """A row for each layer and each stream that entered its block or that its gate deleted; columns [R].

    Layer by layer; in a layer first the streams in packed order, then the deleted ones.

    Attributes:
        layer: the block.
        token: ordinal of the stream's token.
        stream: number of the stream, the same in all layers.
        source: number of the stream that it was forked from; -1 for those that the tokens begin with.
        place: its slot among the streams of the layer; -1 if deleted there.
        is_root: whether it is its token's root.
        survives: False where the gate of this layer deleted it.
        forked: whether a fork of it was made at this layer.
        log_score: natural log of its cumulative score; where deleted, the score of its keep, which was too low.
        fork_gate, keep_gate: what the gate of this layer gave its fork and its keep, natural logs, as far down as -20
            (method: Gate); NaN where it met no gate.
        received: attention that it receives from all streams, in queries: N streams give N. Like the next four the
            mean over the heads, and NaN where deleted.
        to_self, to_forks, to_siblings, to_others: how it spreads its own attention: on itself, on the streams forked
            directly from it, on the rest of its bubble, on the streams of earlier tokens; together 1.
    """

    layer: Integers
    token: Integers
    stream: Integers
    source: Integers
    place: Integers
    is_root: Booleans
    survives: Booleans
    forked: Booleans
    log_score: Floats
    fork_gate: Floats
    keep_gate: Floats
    received: Floats
    to_self: Floats
    to_forks: Floats
    to_siblings: Floats
    to_others: Floats

    def __len__(self) -> int:
        return len(self.layer)

    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """The columns by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_columns(cls, columns: Mapping[str, Any]) -> "StreamTable":
        """The table of such columns, each of one length.

        Raises:
            KeyError: a column is missing.
        """
        return cls(**{field.name: np.asarray(columns[field.name]) for field in fields(cls)})

    def to_dict(self) -> dict[str, list[Any]]:
        """The columns as lists, None for NaN."""
        return {
            name: [None if value != value else value for value in column.tolist()]
            for name, column in self.columns().items()
        }


@dataclass(frozen=True)
class _Crowd:
    """The streams of one layer in packed order, [N] each; columns of the table."""

    stream: Integers
    token: Integers
    source: Integers
    is_root: Booleans
    log_score: Floats

    @classmethod
    def at_input(cls, tokens: int) -> "_Crowd":
        """One stream a token."""
        ordinals = np.arange(tokens)
        return cls(ordinals, ordinals, np.full(tokens, -1), np.ones(tokens, dtype=bool), np.zeros(tokens))

    def __len__(self) -> int:
        return len(self.stream)

    def rows(self, layer: int, chosen: npt.NDArray[Any] | slice = slice(None)) -> dict[str, npt.NDArray[Any]]:
        """Columns of the table for the chosen streams, without gates and attention."""
        columns = {field.name: getattr(self, field.name)[chosen] for field in fields(self)}
        return columns | {"layer": np.full(len(columns["stream"]), layer)}


def tabulate(trail: Sequence[Streams], fork_layers: Sequence[int], seen: Observation) -> StreamTable:
    """The table of one row, of the streams that enter each of L blocks and of what was seen on the way."""
    crowd = _Crowd.at_input(trail[0].num_tokens)
    born = len(crowd)
    parts: list[dict[str, npt.NDArray[Any]]] = []
    for layer, streams in enumerate(trail):
        deleted, fates = None, _no_gate(len(crowd))
        if layer in fork_layers:
            before, origin = crowd, _alive_origin(streams)
            gates = _first_row(seen.gates[layer])[: len(before)] if layer in seen.gates else None
            crowd = _after_fork(before, streams, origin, born)
            born += int((origin % 2 == 0).sum())
            fates, deleted = _fates(layer, before, origin, gates)
        weights = _first_row(seen.attention[layer])[: len(crowd), : len(crowd)]
        place, survives = np.arange(len(crowd)), np.ones(len(crowd), dtype=bool)
        alive = crowd.rows(layer) | {"place": place, "survives": survives} | fates
        parts += [alive | _attention(weights, crowd), *([] if deleted is None else [deleted])]
    names = [field.name for field in fields(StreamTable)]
    return StreamTable.from_columns({name: np.concatenate([part[name] for part in parts]) for name in names})


def _after_fork(before: _Crowd, streams: Streams, origin: Integers, born: int) -> _Crowd:
    """The streams that the candidates `origin` became; forks are numbered from `born` on."""
    is_fork, came_from = origin % 2 == 0, origin // 2
    stream, source = before.stream[came_from], before.source[came_from]
    source[is_fork] = stream[is_fork]
    stream[is_fork] = born + np.arange(is_fork.sum())
    token, is_root, log_score = (
        _first_row(each)[: len(origin)] for each in (streams.token, streams.is_root, streams.log_score.double())
    )
    return _Crowd(stream, token, source, is_root, log_score)


def _fates(
    layer: int, before: _Crowd, origin: Integers, gates: Floats | None
) -> tuple[dict[str, npt.NDArray[Any]], dict[str, npt.NDArray[Any]]]:
    """What a fork layer did: columns of the streams after it, and the rows of those that it deleted."""
    is_fork, came_from = origin % 2 == 0, origin // 2
    given = np.full((len(before), 2), np.nan) if gates is None else gates
    forked, kept = np.zeros(len(before), dtype=bool), np.zeros(len(before), dtype=bool)
    forked[came_from[is_fork]] = True
    kept[came_from[~is_fork]] = True
    met = np.where(is_fork[:, None], np.nan, given[came_from])
    fates = {"forked": forked[came_from] & ~is_fork, "fork_gate": met[:, 0], "keep_gate": met[:, 1]}
    gone = np.flatnonzero(~kept)
    deleted = before.rows(layer, gone) | {
        "place": np.full(len(gone), -1),
        "survives": np.zeros(len(gone), dtype=bool),
        "forked": forked[gone],
        "log_score": before.log_score[gone] + given[gone, 1],
        "fork_gate": given[gone, 0],
        "keep_gate": given[gone, 1],
        **dict.fromkeys(ATTENTION, np.full(len(gone), np.nan)),
    }
    return fates, deleted


def _no_gate(count: int) -> dict[str, npt.NDArray[Any]]:
    nothing = np.full(count, np.nan)
    return {"forked": np.zeros(count, dtype=bool), "fork_gate": nothing, "keep_gate": nothing}


def _attention(weights: Floats, crowd: _Crowd) -> dict[str, npt.NDArray[Any]]:
    """What each stream receives and how it spreads its own; weights [N, N], queries in rows."""
    own = crowd.source == crowd.stream[:, None]
    bubble = crowd.token == crowd.token[:, None]
    rest = bubble & ~own & ~np.eye(len(crowd), dtype=bool)
    spread = (np.where(keys, weights, 0).sum(1) for keys in (own, rest, ~bubble))
    shares = (weights.sum(0), weights.diagonal(), *spread)
    return dict(zip(ATTENTION, shares, strict=True))


def _alive_origin(streams: Streams) -> Integers:
    assert streams.origin is not None
    origin = _first_row(streams.origin)
    return origin[origin >= 0]


def _first_row(values: Tensor) -> npt.NDArray[Any]:
    """The only row of a batch, floating-point numbers as float64."""
    row = values[0].double() if values.is_floating_point() else values[0]
    return row.cpu().numpy()
