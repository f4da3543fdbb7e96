"""The running histogram of scores and the thresholds in it (method: Routing)."""

import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers import histograms, random_ids, randomise, tiny_config, tiny_model
from thoughtbubbles import ThoughtbubblesForCausalLM, update_thresholds
from thoughtbubbles.model.reference import calibrated_threshold
from thoughtbubbles.model.threshold import HORIZON, ScoreHistogram, share_admitted
from thoughtbubbles.model.weights import excused


def observed(*batches: Tensor) -> ScoreHistogram:
    """A histogram of batches of scores, all of optional candidates, an update after each."""
    histogram = ScoreHistogram()
    for scores in batches:
        histogram.observe(scores, torch.ones_like(scores, dtype=torch.bool))
        histogram.update()
    return histogram


def shares(histogram: ScoreHistogram) -> Tensor:
    """[2048] of the candidates in each bin."""
    return histogram.reached.diff(prepend=torch.zeros(1))


def fresh_model(**fields: object) -> ThoughtbubblesForCausalLM:
    """Of which no threshold was set yet."""
    model = ThoughtbubblesForCausalLM(tiny_config(routing="threshold", **fields))
    randomise(model)
    for histogram in histograms(model):
        histogram.forget()
    return model


# --- The share ---


@pytest.mark.parametrize(
    ("budget", "fork", "share"),
    [
        # One stream a token offers one optional candidate, two offer three, four offer seven.
        (1, 0, 0),
        ("3/2", 0, "1/2"),
        (2, 0, 1),
        (2, 1, "1/3"),
        (2, 2, "1/3"),
        ("3/2", 1, "1/4"),
        (4, 1, 1),
        (4, 2, "3/7"),
        (3, 1, "2/3"),
        (9, 2, 1),
    ],
)
def test_share_that_can_be_admitted(budget: int | str, fork: int, share: int | str) -> None:
    assert share_admitted(Fraction(budget), fork) == float(Fraction(share))


# --- The histogram ---

SCORES = st.lists(st.floats(-40, 0, width=32), min_size=1, max_size=60)


@given(SCORES, st.fractions(1, 4, max_denominator=12), st.integers(0, 2))
def test_threshold_is_the_bin_that_reaches_the_share(scores: list[float], budget: Fraction, fork: int) -> None:
    histogram = observed(torch.tensor([scores]))
    threshold = histogram.threshold(budget, fork).item()
    share = share_admitted(budget, fork)
    if share == 1:
        assert threshold == -math.inf
        return
    kept = [max(score, -31.999) for score in scores]  # the last bin has no lower end
    # Rounding of shares that add up exactly to what is asked for may ask for a bin more or less.
    assert sum(score >= threshold for score in kept) >= (share - 1e-6) * len(kept)
    assert sum(score > threshold + 1 / 64 for score in kept) <= (share + 1e-6) * len(kept)
    assert threshold == calibrated_threshold(histogram.reached.tolist(), budget, fork)


def test_edges_of_bins() -> None:
    counted = shares(observed(torch.tensor([[0.0, -1 / 128, -1 / 64, -1.0, -31.99, -32.0, -99.0]]))) * 7
    assert counted.nonzero().flatten().tolist() == [0, 1, 64, 2047]
    assert torch.allclose(counted[[0, 1, 64, 2047]], torch.tensor([2.0, 1.0, 1.0, 3.0]))


def test_candidates_that_are_not_optional_do_not_count() -> None:
    histogram = ScoreHistogram()
    scores = torch.tensor([[-1.0, torch.nan, -2.0, 0.0]])
    histogram.observe(scores, torch.tensor([[True, False, True, False]]))
    histogram.update()
    assert shares(histogram).nonzero().flatten().tolist() == [64, 128]


@pytest.mark.parametrize("noise", [0, 3e-6, -3e-6])
def test_a_score_at_the_border_of_bins_is_of_one_of_them_whatever_its_rounding(noise: float) -> None:
    borders = -torch.tensor([[1.0, 7.0, 64.0, 640.0]], dtype=torch.float64) / 64
    counted = shares(observed(borders + noise))
    assert counted.nonzero().flatten().tolist() == [1, 7, 64, 640]


def test_scores_that_are_no_numbers_are_not_counted() -> None:
    histogram = observed(torch.tensor([[torch.nan, -1.0, -torch.inf, torch.inf]]))
    assert (shares(histogram) * 3).nonzero().flatten().tolist() == [0, 64, 2047]
    nothing = observed(torch.full((2, 3), torch.nan))
    assert nothing.updates == 0


def test_a_model_without_numbers_has_logits_without_numbers() -> None:
    model, ids = fresh_model(), random_ids(2, 9)
    model.train()
    model.model.embed_tokens.weight.data[int(ids[0, 3])] = torch.nan
    assert model(ids, labels=ids).loss.isnan()


