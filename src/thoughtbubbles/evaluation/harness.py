"""The adapter to lm-evaluation-harness, and a launcher of its command line.

The harness finds no models by itself: `python -m thoughtbubbles.evaluation.harness` registers ours and hands over.
The harness is an optional dependency, so nothing here imports it before it is needed.
"""

import sys
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from thoughtbubbles.data.feed.chat import ChatTemplate
from thoughtbubbles.evaluation.finite import check_finite, finite_logits
from thoughtbubbles.model.budget import Budget
from thoughtbubbles.model.loading import find_model, load_tokenizer
from thoughtbubbles.support.errors import InputError, RunError, one_line
from thoughtbubbles.support.text import decode_continuation, document_ends, encode_text, start_document

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM
else:  # stands before the harness's class, which need not be there
    HFLM = object

MODEL_NAME = "thoughtbubbles"
# Generated at most where a task does not say how much: the harness's own number.
MOST_NEW_TOKENS = 256


def require_harness() -> None:
    """Check that lm-evaluation-harness is installed.

    Raises:
        InputError: saying how to install it.
    """
    if find_spec("lm_eval") is None:
        raise InputError("lm-evaluation-harness is not installed: pip install 'thoughtbubbles[eval]'")


class BudgetedLM(HFLM):
    """HFLM whose padding is masked, so that it never spends budget, and whose budget can be set.

    HFLM pads rows on the right with 0 and hands over no lengths, and 0 is a real token. So rows are handed to it
    with every id one higher: then 0 is padding and nothing else.

    Args:
        pretrained: a run's folder, a model's folder, a hub name, or a model.
        budget: streams per token in place of the model's own.
        use_cache: False recomputes the prefix for each generated token, which the paper's rule (`topk`) needs.
        arguments: of HFLM.
    """

    def __init__(self, pretrained: Any, budget: Budget | None = None, use_cache: bool = True, **arguments: Any) -> None:
        name = find_model(pretrained) if isinstance(pretrained, str) else None
        if name is not None:
            arguments.setdefault("tokenizer", load_tokenizer(name))
        try:
            super().__init__(pretrained if name is None else name, **arguments)
        except ValueError as error:  # of weights that do not fit, too
            raise InputError(f"model {name or 'given'}: {one_line(error)}") from error
        start = start_document(self.tokenizer)
        self._start = [self.custom_prefix_token_id] if self.custom_prefix_token_id is not None else start
        self._chat = False
        self.budget = budget
        self.use_cache = use_cache
        self.truncated = 0  # texts so far whose left end did not fit
        self._longest_continuation: int | None = None
        self.model.config.exact_budget(budget)

    @property
    def max_gen_toks(self) -> int:
        """Tokens to generate where a task does not say: at most half of the longest row, the prompt needs room."""
        return min(MOST_NEW_TOKENS, int(self.max_length) // 2)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context."""
        return int(self._start[-1])

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> str:
        """A conversation as text; from now on texts are such, whose special tokens the template wrote."""
        self._chat = True
        return str(super().apply_chat_template(*args, **kwargs))

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """Ids of a text by itself: nothing is added to it, and the words of a special token are ordinary text."""
        if self._chat:
            ids: list[int] = self.tokenizer.encode(string, add_special_tokens=False)
        else:
            ids = encode_text(self.tokenizer, string)
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
        """The text of a token, or of tokens that go on with a prompt."""
        if isinstance(tokens, int):
            return str(self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens))
        return decode_continuation(self.tokenizer, tokens, skip_special_tokens)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of a context, what precedes a text in front, and of what follows it."""
        before, after = super()._encode_pair(context, continuation)
        return self._led(before), after

    def _led(self, ids: list[int]) -> list[int]:
        """Ids of a text after what precedes a text."""
        return ids if self._chat else self._start + ids

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations, of requests (key, context ids, continuation ids).

        Raises:
            InputError: for one that is not finite.
        """
        self.truncated += sum(len(context) + len(text) > self.max_length + 1 for _, context, text in requests)
        fitting = [(key, *cut_left(context, text, self.max_length)) for key, context, text in requests]
        self._longest_continuation = max((len(continuation) for _, _, continuation in fitting), default=None)
        raised = [(key, _raise(context), _raise(continuation)) for key, context, continuation in fitting]
        # Rolling scores come batch by batch, and a bar for each would be too many.
        silent = disable_tqdm or override_bs is not None
        scores: list[tuple[float, bool]] = super()._loglikelihood_tokens(raised, silent, override_bs)
        check_finite(torch.tensor([score for score, _ in scores]), "log-likelihoods")
        return scores

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits [B, K, V + 1] of raised ids [B, T], of the last K columns, in which all continuations lie."""
        mask = (inps > 0).long()
        keep = self._longest_continuation
        if keep is not None:
            keep = min(inps.shape[1] - int(mask.sum(1).min()) + keep, inps.shape[1])
        mixed = self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(self.device.type, dtype=mixed, enabled=mixed is not None):
            ids = (inps - 1).clamp(min=0)
            out = self.model(ids, attention_mask=mask, budget=self.budget, logits_to_keep=keep or 0)
        return F.pad(out.logits, (1, 0), value=-torch.inf)

    def tok_batch_encode(
        self, strings: list[str], *args: Any, left_truncate_len: int | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Ids and mask [B, T] of prompts, padded on the left and cut there to `left_truncate_len`."""
        rows = [self._led(self.tok_encode(string)) for string in strings]
        longest = max(map(len, rows))
        if left_truncate_len is not None and longest > left_truncate_len:
            self.truncated += sum(len(row) > left_truncate_len for row in rows)
            rows, longest = [row[-left_truncate_len:] for row in rows], left_truncate_len
        ids = torch.tensor([[self.tokenizer.pad_token_id] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        return ids, mask

    def _ends(self) -> list[int]:
        """What ends a text, and in a conversation an answer."""
        answer = ChatTemplate(self.tokenizer).end if self._chat else None
        return document_ends(self.tokenizer) + ([] if answer is None else [answer])

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **settings: Any) -> Tensor:
        """Ids [B, T] of prompts and what follows them; greedy where the task asks for no temperature."""
        from lm_eval.models.utils_hf import stop_sequences_criteria

        if settings.get("temperature", 0.0) == 0.0 and not settings.get("do_sample"):
            settings.pop("temperature", None)
            settings["do_sample"] = False
        criteria = stop_sequences_criteria(self.tokenizer, stop, context.shape[1], context.shape[0])
        mixed = self.mixed_precision_dtype
        with torch.autocast(self.device.type, dtype=mixed, enabled=mixed is not None):
            out: Tensor = self.model.generate(
                input_ids=context,
                max_length=max_length,
                stopping_criteria=criteria,
                eos_token_id=self._ends() or None,
                pad_token_id=self.tokenizer.pad_token_id,
                use_cache=self.use_cache,
                budget=self.budget,
                logits_processor=finite_logits(),
                **settings,
            )
        return out


@cache
def adapter() -> "type[HFLM]":
    """The harness's model class for Thoughtbubbles, registered under the name `thoughtbubbles`.

    Raises:
        InputError: if the harness is not installed.
    """
    require_harness()
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM

    @register_model(MODEL_NAME)
    class ThoughtbubblesLM(BudgetedLM, HFLM):
        pass

    return ThoughtbubblesLM


def cut_left(context: list[int], continuation: list[int], longest: int) -> tuple[list[int], list[int]]:
    """What fits a row of `longest` tokens of a context and a continuation to score, whose last token is not read.

    Cut is on the left, a continuation too long for a row by itself as well: then only its end is scored.
    """
    scored = min(len(continuation), longest)
    row = (context + continuation)[-(longest + 1) :]
    return row[:-scored], row[-scored:]


def _raise(ids: list[int]) -> list[int]:
    return [token + 1 for token in ids]


def main() -> None:
    """Register the model and run the harness's own command line, which ends as our own commands do."""
    try:
        adapter()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except (InputError, RunError) as end:
        print(f"thoughtbubbles: {end}", file=sys.stderr)
        sys.exit(end.exit_code)


if __name__ == "__main__":
    main()
