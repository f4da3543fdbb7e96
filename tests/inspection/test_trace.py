"""Traces against the slow reference, and their way to disk and back."""

import math
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F

from tests.helpers import Case, case_id, random_ids, survivors_of, tiny_model
from thoughtbubbles import BubbleTrace, ThoughtbubblesForCausalLM, trace_bubbles
from thoughtbubbles.model import reference
from thoughtbubbles.model.loading import load_model, load_tokenizer
from thoughtbubbles.model.reference import ReferenceOutput, ReferenceStream, bubble_positions, reference_forward
from thoughtbubbles.support.errors import InputError

CASES: list[Case] = [
    {"routing": "causal", "budget": 2, "attenuation": "paper"},
    {"routing": "causal", "budget": "4/3", "attenuation": "released", "merge": "root"},
    {"routing": "causal", "budget": 3.7, "attenuation": "none", "fork_layers": [0, 1, 3]},
    {"routing": "topk", "budget": 1.6, "attenuation": "paper", "merge": "probability"},
    {"routing": "topk", "budget": 2, "attenuation": "released"},
    {"routing": "random", "budget": 2.3, "attenuation": "paper"},
    {"routing": "random", "random_rule": "topk", "budget": 1.5, "attenuation": "none"},
    {"routing": "uniform", "budget": 2.5, "attenuation": "paper", "use_bias": False},
    {"routing": "causal", "budget": 1, "attenuation": "released"},
    {"routing": "none", "attenuation": "paper"},
    {"routing": "copy", "budget": 3, "copy_layer": 2},
    {"routing": "pause", "budget": 2},
    {
        "routing": "causal",
        "budget": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "qk_norm": True,
    },
    {"routing": "causal", "budget": 2, "norm": "rmsnorm", "parallel_residual": True, "partial_rotary_factor": 0.5},
    {"routing": "causal", "budget": 2, "fork_content": "attended"},
]
every_case = pytest.mark.parametrize("rules", CASES, ids=case_id)


class Letters:
    """A tokenizer whose tokens are letters."""

    bos_token_id = 0
    eos_token_id = 0
    init_kwargs: ClassVar[dict[str, Any]] = {}

    def encode(self, text: str, **_: bool) -> list[int]:
        return [ord(letter) - ord("a") for letter in text]

    def decode(self, ids: list[int], **_: bool) -> str:
        return "".join(chr(ord("a") + token) for token in ids)


def traced(model: ThoughtbubblesForCausalLM, length: int = 13) -> BubbleTrace:
    return trace_bubbles(model, Letters(), random_ids(1, length)[0])


def reference_of(model: ThoughtbubblesForCausalLM, trace: BubbleTrace) -> ReferenceOutput:
    """The reference on the same row with the model's survivors (method: Near ties)."""
    ids = torch.tensor([trace.ids])
    streams = model(ids, output_streams=True).streams
    survivors = survivors_of(streams, model.config.gated_layers)
    return reference_forward(model.config, model.state_dict(), ids, survivors=survivors)


def rows_at(trace: BubbleTrace, layer: int, alive: bool = True) -> dict[str, Any]:
    table = trace.streams
    chosen = (table.layer == layer) & (table.survives == alive)
    return {name: column[chosen] for name, column in table.columns().items()}


