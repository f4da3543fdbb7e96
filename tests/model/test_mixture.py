"""The merge `probability`: loss in chunks, logits row by row, the streams of some columns alone."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from tests.helpers import padding_mask, random_ids, relative_errors, survivors_of, tiny_model
from tests.model.test_attention import record
from tests.model.test_streams import batches, build
from thoughtbubbles import ThoughtbubblesForCausalLM
from thoughtbubbles.model import loss as loss_module
from thoughtbubbles.model import mixture as mixture_module
from thoughtbubbles.model.cache import StreamCache
from thoughtbubbles.model.loss import IGNORE_INDEX, Bubbles, chunked_next_token_loss, chunked_token_losses
from thoughtbubbles.model.reference import reference_forward
from thoughtbubbles.model.streams import Streams

VOCABULARY, HIDDEN = 23, 6
Case = dict[str, Any]


# --- The loss in chunks ---


def losses_of_loops(
    hidden: Tensor, matrix: Tensor, targets: Tensor, log_score: Tensor, sizes: list[list[int]]
) -> list[Tensor]:
    """Minus log of the mixed probability of each bubble's target, bubble by bubble."""
    found = []
    for row, bubbles in enumerate(sizes):
        end = 0
        for size in bubbles:
            mine, end = slice(end, end + size), end + size
            target = targets[row, mine][0]
            if target != IGNORE_INDEX:
                weights = log_score[row, mine].softmax(0)
                found.append(-(weights @ (hidden[row, mine] @ matrix.T).softmax(1)[:, target]).log())
    return found


def mixed_inputs(streams: Streams) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, unembedding, log scores, and targets of the streams, of which some tokens have none."""
    draw = torch.Generator().manual_seed(streams.token.numel())
    hidden = torch.randn(*streams.token.shape, HIDDEN, generator=draw, dtype=torch.float64).requires_grad_()
    matrix = torch.randn(VOCABULARY, HIDDEN, generator=draw, dtype=torch.float64).requires_grad_()
    of_tokens = torch.randint(VOCABULARY, (len(streams.token), streams.num_tokens + 1), generator=draw)
    of_tokens[torch.rand(of_tokens.shape, generator=draw) < 0.2] = IGNORE_INDEX
    of_tokens[:, -1] = IGNORE_INDEX
    of_tokens[0, 0] = 3
    return hidden, matrix, streams.log_score.double().requires_grad_(), of_tokens.gather(1, streams.token)


@pytest.mark.parametrize("num_items", [None, 5, torch.tensor(7)], ids=str)
@pytest.mark.parametrize(("rows", "alignment"), [(1, 1), (2, 1), (5, 1), (1000, 1), (5, 16)])
@pytest.mark.parametrize(
    "sizes", [[[1]], [[3, 1, 2], [1, 1]], [[8, 1, 1, 4], [2, 2, 8, 8], [1]], [[1, 1, 1], [1, 1, 1]]], ids=str
)
def test_loss_and_gradients_are_those_of_loops(
    sizes: list[list[int]], rows: int, alignment: int, num_items: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever bubble a chunk cuts."""
    monkeypatch.setattr(loss_module, "ROWS", rows)
    monkeypatch.setitem(loss_module.ALIGNMENT, "cpu", alignment)
    streams = build(sizes)
    hidden, matrix, log_score, targets = mixed_inputs(streams)
    bubbles = Bubbles(log_score, streams.begins(), widest=8)
    found = chunked_next_token_loss(hidden, matrix, targets, num_items, bubbles)
    terms = losses_of_loops(hidden, matrix, targets, log_score, sizes)
    expected = torch.stack(terms).sum() / (len(terms) if num_items is None else num_items)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    gradients = (torch.autograd.grad(3 * loss, (hidden, matrix, log_score)) for loss in (found, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)
    each = chunked_token_losses(hidden, matrix, targets, bubbles)
    torch.testing.assert_close(each[each != 0], torch.stack(terms), rtol=1e-12, atol=0)


def test_scores_and_probabilities_far_below_1_do_not_underflow() -> None:
    streams = build([[2, 3]])
    hidden, matrix, log_score, targets = mixed_inputs(streams)
    losses = [
        chunked_next_token_loss(300 * hidden, matrix, targets, None, Bubbles(each, streams.begins(), 3))
        for each in (log_score - 1000, log_score)
    ]
    assert losses[1] > 100
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)


# --- Against the reference ---

LABELS = {"some": lambda ids: ids.masked_fill(torch.arange(ids.shape[1]) % 3 == 1, IGNORE_INDEX), "all": torch.clone}


