"""Small tokenizers of the kinds that people bring: other special tokens, added by themselves, spaces kept in words."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

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


def byte_fallback(folder: Path, strips: bool = True) -> Path:
    """Write a BPE that spells what it has no word for in tokens of one byte, as Llama 2 does or, unless it `strips` the
    space at the head of a text, Gemma."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend("▁")] if strips else []), normalizers.Replace(" ", "▁")]
    )
    stripping = [decoders.Strip(" ", 1, 0)] if strips else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *stripping]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=["▁", *"abcdefghijklmnopqrstuvwxyz"],
        show_progress=False,
    )
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    backend.train_from_iterator(CORPUS, trainer)
    content = json.loads(backend.to_str())
    content["pre_tokenizer"] = None
    # The bytes are words of the vocabulary like others, and no special ones.
    vocab = content["model"]["vocab"]
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    return write(
        folder,
        Tokenizer.from_str(json.dumps(content)),
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    )


def word_pieces(folder: Path) -> Path:
    """Write a tokenizer whose words are put together with spaces, but for pieces that begin with ##."""
    vocab = ["[UNK]", "[CLS]", "[SEP]", *WORDS, *(f"##{word}" for word in WORDS), ".", ",", "'"]
    backend = Tokenizer(models.WordPiece({word: place for place, word in enumerate(vocab)}, unk_token="[UNK]"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    backend.add_special_tokens(["[UNK]", "[CLS]", "[SEP]"])
    return write(folder, backend, {"bos_token": "[CLS]", "eos_token": "[SEP]", "unk_token": "[UNK]"})


def word_ends(folder: Path) -> Path:
    """Write a BPE whose words end in </w>, which reads as a space unless the text ends there."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Whitespace(), decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>", "</s>"], end_of_word_suffix="</w>", show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return write(folder, backend, {"eos_token": "</s>", "unk_token": "<unk>"})


def write(folder: Path, backend: Tokenizer, config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    values = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return folder
