"""Candidates that tie but for rounding: batch, padding and cache choose as the whole row does (method: Routing)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import survivors_of, tiny_model
from thoughtbubbles.model import routing
from thoughtbubbles.model.cache import StreamCache
from thoughtbubbles.model.modeling import ThoughtbubblesForCausalLM

ROWS, LENGTH, VOCABULARY = 400, 14, 19
CHUNKS = [5, 1, 1, 4, 3]
Model = ThoughtbubblesForCausalLM
Way = Callable[[Model, Tensor], Tensor]


def repeating_rows() -> Tensor:
    """[ROWS, LENGTH]: half begin with one token two to seven times, half draw from few tokens as Zipf's law has it."""
    draw = torch.Generator().manual_seed(5)
    heads = torch.randint(VOCABULARY, (ROWS // 2, LENGTH), generator=draw)
    repeats = 2 + torch.arange(ROWS // 2)[:, None] % 6
    heads = torch.where(torch.arange(LENGTH) < repeats, heads[:, :1], heads)
    law = 1 / torch.arange(1.0, VOCABULARY + 1)
    zipf = torch.multinomial(law.expand(ROWS // 2, -1), LENGTH, replacement=True, generator=draw)
    return torch.cat([heads, zipf])


def whole(model: Model, ids: Tensor) -> Tensor:
    return torch.cat([model(rows).logits for rows in ids.split(40)])


def alone(model: Model, ids: Tensor) -> Tensor:
    """Every fourth row by itself, the others three together."""
    return torch.cat([model(rows).logits for rows in ids.split([1, 3] * (len(ids) // 4))])


def padded(model: Model, ids: Tensor) -> Tensor:
    """Each row among 4 columns of padding: left, right, or in holes."""
    logits = torch.empty(*ids.shape, VOCABULARY, dtype=model.dtype)
    for place, columns in enumerate((slice(0, 4), slice(-4, None), slice(3, 11, 2))):
        mask = torch.ones(len(ids[place::3]), LENGTH + 4, dtype=torch.int64)
        mask[:, columns] = 0
        spread = torch.zeros_like(mask)
        spread[mask.bool()] = ids[place::3].flatten()
        found = model(spread, attention_mask=mask).logits
        logits[place::3] = found[mask.bool()].view(-1, LENGTH, VOCABULARY)
    return logits


def cached(model: Model, ids: Tensor, chunks: list[int] | None = None) -> Tensor:
    cache = StreamCache()
    return torch.cat([model(each, cache=cache).logits for each in ids.split(chunks or [1] * LENGTH, dim=1)], dim=1)


def chunked(model: Model, ids: Tensor) -> Tensor:
    return cached(model, ids, CHUNKS)


def cached_alone(model: Model, ids: Tensor) -> Tensor:
    """Every 50th row by itself, the others as they are in a batch."""
    found = cached(model, ids)
    for row in range(0, len(ids), 50):
        found[row] = cached(model, ids[row : row + 1])[0]
    return found


RECOMPUTING: list[Way] = [alone, padded]
CACHING: list[Way] = [cached_alone, chunked]


@torch.no_grad()
def rows_that_leave(model: Model, ways: list[Way], tolerance: float) -> dict[str, int]:
    """How many rows have other logits than the whole forward, by each way."""
    ids = repeating_rows()
    expected = whole(model, ids)
    differences = {way.__name__: (way(model, ids) - expected).abs().flatten(1).amax(1) for way in ways}
    return {name: int((difference > tolerance).sum()) for name, difference in differences.items()}


@pytest.mark.parametrize(
    ("fields", "ways"),
    [
        ({"fork_layers": [1, 2, 3]}, [*RECOMPUTING, *CACHING]),
        ({"fork_layers": [0, 2]}, [*RECOMPUTING, *CACHING]),
        ({"fork_layers": [0, 1], "gate_scores": "fixed", "fork_embedding": "relative"}, CACHING),
        pytest.param({"fork_layers": [1, 2, 3], "gate_scores": "forks"}, CACHING, marks=pytest.mark.long),
        ({"fork_layers": [1, 2, 3], "fork_content": "attended"}, [padded, *CACHING]),
        ({"fork_layers": [1, 2], "routing": "threshold"}, [padded, *CACHING]),
        pytest.param({"fork_layers": [0, 2], "routing": "topk"}, RECOMPUTING, marks=pytest.mark.long),
        pytest.param({"fork_layers": [0, 1], "routing": "random"}, [padded, *CACHING], marks=pytest.mark.long),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_no_row_leaves_the_whole_forward(fields: dict[str, Any], ways: list[Way], float64: None) -> None:
    found = rows_that_leave(tiny_model(budget=1.5, **fields), ways, 1e-9)
    assert not any(found.values()), found


@pytest.mark.parametrize("fork_layers", [[1, 2, 3], [0, 2]], ids=str)
def test_few_rows_leave_it_in_float32(fork_layers: list[int], record_property: Callable[[str, object], None]) -> None:
    """Those of which a line of the grid runs between two roundings of one score: at most a tenth, of 40 in 100."""
    found = rows_that_leave(tiny_model(budget=1.5, fork_layers=fork_layers), [padded, chunked], 1e-4)
    record_property("rows that leave", found)
    assert all(count <= ROWS // 10 for count in found.values()), found


@torch.no_grad()
def test_the_grid_is_too_fine_to_choose(float64: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no token repeats, fewer than 1 in 1,000 survivors are others than those of a grid 256 times as fine."""
    model = tiny_model(budget=1.5, fork_layers=[1, 2, 3])
    draw = torch.Generator().manual_seed(6)
    ids = torch.stack([torch.randperm(VOCABULARY, generator=draw) for _ in range(ROWS)])

    def survivors() -> list[dict[int, list[int]]]:
        return survivors_of(model(ids, output_streams=True).streams, [1, 2, 3])

    coarse = survivors()
    monkeypatch.setattr(routing, "GRID", routing.GRID / 256)
    fine = survivors()
    changed = sum(len(set(a[layer]) - set(b[layer])) for a, b in zip(coarse, fine, strict=True) for layer in a)
    assert changed < 0.001 * sum(len(chosen) for row in fine for chosen in row.values())
