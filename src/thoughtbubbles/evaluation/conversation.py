"""Talking with a model: what its tokenizer's chat template writes is asked anew at every turn."""

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from thoughtbubbles.data.feed.chat import ChatMessage, ChatTemplate
from thoughtbubbles.evaluation.generation import Decoding, Generation, TextPrinter
from thoughtbubbles.model.modeling import ThoughtbubblesForCausalLM
from thoughtbubbles.support.detokenizer import Detokenizer, TokenTable
from thoughtbubbles.support.errors import InputError
from thoughtbubbles.support.text import decode_after, text_ends

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Of the longest row, left to an answer: a conversation that leaves less forgets how it began.
ROOM = 0.25


class AnswerPrinter(TextPrinter):
    """Says an answer as its tokens come, and nothing of what it answers."""

    _is_asked = _has_begun = False

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, or the next tokens."""
        if self._is_asked:
            super().put(value)
        else:
            self._is_asked, self._detokenizer = True, Detokenizer(self._table, value.flatten().tolist())

    def _go_on(self, text: str) -> None:
        text = text if self._has_begun else text.lstrip()
        self._has_begun |= text != ""
        super()._go_on(text)


class Chat:
    """A conversation with a model, turn by turn.

    The model reads the whole conversation at every turn, as the template writes it. Where that leaves less than `ROOM`
    of the longest row, or fewer tokens than an answer may have, the earliest questions and their answers are left out,
    and a warning says so once.

    Args:
        model: in evaluation mode.
        tokenizer: with a chat template.
        decoding: of the answers.
        system: what the system says before all else; None is nothing.
        warn: takes the warning.

    Attributes:
        messages: so far.

    Raises:
        InputError: no chat template, or a bad budget.
    """

    def __init__(
        self,
        model: ThoughtbubblesForCausalLM,
        tokenizer: "PreTrainedTokenizerFast",
        decoding: Decoding,
        system: str | None = None,
        warn: Callable[[str], Any] = print,
    ) -> None:
        self._model, self._tokenizer, self._decoding, self._warn = model, tokenizer, decoding, warn
        self._template = ChatTemplate(tokenizer)
        self._system: list[ChatMessage] = [] if system is None else [{"role": "system", "content": system}]
        ends = [*text_ends(tokenizer, model.generation_config), self._template.end]
        self._ends = list(dict.fromkeys(end for end in ends if end is not None))
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.messages = list(self._system)
        self._warned = False

    @cached_property
    def _table(self) -> TokenTable:
        return TokenTable(self._tokenizer)

    def printer(self, say: Callable[[str], None]) -> AnswerPrinter:
        """What prints an answer as it comes."""
        return AnswerPrinter(self._table, say)

    def ask(self, question: str, streamer: Any = None) -> Generation:
        """Say something, and note what the model answers.

        Raises:
            InputError: a question that does not fit into the longest row, or one that the template refuses.
        """
        messages, ids = self._asked([*self.messages, {"role": "user", "content": question}])
        produced = self._decoding.go_on(self._model, ids, self._ends, self._tokenizer.eos_token_id, streamer)
        answer = decode_after(self._tokenizer, produced, len(ids)).strip().removesuffix(self._template.tail).rstrip()
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        return Generation(question, answer, produced, len(ids))

    def _asked(self, messages: list[ChatMessage]) -> tuple[list[ChatMessage], list[int]]:
        """As much of a conversation as leaves room for an answer, and its ids."""
        longest, first = self._model.config.max_position_embeddings, len(self._system)
        most = longest - max(1, min(self._decoding.max_new_tokens, int(ROOM * longest)))
        ids = self._template.prompt(messages, "the conversation")
        while len(ids) > most and len(messages) > first + 1:
            messages = [*messages[:first], *messages[first + 2 :]]
            ids = self._template.prompt(messages, "the conversation")
            if not self._warned:
                self._warn(f"the conversation is longer than the row of {longest} tokens: its beginning is left out")
                self._warned = True
        if len(ids) >= longest:
            raise InputError(
                f"message of {len(ids)} tokens, with what the template adds: expected at most {longest - 1}"
            )
        return messages, ids