def test_counts_are_added_up_over_processes(imagined_processes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the three others had seen other scores, and more of them."""
    ours, theirs = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-2.0, -3.0, -3.0, -3.0, -4.0, -5.0]])
    elsewhere = ScoreHistogram()
    elsewhere.observe(theirs, torch.ones_like(theirs, dtype=torch.bool))
    monkeypatch.setattr("torch.distributed.all_reduce", lambda counts: counts.add_(elsewhere.observed))
    found = shares(observed(ours))
    assert torch.allclose(found[[64, 128, 192, 256, 320]] * 8, torch.tensor([1.0, 2.0, 3.0, 1.0, 1.0]))


def test_running_mean_is_a_mean_at_first_and_forgets_later() -> None:
    batches = [torch.full((1, 4), -float(k)) for k in (1, 2, 3)]
    assert torch.allclose(shares(observed(*batches))[[64, 128, 192]], torch.full((3,), 1 / 3))
    old, new = torch.full((1, 4), -1.0), torch.full((1, 4), -2.0)
    histogram = observed(*[old] * HORIZON, *[new] * 5)
    assert shares(histogram)[64].item() == pytest.approx((1 - 1 / HORIZON) ** 5)
    assert histogram.reached[-1] == 1


def test_an_update_with_nothing_observed_changes_nothing() -> None:
    histogram = observed(torch.tensor([[-1.0]]))
    before = histogram.reached.clone()
    histogram.update()
    histogram.observe(torch.tensor([[-5.0]]), torch.tensor([[False]]))
    histogram.update()
    assert torch.equal(histogram.reached, before)
    assert histogram.updates.item() == 1


def test_micro_batches_do_not_matter() -> None:
    scores = -3 * torch.rand(6, 10, generator=torch.Generator().manual_seed(0))
    whole, parts = observed(scores), ScoreHistogram()
    for part in scores.split([1, 3, 2]):
        parts.observe(part, torch.ones_like(part, dtype=torch.bool))
    parts.update()
    assert torch.equal(parts.reached, whole.reached)


# --- In a model ---


def test_before_the_first_update_every_candidate_is_eligible() -> None:
    model = fresh_model(budget=1.5)
    assert [h.threshold(Fraction(3, 2), fork).item() for fork, h in enumerate(histograms(model))] == [-math.inf] * 2


def test_training_sets_the_thresholds_and_evaluation_leaves_them() -> None:
    model, ids = fresh_model(budget=1.5), random_ids(16, 32)
    model.train()
    thresholds = [h.threshold(Fraction(3, 2), fork) for fork, h in enumerate(histograms(model))]
    model(ids)
    assert [h.threshold(Fraction(3, 2), fork) for fork, h in enumerate(histograms(model))] == thresholds
    update_thresholds(model)
    set_ = [h.threshold(Fraction(3, 2), fork).item() for fork, h in enumerate(histograms(model))]
    assert all(-32 < threshold < 0 for threshold in set_)
    model.eval()
    model(ids, budget=3)
    update_thresholds(model)
    assert [h.updates.item() for h in histograms(model)] == [1, 1]


def test_streams_are_about_what_the_budget_allows() -> None:
    model, ids = fresh_model(), random_ids(16, 64)
    model.train()
    for _ in range(3):
        model(ids)
        update_thresholds(model)
    for budget in (1.25, 1.5, 2):
        streams = model.eval()(random_ids(16, 64, seed=1), budget=budget, output_streams=True).streams[-1]
        used = streams.alive.sum().item() / ids.numel()
        assert 0.5 * (budget - 1) < used - 1 <= budget - 1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_checkpointing_observes_once(checkpointing: bool) -> None:
    model, ids = fresh_model(), random_ids(2, 9)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    model(ids, labels=ids).loss.backward()
    # A fork for every token, then at budget 2 three optional candidates for every token.
    assert [int(h.observed.sum()) for h in histograms(model)] == [18, 54]


def test_thresholds_are_saved_and_loaded(tmp_path: Path) -> None:
    model = tiny_model(routing="threshold", budget=1.5)
    ids = random_ids(3, 40)
    model.save_pretrained(tmp_path)
    again = ThoughtbubblesForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert [h.updates.item() for h in histograms(again)] == [1, 1]


def test_a_model_of_another_routing_takes_new_thresholds(tmp_path: Path) -> None:
    """Fine-tuning may change the rule: what the weights lack begins anew."""
    tiny_model(routing="causal").save_pretrained(tmp_path)
    new = [f"model.gates.{layer}.histogram.{name}" for layer in (1, 2) for name in ("reached", "updates")]
    with excused(new):
        model = ThoughtbubblesForCausalLM.from_pretrained(tmp_path, routing="threshold")
    assert [(h.updates.item(), h.reached.sum().item()) for h in histograms(model)] == [(0, 0.0)] * 2


def test_other_routings_have_no_histograms() -> None:
    model = tiny_model()
    update_thresholds(model)
    assert not histograms(model)
