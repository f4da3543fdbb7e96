"""A model on show: what the demo page asks of it."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING

import torch

from thoughtbubbles.budget import Budget
from thoughtbubbles.cache import StreamCache
from thoughtbubbles.errors import InputError
from thoughtbubbles.inspection.ablation import logits_without
from thoughtbubbles.inspection.trace import BubbleTrace, to_ids, trace_bubbles
from thoughtbubbles.modeling import ThoughtbubblesForCausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_TOKENS = 512
MOST_CHARACTERS = 20_000
TEMPERATURE = 0.8
TOP = 8


@dataclass(frozen=True)
class Exhibit:
    """A model with its tokenizer and its name.

    Hooks observe the model while it runs, so that it runs for one caller at a time.
    """

    name: str
    model: ThoughtbubblesForCausalLM
    tokenizer: "PreTrainedTokenizerBase"
    lock: Lock = field(default_factory=Lock)

    @property
    def most_tokens(self) -> int:
        """The longest text that is shown, in tokens."""
        return min(MOST_TOKENS, self.model.config.max_position_embeddings)

    def trace(self, text: str, budget: Budget) -> tuple[BubbleTrace, str]:
        """The trace of a text, and a message if the text was too long and is cut; "" if not.

        Raises:
            ValueError: for a budget that the model cannot have.
            InputError: for a text without a token.
        """
        ids, message = self._read(text, self.most_tokens)
        with self.lock:
            return trace_bubbles(self.model, self.tokenizer, ids, budget), message

    def next_tokens(self, trace: BubbleTrace, token: int) -> list[tuple[str, float, float | None]]:
        """The likeliest next tokens after one: each with its probability with the token's forks and without them.

        Without gates there are no forks to delete, and None stands in place of the second.

        Raises:
            ValueError: for a token that the trace does not have.
        """
        with self.lock, torch.inference_mode():
            if self.model.config.gated_layers:
                logits, ablated = logits_without(self.model, trace.ids, [token], trace.budget)
                without = ablated[0, token].float().softmax(-1)
            else:
                logits, without = self.model(torch.tensor([trace.ids], device=self.model.device)).logits, None
        with_forks = logits[0, token].float().softmax(-1)
        best = with_forks.topk(min(TOP, len(with_forks))).indices.tolist()
        return [(self._piece(i), with_forks[i].item(), None if without is None else without[i].item()) for i in best]

    def prompt(self, text: str, count: int) -> tuple[list[int], str]:
        """The ids of a text to go on with by `count` tokens, and a message if it or they are cut; "" if not.

        Half of the longest row is the text's, whatever the count.

        Raises:
            InputError: for a text without a token.
        """
        longest = self.model.config.max_position_embeddings
        ids, message = self._read(text, min(self.most_tokens, max(longest - count, longest // 2, 1)))
        if count > (room := longest - len(ids)):
            message = f"{message} The model's longest row ends after {room} new tokens.".strip()
        return ids, message

    def generate(
        self, ids: list[int], budget: Budget, count: int, seed: int = 0
    ) -> Iterator[tuple[list[str], list[int]]]:
        """Go on with a prompt: after each new token all pieces, and the streams of each in the last block.

        Decoding uses the cache (Design 3.8) and samples at temperature 0.8, up to the end of the document or of the
        longest row.

        Raises:
            ValueError: for a budget that the model cannot have.
        """
        cache, generator = StreamCache(), torch.Generator().manual_seed(seed)
        pieces, sizes, new = [self._piece(i) for i in ids], [], ids
        room = self.model.config.max_position_embeddings - len(ids)
        for _ in range(min(count, room) + 1):
            with self.lock, torch.inference_mode():
                row = torch.tensor([new], device=self.model.device)
                out = self.model(row, cache=cache, budget=budget, logits_to_keep=1, output_streams=True)
            sizes += out.streams[-1].bubble_sizes()[0].tolist()
            yield list(pieces), list(sizes)
            probabilities = (out.logits[0, -1].float() / TEMPERATURE).softmax(-1).cpu()
            new = [int(torch.multinomial(probabilities, 1, generator=generator))]
            if new[0] == self.tokenizer.eos_token_id:
                return
            pieces.append(self._piece(new[0]))

    def _read(self, text: str, most: int) -> tuple[list[int], str]:
        ids = to_ids(self.tokenizer, text[:MOST_CHARACTERS])
        if not ids:
            raise InputError("text '': expected at least one token")
        if len(text) <= MOST_CHARACTERS and len(ids) <= most:
            return ids, ""
        return ids[:most], f"The text is too long: only its first {min(most, len(ids))} tokens are taken."

    def _piece(self, token: int) -> str:
        return str(self.tokenizer.decode([token]))
