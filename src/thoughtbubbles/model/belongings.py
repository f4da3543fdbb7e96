"""What comes with a model's weights from one folder to another: tokenizer, generation settings, licences."""

import shutil
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from thoughtbubbles.support.errors import InputError, library_reason
from thoughtbubbles.support.files import json_text, read_record, write_text
from thoughtbubbles.support.text import record_start, start_document

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "tekken.json")
GENERATION_FILE = "generation_config.json"
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


def bring_tokenizer(name: str, folder: Path, output: Path) -> str | None:
    """Save the tokenizer that AutoTokenizer gives for a model, and record what it puts before a text.

    Args:
        name: of the model, as transformers takes it.
        folder: where its files are.
        output: a folder.

    Returns:
        The token before a text; None where there is no tokenizer, or not one such token.

    Raises:
        InputError: for files of a tokenizer that are none, or one that only code of its own can read.
    """
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        return None
    tokenizer = _load(name, name)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise InputError(f"source {name}: its tokenizer is a slow one, expected one that can be a tokenizer.json")
    tokenizer.init_kwargs.pop("auto_map", None)
    start = start_document(tokenizer)
    if len(start) == 1:
        record_start(tokenizer, start[0])
    tokenizer.save_pretrained(str(output))
    if not _same(tokenizer, _load(str(output), name)):
        # Their class makes another tokenizer of the file for a model of this kind; this one takes it as it is.
        file = output / "tokenizer_config.json"
        write_text(file, json_text({**read_record(file), "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2))
        if not _same(tokenizer, _load(str(output), name)):
            raise InputError(f"source {name}: its tokenizer is another one once it is saved")
    return str(tokenizer.convert_ids_to_tokens(start[0])) if len(start) == 1 else None


def _load(folder: str, name: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the libraries raise anything
        raise InputError(f"source {name}: its tokenizer: {library_reason(error)}") from error


def _same(one: PreTrainedTokenizerFast, other: Any) -> bool:
    texts = [tokenizer.backend_tokenizer.to_str() for tokenizer in (one, other)]
    return texts[0] == texts[1] and one.chat_template == other.chat_template


def read_generation(folder: Path) -> GenerationConfig | None:
    """The settings for `generate` that a folder has, as far as they are `usable`.

    Raises:
        InputError: for a file that is no JSON object.
    """
    file = folder / GENERATION_FILE
    return usable(GenerationConfig.from_dict(read_record(file))) if file.is_file() else None


def bring_generation(folder: Path, output: Path) -> None:
    """Write the settings for `generate` that a folder has, where it has some."""
    if (settings := read_generation(folder)) is not None:
        write_text(output / GENERATION_FILE, json_text(settings.to_diff_dict(), indent=2) + "\n")


def usable(settings: GenerationConfig) -> GenerationConfig:
    """A copy of settings for `generate` without those that our models refuse, or that transformers would not save.

    It saves none that are for sampling beside those that say not to sample, where they are without effect.
    """
    kept = GenerationConfig.from_dict(settings.to_dict())
    kept.cache_implementation = None
    if not kept.do_sample:
        for name in SAMPLING:
            setattr(kept, name, None)
    return kept


def bring_licences(folder: Path, output: Path) -> None:
    """Copy what says under which terms a model may be used."""
    for pattern in LICENCES:
        for file in folder.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, output / file.name)
