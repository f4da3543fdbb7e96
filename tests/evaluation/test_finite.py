"""An evaluation that meets numbers that are not finite fails and says so."""

import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.evaluation.benchmark_files import write_benchmarks
from tests.evaluation.test_harness import make_model, wrap
from thoughtbubbles.data import PreparedData
from thoughtbubbles.evaluation.answering import Question, answer_questions, make_batches
from thoughtbubbles.evaluation.benchmarks import parse_tasks
from thoughtbubbles.evaluation.evaluate import Options, evaluate
from thoughtbubbles.evaluation.finite import check_finite, finite_logits
from thoughtbubbles.evaluation.generation import generate_text
from thoughtbubbles.evaluation.perplexity import evaluate_perplexity
from thoughtbubbles.evaluation.protocols import last_words
from thoughtbubbles.model.loading import load_model, load_tokenizer
from thoughtbubbles.model.modeling import ThoughtbubblesForCausalLM
from thoughtbubbles.recipes.training import load_recipe
from thoughtbubbles.support.errors import InputError, RunError
from thoughtbubbles.training.run import train

NOT_FINITE = "numbers of the model are not finite"


def spoilt(model: ThoughtbubblesForCausalLM, value: float) -> ThoughtbubblesForCausalLM:
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[3, 2] = value
    return model


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite(value: float) -> None:
    with pytest.raises(InputError, match=rf"losses: 2 of 4 {NOT_FINITE}"):
        check_finite(torch.tensor([[1.0, value], [value, 0.0]]), "losses")
    check_finite(torch.tensor([1e38, -1e38, 0.0]), "losses")


def test_a_forbidden_token_is_none_of_the_models() -> None:
    """Other processors of `generate`, as that of `min_new_tokens`, write -inf before the logits are checked."""
    ids, forbidden = torch.tensor([[1]]), torch.tensor([[0.5, -math.inf, 2.0]])
    assert torch.equal(finite_logits()(ids, forbidden), forbidden)
    for value in (math.nan, math.inf):
        with pytest.raises(InputError, match=rf"generation: 1 of 3 {NOT_FINITE}"):
            finite_logits()(ids, torch.tensor([[0.5, value, -math.inf]]))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mode", ["blockwise", "prefix"])
def test_perplexity(tiny_run: Path, tiny_data: PreparedData, mode: str, value: float) -> None:
    model = spoilt(load_model(tiny_run, "cpu"), value)
    with pytest.raises(InputError, match=rf"{mode} losses: .* {NOT_FINITE}"):
        evaluate_perplexity(model, tiny_data.validation[:2]["input_ids"], mode=mode)


def test_generation_and_exact_match(tiny_run: Path) -> None:
    model, tokenizer = spoilt(load_model(tiny_run, "cpu"), math.nan), load_tokenizer(tiny_run)
    with pytest.raises(InputError, match=NOT_FINITE):
        generate_text(model, tokenizer, "the", 4)
    batches = make_batches(tokenizer, [Question(1, "the", " of", 1)], "rows", 16)
    with pytest.raises(InputError, match=NOT_FINITE):
        answer_questions(model, tokenizer, batches, Fraction(1))


@pytest.mark.parametrize("task", ["lambada", "gsm8k", "piqa", "wikitext"])
def test_benchmarks(tmp_path: Path, tiny_data: PreparedData, task: str) -> None:
    spoilt(make_model(tiny_data), math.nan).save_pretrained(tmp_path / "model")
    tiny_data.tokenizer().save_pretrained(tmp_path / "model")
    options = Options(parse_tasks(task), write_benchmarks(tmp_path / "data"), limit=2)
    with pytest.raises(InputError, match=NOT_FINITE):
        evaluate(str(tmp_path / "model"), tmp_path / "out", options, progress=False)
    assert not list((tmp_path / "out").rglob(f"{task}*.json"))


def test_the_authors_lambada(tiny_data: PreparedData) -> None:
    lm = wrap(spoilt(make_model(tiny_data), math.nan), tiny_data)
    with pytest.raises(InputError, match=rf"logits: .* {NOT_FINITE}"):
        last_words(lm, ["the root of gate"])


@pytest.fixture
def spoil_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    forward: Callable[..., Any] = ThoughtbubblesForCausalLM.forward

    def spoil(self: ThoughtbubblesForCausalLM, *args: Any, **kwargs: Any) -> Any:
        out = forward(self, *args, **kwargs)
        if not self.training:
            out.loss = out.loss * math.nan
        return out

    monkeypatch.setattr(ThoughtbubblesForCausalLM, "forward", spoil)


@pytest.mark.usefixtures("spoil_evaluations")
def test_the_evaluations_of_a_run(tiny_run: Path, tmp_path: Path) -> None:
    recipe = load_recipe(tiny_run / "recipe.yaml", [f"training.output={tmp_path}/run", "training.compile=none"])
    with pytest.raises(RunError, match="evaluation after step 4: the loss is nan, expected a finite number"):
        train(recipe, progress=False)
    assert not (tmp_path / "run" / "summary.json").exists()
