"""A model on show: what the demo page asks of it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING

import torch

from thoughtbubbles.inspection.ablation import logits_without
from thoughtbubbles.inspection.trace import BubbleTrace, to_ids, trace_bubbles
from thoughtbubbles.model.budget import Budget
from thoughtbubbles.model.cache import StreamCache
from thoughtbubbles.model.modeling import ThoughtbubblesForCausalLM
from thoughtbubbles.support.errors import InputError
from thoughtbubbles.support.text import document_ends, token_pieces

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

    @property
    def has_budget(self) -> bool:
        """Whether the budget changes anything: a dense model has no streams to spend it on."""
        return bool(self.model.config.gated_layers or self.model.config.copied_layers)

    def read(self, text: str) -> tuple[list[int], str]:
        """The ids of a text to show, and a message if it is too long and its end is cut off; "" if not.

        Raises:
            InputError: for a text without a token.
        """
        ids = self._ids(text[:MOST_CHARACTERS])
        kept = ids[: self.most_tokens]
        return kept, _say_cut("first", kept) if len(text) > MOST_CHARACTERS or len(kept) < len(ids) else ""

    def prompt(self, text: str, count: int) -> tuple[list[int], str]:
        """The ids of a text to go on with by `count` tokens, and a message if its beginning is cut off; "" if not.

        Half of the longest row is the text's, whatever the count.

        Raises:
            InputError: for a text without a token.
        """
        longest = self.model.config.max_position_embeddings
        most = min(self.most_tokens, max(longest - count, longest // 2, 1))
        ids = self._ids(text[-MOST_CHARACTERS:])
        kept = ids[-most:]
        return kept, _say_cut("last", kept) if len(text) > MOST_CHARACTERS or len(kept) < len(ids) else ""

    def trace(self, ids: Sequence[int], budget: Budget) -> BubbleTrace:
        """The trace of a row of ids.

        Raises:
            ValueError: for a budget that the model cannot have, or ids as `trace_bubbles`.
        """
        with self.lock:
            return trace_bubbles(self.model, self.tokenizer, ids, budget)

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
        words = token_pieces(self.tokenizer, best)
        chances = [(with_forks[i].item(), None if without is None else without[i].item()) for i in best]
        return [(word, *chance) for word, chance in zip(words, chances, strict=True)]

    def generate(self, ids: Sequence[int], budget: Budget, count: int, seed: int = 0) -> Iterator["Growth"]:
        """Go on with a prompt: what there is before the first new token, and after each.

        Decoding uses the cache (method: Cache) and samples at temperature 0.8, up to the end of the document or of
        the longest row.

        Raises:
            ValueError: for a budget that the model cannot have.
        """
        cache, generator = StreamCache(), torch.Generator().manual_seed(seed)
        ids, new, sizes = list(ids), list(ids), []
        ends = document_ends(self.tokenizer)
        longest = self.model.config.max_position_embeddings
        for step in range(count + 1):
            with self.lock, torch.inference_mode():
                row = torch.tensor([new], device=self.model.device)
                out = self.model(row, cache=cache, budget=budget, logits_to_keep=1, output_streams=True)
            sizes += out.streams[-1].bubble_sizes()[0].tolist()
            row_ended = len(ids) == longest and step < count
            yield Growth(list(ids), self.pieces(ids), list(sizes), row_ended)
            probabilities = (out.logits[0, -1].float() / TEMPERATURE).softmax(-1).cpu()
            new = [int(torch.multinomial(probabilities, 1, generator=generator))]
            if row_ended or step == count or new[0] in ends:
                return
            ids += new

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each token."""
        return token_pieces(self.tokenizer, ids)

    def _ids(self, text: str) -> list[int]:
        ids = to_ids(self.tokenizer, text)
        if not ids:
            raise InputError("text '': expected at least one token")
        return ids


@dataclass(frozen=True)
class Growth:
    """A text that is being generated.

    Attributes:
        ids: of all its tokens, the prompt's too.
        pieces: the text of each.
        sizes: streams of each in the last block, as decoded.
        row_ended: whether it stops here because the model takes no longer row.
    """

    ids: list[int]
    pieces: list[str]
    sizes: list[int]
    row_ended: bool


def _say_cut(end: str, kept: Sequence[int]) -> str:
    count = f"{end} token is" if len(kept) == 1 else f"{end} {len(kept)} tokens are"
    return f"The text is too long: only its {count} taken."