RULES: list[Case] = [
    {"budget": 1},
    {"budget": 1.5, "gate_scores": "forks"},
    {"budget": 2},
    {"budget": 3.25, "routing": "topk"},
    {"budget": 4, "attenuation": "none"},
    {"budget": 1, "attenuation": "released"},
    {"budget": 2, "routing": "pause"},
    {"budget": 3, "routing": "copy", "copy_layer": 2},
    {"budget": 1, "routing": "none"},
]
PADDINGS = ("none", "left", "right", "holes")


@pytest.mark.parametrize(
    ("rules", "padding", "labels"),
    [
        *((rules, "holes", "some") for rules in RULES),
        *(({"budget": 2}, padding, "all") for padding in PADDINGS),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in itertools.product(RULES, PADDINGS, LABELS)
            if case[1:] != ("holes", "some")
        ),
    ],
    ids=str,
)
def test_loss_and_all_gradients_are_the_references(
    rules: Case, padding: str, labels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "ROWS", 3)
    model, ids = tiny_model(3, merge="probability", **rules).double(), random_ids(3, 8, seed=4)
    mask, given = padding_mask(padding, 3, 8), LABELS[labels](ids)
    given[2] = IGNORE_INDEX
    out = model(ids, attention_mask=mask, output_streams=True, labels=given, num_items_in_batch=5, return_logits=False)
    parameters = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}
    survivors = survivors_of(out.streams, model.config.gated_layers)
    expected = reference_forward(model.config, parameters, ids, mask, given, survivors=survivors)
    mean = model(ids, attention_mask=mask, labels=given, return_logits=False).loss
    assert mean.item() == pytest.approx(expected.loss.item(), rel=1e-9)
    scale = (out.loss / mean).detach()
    assert (5 * scale).item() == pytest.approx(round(5 * scale.item()), abs=1e-9)  # the number of targets
    out.loss.backward()
    (expected.loss * scale).backward()
    ours = {name: p.grad for name, p in model.named_parameters()}
    errors = relative_errors(ours, {name: p.grad for name, p in parameters.items()}, 1e-9)
    assert max(errors.values()) < 1e-9, errors


def test_labels_that_are_all_empty_are_the_mean_of_nothing() -> None:
    model, ids = tiny_model(merge="probability"), random_ids(1, 6)
    loss = model(ids, labels=torch.full_like(ids, IGNORE_INDEX), return_logits=False).loss
    assert loss.isnan()
    loss.backward()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("padding", ["none", "holes"])
