"""Texts to prepare, as the tests of the data path have them."""

from tests.data.conftest import corpus, texts, tokenizer_folder

__all__ = ["corpus", "texts", "tokenizer_folder"]
