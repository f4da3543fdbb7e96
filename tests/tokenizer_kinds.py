"""Small tokenizers of the kinds that people bring: other special tokens, added by themselves, spaces kept in words."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

WORDS = ("the", "river", "of", "stone", "house", "under", "green", "cloud", "walk", "sing", "deep", "small", "bread")
CORPUS = [" ".join(WORDS[(i * 7 + j * (i % 5 + 1)) % len(WORDS)] for j in range(60)) + "\n" for i in range(40)]
END = "<|endoftext|>"


def byte_level(folder: Path, bos: str | None = END, eos: str = END, template: str | None = None, **config: Any) -> Path:
    """Write a byte-level BPE; a template such as `<s> $A` says what it adds by itself."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    specials = list(dict.fromkeys(token for token in (bos, eos) if token))
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    if template is not None:
        pairs = [(token, backend.token_to_id(token)) for token in specials]
        backend.post_processor = processors.TemplateProcessing(
            single=template, pair=f"{template} {template.replace('$A', '$B')}", special_tokens=pairs
        )
    return write(folder, backend, {"bos_token": bos, "eos_token": eos, **config})


def sentencepiece(folder: Path) -> Path:
    """Write a BPE whose words begin with the space before them, which is lost at the head of a text."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    backend.train_from_iterator([*CORPUS, "0123456789 : ?"], trainer)
    return write(folder, backend, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})


def write(folder: Path, backend: Tokenizer, config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    values = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return folder
