"""Questions with known answers, and what a model answers: greedily, with the cache, many at a time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from thoughtbubbles.data.sources.corpora import resolve_source
from thoughtbubbles.data.sources.hub import missing_field
from thoughtbubbles.data.sources.reading import read_rows
from thoughtbubbles.data.tokenizer import Encoder
from thoughtbubbles.evaluation.finite import finite_logits
from thoughtbubbles.model.budget import budget_text
from thoughtbubbles.model.modeling import ThoughtbubblesForCausalLM
from thoughtbubbles.recipes.values import WORDS
from thoughtbubbles.support.errors import InputError
from thoughtbubbles.support.sampling import spread
from thoughtbubbles.support.text import decode_after, start_document


@dataclass(frozen=True)
class Question:
    """A row to answer.

    Attributes:
        row: its number in the file, from 1.
        prompt, answer, difficulty: its fields.
    """

    row: int
    prompt: str
    answer: str
    difficulty: int


# A question and the token ids of its prompt and its answer.
Asked = tuple[Question, list[int], list[int]]


@dataclass(frozen=True)
class Answer:
    """What a model wrote.

    Attributes:
        budget: streams per token, as text.
        question: asked.
        written: the text up to the end of text; where that did not come, None. Where it is the text that the answer's
            own tokens stand for after the prompt, it is the answer.
        cut: whether that was because the model's longest row ended first.
    """

    budget: str
    question: Question
    written: str | None
    cut: bool = False

    @property
    def right(self) -> bool:
        """Whether it is the answer and nothing else."""
        return self.written == self.question.answer


def read_questions(path: Path, limit: int | None = None) -> list[Question]:
    """The rows of a .jsonl or .parquet file.

    Args:
        limit: only so many of each difficulty, evenly spread.

    Raises:
        InputError: a file that cannot be read or has no rows, or a row without `prompt` (text), `answer` (text, not
            empty) or `difficulty` (a whole number).
    """
    by_difficulty: dict[int, list[Question]] = {}
    for number, row in enumerate(read_rows(resolve_source(str(path))), start=1):
        question = _question(row, number, f"{path}, row {number}")
        by_difficulty.setdefault(question.difficulty, []).append(question)
    chosen = [some[place] for some in by_difficulty.values() for place in spread(len(some), limit)]
    if not chosen:
        raise InputError(f"{path} has no rows: expected questions")
    return sorted(chosen, key=lambda question: question.row)


def _question(row: Mapping[str, Any], number: int, place: str) -> Question:
    for field, kind in (("prompt", str), ("answer", str), ("difficulty", int)):
        if field not in row:
            raise missing_field(place, field, list(row))
        if type(row[field]) is not kind:
            raise InputError(f"{place}: {field}={row[field]!r}: expected {WORDS[kind]}")
    if not row["answer"]:
        raise InputError(f"{place}: answer='': expected some text")
    return Question(number, row["prompt"], row["answer"], row["difficulty"])


@dataclass(frozen=True)
class QuestionBatch:
    """Questions to answer together.

    Attributes:
        questions: B of them.
        prompts: token ids of each, the token that starts documents in front.
        answers: token ids of each.
        new_tokens: to write at most: those of the longest answer of all and the end of text, or what fits the row.
        is_cut: whether that is less.
    """

    questions: Sequence[Question]
    prompts: Sequence[list[int]]
    answers: Sequence[list[int]]
    new_tokens: int
    is_cut: bool

    @property
    def width(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(len, self.prompts))

    def padded(self) -> tuple[Tensor, Tensor]:
        """Ids and mask [B, width], padded on the left."""
        ids = torch.zeros((len(self.prompts), self.width), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(self.prompts):
            ids[row, self.width - len(prompt) :] = torch.tensor(prompt)
            mask[row, self.width - len(prompt) :] = 1
        return ids, mask


def make_batches(
    tokenizer: PreTrainedTokenizerFast, questions: Sequence[Question], source: str, longest: int, batch_size: int = 64
) -> list[QuestionBatch]:
    """Tokenise questions as `task: sft` does, and put those of about one length together.

    Args:
        tokenizer: has an eos token.
        questions: to ask.
        source: names them in messages.
        longest: tokens of the model's longest row.
        batch_size: questions of a batch.

    Raises:
        InputError: a question that the vocabulary lacks words for, or that leaves no room in the longest row.
    """
    prompts, answers = _encode(tokenizer, questions, source)
    # Of all questions, so that what is written does not depend on the batch.
    new_tokens = max(map(len, answers)) + 1
    asked = sorted(zip(questions, prompts, answers, strict=True), key=lambda each: len(each[1]))
    question, prompt, _ = asked[-1]
    if len(prompt) >= longest:
        raise InputError(
            f"{source}, row {question.row}: prompt of {len(prompt)} tokens: expected at most {longest - 1}, since the "
            f"model's longest row has {longest}"
        )
    return [_batch(some, new_tokens, longest) for some in _lots(asked, longest - new_tokens, batch_size)]


def _lots(asked: Sequence[Asked], most: int, size: int) -> Iterator[Sequence[Asked]]:
    """Questions in ascending order of length, `size` at a time.

    Prompts of more than `most` tokens, whose answers the row may cut, stand with those of their own length alone: what
    is written does not depend on the batch.
    """
    start = 0
    for end in range(1, len(asked) + 1):
        if end < len(asked) and end - start < size:
            first, following = len(asked[start][1]), len(asked[end][1])
            if following <= most or following == first:
                continue
        yield asked[start:end]
        start = end


def _batch(asked: Sequence[Asked], new_tokens: int, longest: int) -> QuestionBatch:
    questions, prompts, answers = zip(*asked, strict=True)
    room = longest - max(map(len, prompts))
    return QuestionBatch(questions, prompts, answers, min(new_tokens, room), room < new_tokens)


def _encode(
    tokenizer: PreTrainedTokenizerFast, questions: Sequence[Question], source: str
) -> tuple[list[list[int]], list[list[int]]]:
    """Tokens of the prompts, after the token that starts documents, and of the answers."""
    texts = [text for question in questions for text in (question.prompt, question.answer)]
    tokens: list[list[int]] = [[] for _ in texts]
    for piece in Encoder(tokenizer, threads=1).encode(enumerate(texts)):
        tokens[piece.document] += piece.tokens.tolist()
    prompts, answers = tokens[::2], tokens[1::2]
    for question, prompt, answer in zip(questions, prompts, answers, strict=True):
        if tokenizer.unk_token_id in prompt + answer:
            shown = f"{question.prompt}{question.answer}"
            raise InputError(f"{source}, row {question.row}: {shown!r}: expected words of the model's tokenizer alone")
    start = start_document(tokenizer)
    return [start + prompt for prompt in prompts], answers


@torch.inference_mode()
def answer_questions(
    model: ThoughtbubblesForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    batches: Sequence[QuestionBatch],
    budget: Fraction,
    on_progress: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Let a model answer greedily, with the cache, up to the end of text or a token more than the longest answer.

    Args:
        model: in evaluation mode.
        tokenizer: that of the batches.
        batches: which `make_batches` made.
        budget: streams per token.
        on_progress: called with the number of questions answered since the last call.

    Returns:
        The answers in the order of the rows.
    """
    generator: Any = model  # transformers types `generate` for its own classes
    end = tokenizer.eos_token_id
    answers = []
    for batch in batches:
        ids, mask = batch.padded()
        out = generator.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=batch.new_tokens,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=end,
            budget=budget,
            logits_processor=finite_logits(),
        )
        rows = out[:, batch.width :].tolist()
        for question, prompt, answer, row in zip(batch.questions, batch.prompts, batch.answers, rows, strict=True):
            written = _read(tokenizer, prompt, row[: row.index(end)]) if end in row else None
            # Tokenised apart, an answer need not come back letter for letter: a space in front may come or go.
            same = written is not None and written == _read(tokenizer, prompt, answer)
            cut = batch.is_cut and written is None
            answers.append(Answer(budget_text(budget), question, question.answer if same else written, cut))
        if on_progress is not None:
            on_progress(len(batch.questions))
    return sorted(answers, key=lambda answer: answer.question.row)


def _read(tokenizer: PreTrainedTokenizerFast, prompt: list[int], written: list[int]) -> str:
    return decode_after(tokenizer, prompt + written, len(prompt), skip_special_tokens=False)
