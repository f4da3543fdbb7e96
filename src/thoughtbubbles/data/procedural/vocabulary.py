"""The tokenizer of a procedural task: one token a word, and each digit is one."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from thoughtbubbles.data.tokenizer import END_OF_TEXT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

UNKNOWN = "<|unknown|>"


def word_tokenizer(words: Sequence[str]) -> "PreTrainedTokenizerFast":
    """A tokenizer of a fixed vocabulary, which decodes to the text as it was.

    Args:
        words: cut out of a text from left to right, the longest that fits first; any other character is
            `<|unknown|>`. Their ids are from 2 on, after `<|endoftext|>` (id 0, also the bos token) and `<|unknown|>`.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: token for token, word in enumerate((END_OF_TEXT, UNKNOWN, *words))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    longest_first = sorted(words, key=len, reverse=True)
    pattern = "|".join([*map(re.escape, longest_first), r"[\s\S]"])
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, unk_token=UNKNOWN
    )
