"""Prepared data: open a folder that `prepare` wrote."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from thoughtbubbles.data.preparation.manifest import Manifest, SplitRecord
from thoughtbubbles.data.preparation.packing import row_lengths
from thoughtbubbles.data.preparation.verification import verify as verify_folder
from thoughtbubbles.data.splitting import Indices
from thoughtbubbles.data.tokenizer import load_data_tokenizer, tokenizer_hash
from thoughtbubbles.support.errors import DataError
from thoughtbubbles.support.files import user_path

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

SPLITS = ("train", "validation")


@dataclass(frozen=True)
class PreparedData:
    """Blocks of tokens for training and validation.

    Attributes:
        path: the prepared folder.
        manifest: what it holds.
        train: one column `input_ids`, read as int64 torch tensors [block_size], or, padded, of each row's own length;
            memory-mapped.
        validation: the same, of documents that train does not hold.
    """

    path: Path
    manifest: Manifest
    train: "Dataset"
    validation: "Dataset"

    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """The tokenizer that made the blocks."""
        return load_data_tokenizer(self.path / "tokenizer")

    def train_lengths(self) -> Indices:
        """[rows]: the tokens of each row of train."""
        size, end = self.manifest.block_size, self.manifest.tokenizer.eos_token_id
        if not self.manifest.is_padded:
            return np.full(len(self.train), size, dtype=np.int64)
        chunks = self.train.data.column("input_ids").chunks
        return np.concatenate([row_lengths(each.flatten().to_numpy().reshape(-1, size), end) for each in chunks])

    def check_packed(self, what: str) -> None:
        """Check that the rows are blocks of one length.

        Args:
            what: names the folder in the message.

        Raises:
            DataError: each document has a row of its own.
        """
        if self.manifest.is_padded:
            raise DataError(f"{what}: its documents have a row each (packing: padded), expected packed blocks")


def load_prepared(path: str | Path, verify: bool = False, progress: bool = False) -> PreparedData:
    """Open a folder that `prepare` wrote.

    Files that were not read whole since they changed last are checked by their sha256 first, below 20 GB.

    Args:
        verify: check everything, whatever its size.
        progress: show how far the checking is.

    Raises:
        DataError: no such folder, not a prepared one, an incomplete one, one of another format version, or one that
            holds something else than was prepared.
    """
    folder = user_path(path)
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist: expected a folder written by `thoughtbubbles prepare`")
    manifest = Manifest.read(folder)
    check_complete(folder, manifest)
    verify_folder(folder, manifest, verify, progress)
    train, validation = (_load_split(folder / split, getattr(manifest, split), manifest) for split in SPLITS)
    return PreparedData(folder, manifest, train, validation)


def check_complete(folder: Path, manifest: Manifest) -> None:
    """Check that a folder holds the parts that its manifest speaks of, without reading the blocks.

    Raises:
        DataError: a part is missing, or tokenizer.json has changed.
    """
    parts = [*(f"{split}/dataset_info.json" for split in SPLITS), "tokenizer/tokenizer.json"]
    for part in parts:
        if not (folder / part).is_file():
            raise DataError(f"{folder} is incomplete: {part} is missing, prepare the data again")
    if (found := tokenizer_hash(folder / "tokenizer")) != manifest.tokenizer.sha256:
        raise DataError(
            f"{folder}/tokenizer/tokenizer.json has sha256 {found[:12]}..., the manifest says "
            f"{manifest.tokenizer.sha256[:12]}...: the tokenizer is not the one that made the blocks"
        )


def _load_split(folder: Path, record: SplitRecord, manifest: Manifest) -> "Dataset":
    import datasets

    try:
        split = datasets.load_from_disk(str(folder))
    except Exception as error:  # Arrow, JSON and file errors alike: the folder is not what was written
        raise DataError(f"{folder} is incomplete or damaged: {error}") from error
    expected = (record.blocks, manifest.block_size)
    found = (len(split), getattr(split.features.get("input_ids"), "length", None))
    if found != expected:
        raise DataError(
            f"{folder} holds {found[0]} blocks of {found[1]}, the manifest says {expected[0]} of {expected[1]}"
        )
    if not manifest.is_padded:
        return split.with_format("torch")
    return split.with_transform(partial(_unpadded, end=manifest.tokenizer.eos_token_id))


def _unpadded(batch: dict[str, list[Any]], end: int) -> dict[str, list[Any]]:
    """Rows of a padded split, each up to its end."""
    import torch

    rows = np.asarray(batch["input_ids"], dtype=np.int64)
    return {"input_ids": [torch.from_numpy(row[:n]) for row, n in zip(rows, row_lengths(rows, end), strict=True)]}
