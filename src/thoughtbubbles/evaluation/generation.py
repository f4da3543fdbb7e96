"""Generating text from a prompt."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers.generation.streamers import BaseStreamer

from thoughtbubbles.evaluation.finite import finite_logits
from thoughtbubbles.model.budget import Budget
from thoughtbubbles.model.modeling import ThoughtbubblesForCausalLM
from thoughtbubbles.support.detokenizer import Detokenizer, TokenTable
from thoughtbubbles.support.text import decode_after, encode_text, start_document, text_ends

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Beyond them float32 overflows, or nothing is left to draw from.
RANGES: dict[str, tuple[float, float, str]] = {
    "temperature": (1e-5, 1e5, "0, or a number from 0.00001 to 100000"),
    "top_k": (0, math.inf, "0, or a whole number above it"),
    "top_p": (0, 1, "a number from 0 to 1"),
    "min_p": (0, 1, "a number from 0 to 1"),
    "repetition_penalty": (0.01, 100, "a number from 0.01 to 100"),
}


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: of the softmax; 0 takes the likeliest token.
        top_k: only the k likeliest tokens; 0 is all.
        top_p: only the likeliest tokens that together have this probability; 1 is all.
        min_p: only tokens of at least this share of the likeliest one's probability; 0 is all.
        repetition_penalty: above 1 makes tokens that occurred less likely; 1 is none.

    Raises:
        ValueError: for a number outside of `RANGES`, or one that is not finite.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, (least, most, words) in RANGES.items():
            value = getattr(self, name)
            # Written so that a value that is no number does not pass.
            if not (least <= value <= most or (name == "temperature" and value == 0)):
                raise ValueError(f"{name}={value}: expected {words}")

    def arguments(self) -> dict[str, Any]:
        """Arguments of `generate` in transformers."""
        arguments: dict[str, Any] = {"do_sample": self.temperature > 0, "repetition_penalty": self.repetition_penalty}
        if self.temperature > 0:
            arguments |= {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
            arguments |= {"min_p": self.min_p} if self.min_p > 0 else {}
        return arguments


@dataclass(frozen=True)
class Generation:
    """A continued prompt.

    Attributes:
        prompt: as given.
        continuation: the text after it.
        ids: token ids of both, the document separator in front included.
        prompt_tokens: how many of them are the separator's and the prompt's.
    """

    prompt: str
    continuation: str
    ids: list[int]
    prompt_tokens: int


@dataclass(frozen=True)
class Decoding:
    """How a text is gone on with.

    Attributes:
        max_new_tokens: to write at most.
        sampling: how each is chosen.
        budget: streams per token; None is the model's own.
        seed: of the sampling.
    """

    max_new_tokens: int = 100
    sampling: Sampling = field(default_factory=Sampling)
    budget: Budget | None = None
    seed: int = 0

    def go_on(
        self,
        model: ThoughtbubblesForCausalLM,
        ids: list[int],
        ends: Iterable[int],
        pad: int | None,
        streamer: Any = None,
    ) -> list[int]:
        """Some ids and what the model writes after them, up to one of the ends, which is there too.

        Raises:
            ValueError: for ids that leave no room in the longest row, or a bad budget.
            InputError: for a model whose logits are not finite.
        """
        generator: Any = model  # transformers types `generate` for its own classes
        torch.manual_seed(self.seed)
        row = torch.tensor([ids], device=model.device)
        out = generator.generate(
            row,
            attention_mask=torch.ones_like(row),
            max_new_tokens=self.max_new_tokens,
            eos_token_id=list(ends) or None,
            pad_token_id=pad,
            budget=self.budget,
            streamer=streamer,
            logits_processor=finite_logits(),
            **self.sampling.arguments(),
        )
        produced: list[int] = out[0].tolist()
        return produced


class TextPrinter(BaseStreamer):
    """Says a row's text as its tokens come: what is said in all is the text of all tokens.

    The streamer of transformers decodes each line by itself, which loses the space that a line may begin with.

    Args:
        table: of the tokenizer.
        say: takes each new part of the text.
    """

    def __init__(self, table: TokenTable, say: Callable[[str], None]) -> None:
        self._table, self._say = table, say
        self._detokenizer = Detokenizer(table)

    def put(self, value: torch.Tensor) -> None:
        """Take the next tokens."""
        self._go_on("".join(map(self._detokenizer.push, value.flatten().tolist())))

    def end(self) -> None:
        """Say what is left, and end the line."""
        self._go_on(self._detokenizer.finish())
        self._say("\n")

    def _go_on(self, text: str) -> None:
        if text:
            self._say(text)


def generate_text(
    model: ThoughtbubblesForCausalLM,
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str = "",
    max_new_tokens: int = 100,
    sampling: Sampling | None = None,
    budget: Budget | None = None,
    seed: int = 0,
    streamer: Any = None,
) -> Generation:
    """Continue a prompt up to the end of the document or, with a warning, of the longest row that the model takes.

    In front stands what the model's data put before each document.

    Raises:
        ValueError: for a prompt that leaves no room, an empty one where the tokenizer has no token to start with, or a
            bad budget.
        InputError: for a model whose logits are not finite.
    """
    model.config.exact_budget(budget)
    ids: list[int] = start_document(tokenizer) + encode_text(tokenizer, prompt)
    longest = model.config.max_position_embeddings
    if not ids:
        raise ValueError("prompt='': expected some text, since the tokenizer has no token to start a document with")
    if len(ids) >= longest:
        raise ValueError(f"prompt of {len(ids)} tokens: expected at most {longest - 1}, separator included")
    settings = Decoding(max_new_tokens, sampling or Sampling(), budget, seed)
    ends = text_ends(tokenizer, model.generation_config)
    produced = settings.go_on(model, ids, ends, tokenizer.eos_token_id, streamer)
    return Generation(prompt, decode_after(tokenizer, produced, len(ids)), produced, len(ids))
