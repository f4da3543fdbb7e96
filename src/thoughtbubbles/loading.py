"""Trained models from disk."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from thoughtbubbles.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from thoughtbubbles.modeling import ThoughtbubblesForCausalLM


def find_model(path: str | Path) -> Path:
    """The model folder at `path`: itself, or the `model` folder of a run.

    Raises:
        InputError: for a path that is neither, or a folder without weights.
    """
    given = Path(path)
    folder = next((f for f in (given, given / "model") if (f / "config.json").is_file()), None)
    if folder is None:
        raise InputError(f"model {given}: expected a folder with config.json, or that of a finished run")
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise InputError(f"model {folder}: config.json is not a configuration: {error}") from None
    if kind != "thoughtbubbles":
        raise InputError(f"model {folder}: model_type is {kind!r}, expected 'thoughtbubbles'")
    if not any(folder.glob("*.safetensors")):
        raise InputError(f"model {folder}: expected weights, a file *.safetensors, beside config.json")
    return folder


def load_model(path: str | Path, device: str | None = None) -> "ThoughtbubblesForCausalLM":
    """A trained model in evaluation mode, on `device`, by default a GPU if there is one.

    Raises:
        InputError: as `find_model`, or for weights that do not fit the configuration.
    """
    import torch
    from transformers.utils import logging

    from thoughtbubbles.modeling import ThoughtbubblesForCausalLM

    folder = find_model(path)
    logging.disable_progress_bar()
    try:
        model = ThoughtbubblesForCausalLM.from_pretrained(folder)
    except Exception as error:  # safetensors, JSON and shape errors alike: the folder is not what was saved
        raise InputError(f"model {folder}: {' '.join(str(error).split())}") from error
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.nn.Module.to(model, place)
    model.eval()
    return model


def load_tokenizer(path: str | Path) -> "PreTrainedTokenizerBase":
    """The tokenizer saved beside a model.

    Raises:
        InputError: as `find_model`, or where there is none.
    """
    from transformers import AutoTokenizer

    folder = find_model(path)
    if not (folder / "tokenizer.json").is_file():
        raise InputError(f"model {folder}: expected tokenizer.json beside it")
    return AutoTokenizer.from_pretrained(folder)
