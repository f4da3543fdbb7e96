"""Weights in a folder, read and written a few at a time, so that a model is never held twice."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.modeling_utils import load_state_dict
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from thoughtbubbles.support.errors import one_line

SMALLEST_SHARD = 500_000_000
"""Bytes of a written file, or a tenth of the model where that is more: what is held at a time."""


class StoredWeights:
    """The weights of a folder as transformers finds them: one file or the shards of an index, the safe format first.

    Attributes:
        shapes: every tensor by its name, on the meta device.
    """

    def __init__(self, folder: Path) -> None:
        """Find them.

        Raises:
            ValueError: no weights, or a file that is missing or cannot be read.
        """
        self._files: dict[str, Path] = {}
        self.shapes: dict[str, Tensor] = {}
        for file in _files(folder):
            for name, tensor in _load(file, "meta").items():
                self._files[name] = file
                self.shapes[name] = tensor
        self._held: dict[Path, dict[str, Tensor]] = {}

    def read(self, name: str) -> Tensor:
        """A tensor, whose memory may be the file's."""
        file = self._files[name]
        if file.suffix == ".safetensors":
            # Opened each time: as long as a file is mapped, all that was read of it counts as this process's memory.
            with safe_open(file, framework="pt") as opened:
                found: Tensor = opened.get_tensor(name)
                return found
        if file not in self._held:
            self._held[file] = _load(file, "cpu")
        return self._held[file][name]

    def close(self) -> None:
        """Let go of files that can only be read whole: what of them is not held elsewhere leaves memory."""
        self._held.clear()


def write_weights(shapes: Mapping[str, Tensor], tensor_of: Callable[[str], Tensor], folder: Path,
                  after_each: Callable[[], None]) -> None:  # fmt: skip
    """Write a model's weights to a folder, in shards where there are many.

    Args:
        shapes: on the meta device, by name.
        tensor_of: makes the tensor of a name.
        after_each: called when a file is written, and nothing of it is needed any more.
    """
    total = sum(tensor.nbytes for tensor in shapes.values())
    split = split_torch_state_dict_into_shards(dict(shapes), max_shard_size=max(SMALLEST_SHARD, total // 10))
    for file, names in split.filename_to_tensors.items():
        save_file({name: tensor_of(name) for name in names}, folder / file, metadata={"format": "pt"})
        after_each()
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _files(folder: Path) -> list[Path]:
    for plain, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        if (folder / plain).is_file():
            return [folder / plain]
        if (folder / index).is_file():
            return _shards(folder, index)
    raise ValueError(f"expected weights, {SAFE_WEIGHTS_NAME} or {WEIGHTS_NAME} or the index of either")


def _shards(folder: Path, index: str) -> list[Path]:
    """The files that an index names, in their order."""
    try:
        names: Iterable[str] = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()
        files = [folder / name for name in sorted(set(names))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not the index of a model's files: {one_line(error)}") from None
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file.name} is missing: expected it, since {index} names it")
    return files


def _load(file: Path, place: str) -> dict[str, Tensor]:
    try:
        found = load_state_dict(file, map_location=place, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # safetensors and torch have exceptions of their own
        raise ValueError(f"{file.name} cannot be read: {one_line(error)}") from None
    if not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise ValueError(f"{file.name}: expected tensors by name alone")
    return found


def same_numbers(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal, of one shape and type."""
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