def reference_weights(model: ThoughtbubblesForCausalLM, layer: int, streams: list[ReferenceStream]) -> torch.Tensor:
    """[N, N] attention by the reference's own queries and keys, the mean over the heads."""
    prepared = reference._model(model.config, model.state_dict(), model.config.budget, 0)
    released = model.config.attenuation == "released" and bool(model.config.gated_layers)
    positions = bubble_positions([stream.token for stream in streams], origin=int(released))
    projected = [reference._project(prepared, layer, s, at)[:2] for s, at in zip(streams, positions, strict=True)]
    shared = model.config.num_attention_heads // model.config.num_key_value_heads
    weights = torch.zeros(len(streams), len(streams), dtype=torch.float64)
    for query, (q, _) in enumerate(projected):
        for head in range(model.config.num_attention_heads):
            logits = torch.stack([projected[key][1][head // shared] @ q[head] for key in range(query + 1)])
            logits = logits / math.sqrt(q.shape[1])
            if model.config.attenuation == "paper":
                logits = logits + torch.stack([s.log_score for s in streams[: query + 1]])
            weights[query, : query + 1] += logits.softmax(0) / model.config.num_attention_heads
    return weights


@every_case
def test_streams_scores_and_predictions_are_those_of_the_reference(rules: Case) -> None:
    model = tiny_model(**rules)
    trace = traced(model)
    expected = reference_of(model, trace)
    sizes = trace.bubble_sizes()
    for layer, streams in enumerate(expected.states[0][:-1]):
        rows = rows_at(trace, layer)
        assert rows["token"].tolist() == [stream.token for stream in streams]
        assert rows["is_root"].tolist() == [stream.is_root for stream in streams]
        assert rows["place"].tolist() == list(range(len(streams)))
        np.testing.assert_allclose(rows["log_score"], [s.log_score.item() for s in streams], atol=1e-5)
        assert sizes[layer].tolist() == [sum(s.token == t for s in streams) for t in range(13)]
    log_probs = expected.logits[0].log_softmax(-1)
    np.testing.assert_allclose(trace.entropy, -(log_probs.exp() * log_probs).sum(-1), atol=1e-4)
    losses = F.nll_loss(log_probs[:-1], torch.tensor(trace.ids[1:]), reduction="none")
    np.testing.assert_allclose(trace.surprisal, losses, atol=1e-4)


@every_case
def test_attention_is_that_of_the_reference(rules: Case) -> None:
    model = tiny_model(**rules)
    trace = traced(model)
    expected = reference_of(model, trace)
    on_forks = trace.attention_on_forks()
    for layer, streams in enumerate(expected.states[0][:-1]):
        weights, rows = reference_weights(model, layer, streams), rows_at(trace, layer)
        np.testing.assert_allclose(rows["received"], weights.sum(0), atol=1e-4)
        for token in range(13):
            forks = [i for i, s in enumerate(streams) if s.token == token and not s.is_root]
            assert on_forks[layer, token] == pytest.approx(weights[:, forks].sum().item(), abs=1e-4)
        for query, row in enumerate(weights):
            kinds = {"to_self": 0.0, "to_forks": 0.0, "to_siblings": 0.0, "to_others": 0.0}
            for key, weight in enumerate(row.tolist()):
                if key == query:
                    kind = "to_self"
                elif streams[key].token != streams[query].token:
                    kind = "to_others"
                else:
                    kind = "to_forks" if rows["source"][key] == rows["stream"][query] else "to_siblings"
                kinds[kind] += weight
            assert {kind: rows[kind][query] for kind in kinds} == pytest.approx(kinds, abs=1e-4)


@pytest.mark.parametrize("rules", [case for case in CASES if case["routing"] not in ("none", "copy", "pause")])
def test_gates_and_fates_are_those_of_the_reference(rules: Case) -> None:
    model = tiny_model(**rules)
    trace = traced(model)
    forks = reference_of(model, trace).forks[0]
    for layer, fork in forks.items():
        table = trace.streams
        came = np.flatnonzero((table.layer == layer) & ~np.isnan(table.keep_gate))
        before = rows_at(trace, layer - 1) if layer else {"stream": np.arange(13), "log_score": np.zeros(13)}
        assert sorted(table.stream[came]) == sorted(before["stream"])
        row_of = {int(table.stream[row]): row for row in came}
        for index, (number, score) in enumerate(zip(before["stream"], before["log_score"], strict=True)):
            row = row_of[int(number)]
            expected = fork.candidate_scores[2 * index : 2 * index + 2].tolist()
            gates = [table.fork_gate[row], table.keep_gate[row]]
            assert [score + gate for gate in gates] == pytest.approx(expected, abs=1e-5)
            assert table.log_score[row] == pytest.approx(expected[1], abs=1e-5)
            assert table.forked[row] == (2 * index in fork.survivors)
            assert table.survives[row] == (2 * index + 1 in fork.survivors)


@every_case
def test_lifetimes_make_a_tree_that_ends_in_the_final_bubble(rules: Case) -> None:
    model = tiny_model(**rules)
    trace = traced(model)
    sizes = trace.bubble_sizes()
    for token in range(13):
        streams = {each.stream: each for each in trace.lifetimes(token)}
        roots = [each for each in streams.values() if each.source is None]
        assert [(each.stream, each.forked_at, each.deleted_at, each.is_root) for each in roots] == [
            (token, 0, None, True)
        ]
        for each in streams.values():
            if each.source is not None:
                source = streams[each.source]
                assert each.forked_at in trace.fork_layers
                assert source.forked_at < each.forked_at or source.forked_at == 0
                assert source.deleted_at is None or source.deleted_at >= each.forked_at
        for layer in range(trace.num_layers):
            living = [e for e in streams.values() if e.forked_at <= layer and layer < (e.deleted_at or 99)]
            assert len(living) == sizes[layer, token]


def test_routings_without_gates_have_none() -> None:
    dense, copies = traced(tiny_model(routing="none")), traced(tiny_model(routing="copy", budget=3, copy_layer=2))
    assert (dense.bubble_sizes() == 1).all()
    assert (dense.attention_on_forks() == 0).all()
    assert copies.bubble_sizes().tolist() == [[1] * 13, [1] * 13, [3] * 13, [3] * 13]
    for trace in (dense, copies):
        assert np.isnan(trace.streams.fork_gate).all()
        assert (trace.streams.log_score == 0).all()


def test_the_budget_is_that_of_the_call() -> None:
    model = tiny_model(budget=2)
    assert traced(model).budget == "2"
    at_one = trace_bubbles(model, Letters(), "abc", budget=1)
    assert (at_one.budget, at_one.bubble_sizes().max()) == ("1", 1)


def test_text_begins_like_a_document_and_ids_are_taken_as_they_are() -> None:
    model = tiny_model()
    assert trace_bubbles(model, Letters(), "cab").tokens == ["a", "c", "a", "b"]
    assert trace_bubbles(model, Letters(), [2, 0, 1]).ids == [2, 0, 1]
    one = trace_bubbles(model, Letters(), torch.tensor([3]))
    assert (one.surprisal, len(one.entropy)) == ([], 1)


def test_tracing_leaves_the_model_as_it_was() -> None:
    model = tiny_model().train()
    before = model(random_ids(1, 9)).logits
    trace = traced(model)
    assert model.training
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert torch.equal(model(random_ids(1, 9)).logits, before)
    assert trace.to_dict() == traced(model.eval()).to_dict()


@pytest.mark.parametrize("rules", [CASES[0], CASES[2], CASES[9], CASES[10]], ids=case_id)
def test_parquet_gives_back_what_it_was_given(tmp_path: Path, rules: Case) -> None:
    trace = traced(tiny_model(**rules))
    trace.save(tmp_path / "trace.parquet")
    loaded = BubbleTrace.load(tmp_path / "trace.parquet")
    assert loaded.to_dict() == trace.to_dict()
    for name, column in trace.streams.columns().items():
        other = loaded.streams.columns()[name]
        assert column.dtype == other.dtype
        np.testing.assert_array_equal(column, other)
    assert [path.name for path in tmp_path.iterdir()] == ["trace.parquet"]


def test_dataframe_has_a_row_a_stream_and_layer() -> None:
    trace = traced(tiny_model())
    frame = trace.to_dataframe()
    assert len(frame) == len(trace.streams)
    row = frame[(frame.layer == 2) & (frame.token == 5) & frame.is_root].iloc[0]
    assert (row.text, row.entropy, row.surprisal) == (trace.tokens[5], trace.entropy[5], trace.surprisal[5])
    assert frame[frame.token == 12].surprisal.isna().all()


@pytest.mark.parametrize("content", ["none", "text", "stranger"])
def test_loading_something_else_says_so(tmp_path: Path, content: str) -> None:
    path = tmp_path / "trace.parquet"
    if content == "text":
        path.write_text("no Parquet at all")
    elif content == "stranger":
        pq.write_table(pa.table({"layer": [1]}), path)
    with pytest.raises(InputError, match=r"trace .*trace\.parquet: .+"):
        BubbleTrace.load(path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "text of 0 tokens: expected from 1 to 512"),
        ([1] * 513, "text of 513 tokens"),
        ([1, 19], "token 19: expected an id below the model's vocabulary of 19"),
        ([-1], "token -1"),
        (torch.zeros(2, 3, dtype=torch.int64), r"ids of shape \(2, 3\): expected one row"),
    ],
)
def test_bad_rows(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trace_bubbles(tiny_model(), Letters(), given)


def test_bad_budget_and_token() -> None:
    with pytest.raises(ValueError, match=r"budget=0\.5: expected"):
        trace_bubbles(tiny_model(), Letters(), "abc", budget=0.5)
    with pytest.raises(ValueError, match="token=13: expected one from 0 to 12"):
        traced(tiny_model()).lifetimes(13)


@pytest.mark.parametrize("attenuation", ["paper", "released"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float64, 1e-5)])
def test_other_types_of_numbers(attenuation: str, dtype: torch.dtype, tolerance: float) -> None:
    model = tiny_model(budget=1, attenuation=attenuation)  # survivors do not depend on rounding
    expected = traced(model)
    trace = traced(model.to(dtype))
    np.testing.assert_allclose(trace.streams.received, expected.streams.received, atol=tolerance * 13)
    shares = [getattr(trace.streams, f"to_{kind}") for kind in ("self", "forks", "siblings", "others")]
    np.testing.assert_allclose(np.sum(shares, axis=0), 1, atol=1e-6)


def test_a_trained_model_and_its_tokenizer(tiny_run: Path) -> None:
    model, tokenizer = load_model(tiny_run), load_tokenizer(tiny_run)
    trace = trace_bubbles(model, tokenizer, "the root of", budget=2)
    assert "".join(trace.tokens[1:]) == "the root of"
    assert trace.bubble_sizes().max() > 1


def test_blocks_that_are_applied_twice_are_seen_twice() -> None:
    model = tiny_model(routing="none", fork_layers=[], num_loops=2)
    found = trace_bubbles(model, Letters(), "abc")
    assert found.num_layers == 8
    assert sorted(set(found.streams.layer.tolist())) == list(range(8))
    first, second = (found.streams.to_self[found.streams.layer == layer] for layer in (0, 4))
    assert not np.allclose(first, second)