def test_a_loss_of_logits_has_the_same_gradients(padding: str, labels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the logits of a row are formed anew in the backward pass, and where they are few."""
    model, ids = tiny_model(merge="probability").double(), random_ids(3, 8)
    arguments: Case = {"attention_mask": padding_mask(padding, 3, 8), "labels": LABELS[labels](ids)}
    gradients = []
    for rows, return_logits in ((1, True), (512, True), (512, False)):
        monkeypatch.setattr(mixture_module, "ROWS", rows)
        loss = model(ids, **arguments, return_logits=return_logits).loss
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for others in gradients[1:]:
        for ours, theirs in zip(gradients[0], others, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


# --- What is held ---


def test_no_pass_holds_the_logits_of_all_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "ROWS", 4)
    monkeypatch.setattr(mixture_module, "ROWS", 4)
    model, ids = tiny_model(merge="probability", vocab_size=5000, budget=2).train(), random_ids(4, 16)
    of_all_streams = 4 * 32 * 5000
    recorder = record(lambda: model(ids, labels=ids, return_logits=False).loss)
    assert recorder.largest == 5000 * 16 < of_all_streams  # the weights; the rows of a chunk are fewer
    assert record(lambda: model(ids, labels=ids).loss).largest == of_all_streams / 2  # the logits asked for


def decoded_rows(model: ThoughtbubblesForCausalLM) -> list[int]:
    """Grows by the vectors that each call of the unembedding decodes."""
    rows: list[int] = []
    model.lm_head.register_forward_pre_hook(lambda _, given: rows.append(given[0][..., 0].numel()))
    return rows


def test_generation_decodes_the_streams_of_the_last_token_alone() -> None:
    model, ids = tiny_model(merge="probability", budget=3), random_ids(2, 12)
    rows = decoded_rows(model)
    for use_cache in (True, False):
        model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=use_cache, pad_token_id=0)
    assert len(rows) == 8
    assert max(rows) <= 2 * 4  # two fork layers


@pytest.mark.parametrize("padding", ["none", "left", "right", "holes"])
@pytest.mark.parametrize("rules", [{"budget": 2}, {"routing": "topk"}, {"routing": "copy", "budget": 3}], ids=str)
def test_some_columns_alone(rules: Case, padding: str) -> None:
    model, ids = tiny_model(merge="probability", **rules).double(), random_ids(3, 40)
    mask = padding_mask(padding, 3, 40)
    logits = model(ids, attention_mask=mask).logits
    rows = decoded_rows(model)
    for keep in (2, torch.tensor([39, 0, 7, 7])):
        found = model(ids, attention_mask=mask, logits_to_keep=keep).logits
        real = (torch.ones_like(ids) if mask is None else mask).bool()[
            :, keep if torch.is_tensor(keep) else slice(-2, None)
        ]
        expected = logits[:, keep] if torch.is_tensor(keep) else logits[:, -2:]
        torch.testing.assert_close(found[real], expected[real], rtol=1e-12, atol=1e-12)
        assert found.isfinite().all()
    assert max(rows) <= 3 * 4 * 4


def test_some_columns_of_a_pass_that_goes_on_from_a_cache() -> None:
    model, ids = tiny_model(merge="probability", budget=2).double(), random_ids(2, 24)
    cache = StreamCache()
    model(ids[:, :4], cache=cache)
    found = model(ids[:, 4:], cache=cache, logits_to_keep=1).logits
    torch.testing.assert_close(found, model(ids).logits[:, -1:], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("merge", ["probability", "residual"])
@pytest.mark.parametrize("padding", ["none", "left", "holes"])
@pytest.mark.parametrize("columns", [[0, 1, 2, 3, 4, 5, 6, 7, 8], [2], [7, 3, 3]], ids=str)
def test_losses_of_tokens(columns: list[int], padding: str, merge: str) -> None:
    model, ids = tiny_model(merge=merge, budget=2).double(), random_ids(3, 9)
    mask, index = padding_mask(padding, 3, 9), torch.tensor(columns)
    found = model.token_losses(ids, index, mask)
    log_probs = model(ids, attention_mask=mask).logits.log_softmax(-1)
    for row in range(3):
        real = [column for column in range(9) if mask is None or mask[row, column]]
        after = dict(itertools.pairwise(real))
        expected = [-log_probs[row, c, ids[row, after[c]]].item() if c in after else 0 for c in columns]
        assert found[row].tolist() == pytest.approx(expected, rel=1e-9)


def test_a_compiled_loss_is_one_graph() -> None:
    torch._dynamo.reset()
    counters.clear()
    models = [tiny_model(merge="probability", num_hidden_layers=2, fork_layers=[1]).train() for _ in range(2)]
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(models[1], backend=backend)
    for seed in (1, 2):
        ids = random_ids(2, 9, seed)
        losses = [each(ids, labels=ids, return_logits=False).loss for each in (models[0], compiled)]
        torch.testing.assert_close(losses[1], losses[0])
        gradients = [
            torch.autograd.grad(loss, list(each.parameters())) for loss, each in zip(losses, models, strict=True)
        ]
        torch.testing.assert_close(gradients[1], gradients[0])
    assert backend.frame_count == 1
    assert not counters["graph_break"]
    torch._dynamo.reset()


def test_an_unembedding_with_an_adapter_decides() -> None:
    model, ids = tiny_model(merge="probability", budget=2), random_ids(2, 9)
    expected = model(ids, labels=ids, return_logits=False).loss
    columns = torch.arange(8)
    losses = model.token_losses(ids, columns)
    model.lm_head = torch.nn.Sequential(model.lm_head)
    torch.testing.assert_close(model(ids, labels=ids, return_logits=False).loss, expected)
    torch.testing.assert_close(model.token_losses(ids, columns), losses)


# --- The streams of some tokens ---


@given(batches, st.data())
def test_streams_of_some_tokens(batch: list[list[int]], data: st.DataObject) -> None:
    streams = build(batch)
    widest = max(size for row in batch for size in row)
    some = st.lists(st.integers(0, streams.num_tokens - 1), min_size=1, max_size=4)
    asked = data.draw(some)
    found, place = streams.of_tokens(torch.tensor(asked).expand(len(batch), -1), widest)
    assert found.token.shape[1] <= len(asked) * widest
    for row, sizes in enumerate(batch):
        for column, token in enumerate(asked):
            mine = found.residual[row][found.token[row] == place[row, column]]
            theirs = streams.residual[row][streams.token[row] == token]
            assert torch.equal(mine, theirs if token < len(sizes) else theirs[:0])
    assert torch.equal(found.alive, found.token < found.num_tokens)
    assert torch.equal(found.alive, found.alive.sort(dim=1, descending=True, stable=True).values)
    assert not found.residual[~found.alive].any()
