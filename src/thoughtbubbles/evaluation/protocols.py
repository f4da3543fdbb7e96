"""What is measured beside the harness's metrics: the authors' protocol, and the likelihood of GSM8K's solutions."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import torch

from thoughtbubbles.evaluation.finite import check_finite
from thoughtbubbles.support.progress import stage

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM

    from thoughtbubbles.model.modeling import ThoughtbubblesForCausalLM

Document = Mapping[str, Any]
# A context and what follows it, as text.
Pair = tuple[str, str]
# What stands before the number that answers: in GSM8K's own solutions, and in what the authors teach.
ANSWER_MARK = re.compile(r"####|answer:", re.IGNORECASE)
NUMBER = re.compile(r"-?\$?[\d,]*\.?\d+")


@dataclass(frozen=True)
class Measure:
    """A metric of ours.

    Attributes:
        protocol: its name: `authors` or `gold`.
        metric: its name.
        values: of each document.
    """

    protocol: str
    metric: str
    values: list[float]


def measure_documents(task: str, lm: "HFLM", documents: Sequence[Document], progress: bool = False) -> list[Measure]:
    """What is measured on a benchmark beside the harness's metrics.

    Args:
        task: name of the benchmark.
        lm: the adapter's instance.
        documents: as the harness's task has them.
        progress: show a bar.
    """
    if task == "lambada":
        return [Measure("authors", "acc", last_words(lm, [str(each["text"]) for each in documents], progress))]
    if task in CHOICES:
        offered = [CHOICES[task](each) for each in documents]
        return [Measure("authors", "acc", lowest_losses(lm, offered))]
    if task == "gsm8k":
        return gold_likelihoods(lm, documents)
    return []


def last_words(lm: Any, passages: Sequence[str], progress: bool = False) -> list[float]:
    """The authors' LAMBADA: 1 where the last word of a passage is predicted, else 0.

    One forward over the passage; the likeliest token at each position, decoded together; right if the last
    space-separated word of that text is the passage's.
    """
    whole = [lm.tok_encode(passage) for passage in passages]
    lm.truncated += sum(len(row) > lm.max_length for row in whole)
    rows = [row[-lm.max_length :] for row in whole]
    right = [0.0] * len(rows)
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    with stage("authors' lambada", len(rows), progress) as bar:
        for start in range(0, len(order), lm.batch_size):
            chosen = order[start : start + lm.batch_size]
            for index, predicted in zip(chosen, _likeliest(lm, [rows[index] for index in chosen]), strict=True):
                text = str(lm.tokenizer.decode(predicted))
                right[index] = float(text.split(" ")[-1] == passages[index].split(" ")[-1])
            bar.advance(len(chosen), "passages")
    return right


@torch.inference_mode()
def _likeliest(lm: Any, rows: Sequence[list[int]]) -> list[list[int]]:
    """For each row of ids the likeliest token after each but its last, from one masked forward over all rows."""
    model: ThoughtbubblesForCausalLM = lm.model
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows], device=lm.device)
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=lm.device)
    logits = model(ids, attention_mask=mask, budget=lm.budget).logits
    check_finite(logits[mask > 0], "logits")
    best = logits.argmax(-1).tolist()
    return [tokens[: len(row) - 1] for tokens, row in zip(best, rows, strict=True)]


@dataclass(frozen=True)
class Choice:
    """A multiple choice.

    Attributes:
        prefix: what the choices follow, after a space; empty where the choices are whole sentences.
        options: the choices.
        gold: which is right.
    """

    prefix: str
    options: Sequence[str]
    gold: int


def _arc(document: Document) -> Choice:
    choices = document["choices"]
    return Choice(document["question"], choices["text"], list(choices["label"]).index(document["answerKey"]))


CHOICES: Mapping[str, Callable[[Document], Choice]] = {
    "hellaswag": lambda each: Choice(each["query"], each["choices"], int(each["label"])),
    "piqa": lambda each: Choice(each["goal"], (each["sol1"], each["sol2"]), int(each["label"])),
    "arc_easy": _arc,
    "arc_challenge": _arc,
    "blimp": lambda each: Choice("", (each["sentence_good"], each["sentence_bad"]), 0),
}


def lowest_losses(lm: "HFLM", choices: Sequence[Choice]) -> list[float]:
    """The authors' multiple choice: 1 where the right choice has the lowest mean token loss, else 0.

    The mean is over the choice's tokens after the prefix and a space; without a prefix, over the sentence's tokens
    but its first, which nothing predicts. The first of equals wins.
    """
    pairs = [
        (choice.prefix, f" {option}" if choice.prefix else option) for choice in choices for option in choice.options
    ]
    losses = iter(_mean_losses(lm, pairs))
    right = []
    for choice in choices:
        own = [next(losses) for _ in choice.options]
        right.append(float(own.index(min(own)) == choice.gold))
    return right


def _mean_losses(lm: Any, pairs: Sequence[Pair]) -> list[float]:
    """Nats per token of the second text of each pair after the first, before which nothing stands."""
    requests = []
    for prefix, text in pairs:
        kept = prefix.rstrip()
        ids = lm.tok_encode(prefix + text)
        border = len(lm.tok_encode(kept)) if kept else 1
        requests.append(((prefix, text), ids[:border], ids[border:]))
    scores = lm._loglikelihood_tokens(requests)
    # Of a text longer than the row only the end is scored.
    return [
        -score / min(len(tokens), lm.max_length) for (score, _), (_, _, tokens) in zip(scores, requests, strict=True)
    ]


def final_number(text: str) -> Decimal | None:
    """The number behind the last `####` or `answer:` of a text; None if there is none."""
    _, *behind = ANSWER_MARK.split(text)
    found = NUMBER.search(behind[-1]) if behind else None
    return None if found is None else Decimal(re.sub(r"[$,]", "", found[0]))


def score_number(document: Document, results: Sequence[str]) -> dict[str, float]:
    """The authors' GSM8K, for the harness: 1 where what was written answers as the document does, else 0.

    Their script compares floats, and a thousands separator in the document's answer makes any answer wrong; here not.
    """
    written, gold = (final_number(text) for text in (results[0], document["answer"]))
    return {"exact_match": float(written is not None and written == gold)}


def gold_likelihoods(lm: "HFLM", documents: Sequence[Document]) -> list[Measure]:
    """Log-likelihoods in nats of GSM8K's own solutions, and of their final answers after their own steps.

    They say something where no generated answer is right. Both follow the task's prompt without worked examples.
    """
    from lm_eval.api.instance import Instance

    solutions, answers = [], []
    for document in documents:
        prompt = f"Question: {document['question']}\nAnswer:"
        steps, mark, answer = document["answer"].rpartition("####")
        solutions.append((prompt, f" {document['answer']}"))
        answers.append((f"{prompt} {steps}{mark}", answer))
    # One call for each: in one call the harness would take a solution and its answer for the same request, as they end
    # alike, and score the answer at the solution's first tokens.
    scored = [
        [score for score, _ in lm.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs])]
        for pairs in (solutions, answers)
    ]
    names = ("solution_loglikelihood", "answer_loglikelihood")
    return [Measure("gold", name, scores) for name, scores in zip(names, scored, strict=True)]
