"""The authors' protocol by hand, in which nothing precedes a text, and the likelihood of gold solutions."""

from decimal import Decimal

import pytest
import torch
import torch.nn.functional as F

from tests.evaluation.benchmark_files import captions, lines, problems, sentence_pairs
from tests.evaluation.test_harness import make_model, wrap
from thoughtbubbles import ThoughtbubblesForCausalLM
from thoughtbubbles.data import PreparedData
from thoughtbubbles.evaluation.protocols import (
    CHOICES,
    _likeliest,
    final_number,
    gold_likelihoods,
    last_words,
    lowest_losses,
    measure_documents,
    score_number,
)


def token_losses(model: ThoughtbubblesForCausalLM, data: PreparedData, text: str, led: bool = False) -> torch.Tensor:
    """Of the tokens of a text, after what precedes a text or by itself."""
    ids = torch.tensor([[data.manifest.tokenizer.separator_id] * led + data.tokenizer().encode(text)])
    return F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")


@pytest.mark.parametrize("routing", ["causal", "topk"])
def test_the_lowest_mean_loss_wins(tiny_data: PreparedData, routing: str) -> None:
    """The first token of a continuation counts, which the authors' script leaves out."""
    model, tokenizer = make_model(tiny_data, routing=routing), tiny_data.tokenizer()
    documents = [{**row, "query": row["ctx"], "choices": row["endings"]} for row in captions(24)]
    choices = [CHOICES["hellaswag"](row) for row in documents]
    found = lowest_losses(wrap(model, tiny_data), choices)
    expected: list[float] = []
    without_first: list[float] = []
    for choice in choices:
        border = len(tokenizer.encode(choice.prefix))
        losses = []
        for option in choice.options:
            ids = torch.tensor([tokenizer.encode(f"{choice.prefix} {option}")])
            losses.append(F.cross_entropy(model(ids[:, :-1]).logits[0], ids[0, 1:], reduction="none")[border - 1 :])
        for right, first in ((expected, 0), (without_first, 1)):
            means = [each[first:].mean().item() for each in losses]
            right.append(float(means.index(min(means)) == choice.gold))
    assert found == expected
    assert 0 < sum(found) < 24
    assert found != without_first


def test_sentences_are_scored_whole(tiny_data: PreparedData) -> None:
    model = make_model(tiny_data)
    rows = sentence_pairs(1, 12)
    found = lowest_losses(wrap(model, tiny_data), [CHOICES["blimp"](row) for row in rows])
    expected = []
    for row in rows:
        good, bad = (token_losses(model, tiny_data, row[name]).mean() for name in ("sentence_good", "sentence_bad"))
        expected.append(float(good <= bad))
    assert found == expected
    assert 0 < sum(found) < 12


@pytest.mark.parametrize("size", [1, 3, 8])
def test_the_last_word_is_read_off_the_likeliest_tokens(tiny_data: PreparedData, size: int) -> None:
    model, tokenizer = make_model(tiny_data), tiny_data.tokenizer()
    texts, wanted = lines(9), []
    for text in texts:
        ids = torch.tensor([tokenizer.encode(text)])
        wanted.append(tokenizer.decode(model(ids).logits[0, :-1].argmax(-1)))
    lm = wrap(model, tiny_data, size)
    rows = [tokenizer.encode(text) for text in texts]
    assert [tokenizer.decode(each) for each in _likeliest(lm, rows)] == wanted
    assert last_words(lm, texts) == [
        float(b.split(" ")[-1] == a.split(" ")[-1]) for a, b in zip(texts, wanted, strict=True)
    ]


def test_the_last_word_must_be_whole(tiny_data: PreparedData, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = wrap(make_model(tiny_data), tiny_data)
    said = {"the root": "he root", "the gates": "he gate", "a fork": " astream fork", "one bubble": "bubble"}
    encode = lm.tokenizer.encode
    monkeypatch.setattr(
        "thoughtbubbles.evaluation.protocols._likeliest",
        lambda lm, rows: [encode(said[str(lm.tokenizer.decode(row))]) for row in rows],
    )
    assert last_words(lm, list(said)) == [1.0, 0.0, 1.0, 1.0]


def test_gold_solutions_and_answers(tiny_data: PreparedData) -> None:
    model, tokenizer = make_model(tiny_data, max_position_embeddings=256), tiny_data.tokenizer()
    rows = problems(4)
    solution, answer = gold_likelihoods(wrap(model, tiny_data), rows)
    assert (solution.metric, answer.metric) == ("solution_loglikelihood", "answer_loglikelihood")
    for row, whole, last in zip(rows, solution.values, answer.values, strict=True):
        prompt = f"Question: {row['question']}\nAnswer:"
        losses = token_losses(model, tiny_data, f"{prompt} {row['answer']}", led=True)
        assert whole == pytest.approx(-losses[len(tokenizer.encode(prompt)) :].sum().item(), abs=1e-3)
        border = len(tokenizer.encode(f"{prompt} {row['answer'].rpartition(' ')[0]}"))
        assert last == pytest.approx(-losses[border:].sum().item(), abs=1e-3)
        assert whole < last < 0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("16-3=13 13*2=26\nanswer: 26", 26),
        ("16-3=<<16-3=13>>13\n#### 13", 13),
        ("Answer: 1,234.50 dollars.", Decimal("1234.5")),
        ("answer: 3\nanswer: -$4.", -4),
        ("#### 5 answer: 6", 6),
        ("answer: .5", Decimal("0.5")),
        ("the number is 7", None),
        ("answer: none", None),
        ("", None),
    ],
)
def test_the_number_that_answers_is_read_in_both_formats(text: str, number: Decimal | int | None) -> None:
    assert final_number(text) == number


def test_answers_count_as_numbers() -> None:
    document = {"question": "?", "answer": "so.\n#### 1,200"}
    right = ["answer: 1200", "#### 1,200", "answer: 1200.00", "1+1=2 #### 3\nanswer: $1,200"]
    wrong = ["1200", "answer: 120", "answer: 1201", "", "answer:"]
    assert [score_number(document, [each])["exact_match"] for each in right] == [1.0] * 4
    assert [score_number(document, [each])["exact_match"] for each in wrong] == [0.0] * 5


def test_wikitext_has_no_other_protocol(tiny_data: PreparedData) -> None:
    assert measure_documents("wikitext", wrap(make_model(tiny_data), tiny_data), [{"page": "the"}]) == []
