"""Options of commands and recipes as dataclasses, each with its help; nothing here takes time to import."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thoughtbubbles.model.budget import Budget

PYTHON_STDLIB = "python-stdlib"
SourceName = str | Mapping[str, Any]


def option(help_text: str, default: Any = MISSING) -> Any:
    """A field of a dataclass whose help is its documentation."""
    metadata = {"help": help_text}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Preparation:
    """What to prepare, and how: whatever changes the result of `prepare`, with the help of the command.

    A source is `python-stdlib` (the running Python's standard library, a file a document), a text file (one
    document), a folder (every text, parquet and jsonl file below it), a parquet or jsonl file (a row a document), a
    glob, or a dataset of the Hugging Face hub (a row a document) as
    `hf:NAME?config=C&split=S&field=F&streaming=true&revision=R&data_files=G`, of which all but NAME can be left out
    and NAME can be a folder; or a mapping with `hub` or `path` and those keys, or with `template`, of Jinja over the
    fields of a row, in place of `field`.

    A document of `sources` that holds the same text as one of `validation` is left out. Tokens are counted with
    separators, and the document that reaches `limit_tokens` is the last; a tokenizer is trained on documents beyond
    it too. It is trained on the training documents, or on a sample of them of `TOKENIZER_TRAINING_BYTES`.
    """

    sources: Sequence[SourceName] = option("Names of sources.", (PYTHON_STDLIB,))
    text_field: str = option("Field of rows that holds the text, where a source names none.", "text")
    tokenizer: str | None = option(
        "Tokenizer folder, or name on the hub, with an eos token; without, a byte-level BPE is trained on the corpus.",
        None,
    )
    vocab_size: int = option("Vocabulary of the trained tokenizer, at most; of no effect on a given one.", 4096)
    block_size: int = option("Tokens a block.", 512)
    packing: str = option(
        "`packed`, documents one after another, cut into blocks; or `padded`, each by itself in a row, filled up to "
        "the longest of its forward pass; of one longer than a block the end is kept.",
        "packed",
    )
    validation_fraction: float = option("Share of the documents held out.", 0.05)
    validation: Sequence[SourceName] = option("Names of sources for validation, instead of held-out documents.", ())
    limit_tokens: int | None = option("Tokens to read of each source at most; validation sources are read whole.", None)
    seed: int = option("Seed of the split and of the documents' order.", 0)


@dataclass(frozen=True)
class PlanOptions:
    """What is to be planned of a model, with the help of the command; None is what the model or its recipe says."""

    length: int | None = option(
        "Tokens a row; if not given, a block of the recipe's data, or the model's longest row.", None
    )
    budget: "Budget | None" = option("Streams per token; if not given, the model's own, or those of the recipe.", None)
    batch_size: int | None = option("Rows of a training step; if not given, the recipe's, or 16 a GPU.", None)
    tokens: float | None = option(
        "Tokens to train on, such as 2.5e9, rounded up to whole steps; if not given, those of the recipe.", None
    )
    precision: str | None = option("`float32` or `bfloat16`; if not given, the recipe's, or bfloat16.", None)
    device_flops: float | None = option(
        "A device's peak in operations per second, such as 989e12 for an H100 in bfloat16: gives times.", None
    )
    mfu: float | None = option("Share of that peak which training reaches; 0.4 if not given.", None)
    memory: str | None = option("A device's memory, such as 80GB or 24GiB: says what fits.", None)
    gpus: int = option("Devices that train together.", 1)
    sharding: str | None = option(
        "How they share weights, gradients and moments: `ddp`, not at all, or `fsdp`; if not given, the recipe's, "
        "or ddp.",
        None,
    )
    variant: str | None = option("Which variant, where the recipe is that of a comparison.", None)
