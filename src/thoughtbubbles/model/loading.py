"""Trained models, from disk or from the hub."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thoughtbubbles.support.errors import InputError, RunError, is_network, library_reason
from thoughtbubbles.support.files import user_path
from thoughtbubbles.support.text import recorded_start

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    from thoughtbubbles.model.configuration import ThoughtbubblesConfig
    from thoughtbubbles.model.modeling import ThoughtbubblesForCausalLM

__all__ = ["load_config", "load_model", "load_tokenizer"]

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def find_model(path: str | Path) -> str:
    """What `from_pretrained` takes for `path`: itself, the `model` folder of a run, or a hub model's name.

    Raises:
        InputError: for a path that is none of them, or a folder without weights.
    """
    given = user_path(path)
    folder = next((f for f in (given, given / "model") if (f / "config.json").is_file()), None)
    if folder is None:
        if not given.exists() and HUB_NAME.fullmatch(str(path)):
            return str(path)
        raise InputError(f"model {given}: expected a folder with config.json, or that of a finished run")
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"model {folder}: config.json is not a configuration: {error}") from None
    if kind != "thoughtbubbles":
        raise InputError(f"model {folder}: model_type is {kind!r}, expected 'thoughtbubbles'")
    if not any(folder.glob("*.safetensors")):
        raise InputError(f"model {folder}: expected weights, a file *.safetensors, beside config.json")
    return str(folder)


def load_model(path: str | Path, device: str | None = None) -> "ThoughtbubblesForCausalLM":
    """A trained model in evaluation mode, on `device`, by default a GPU if there is one.

    Raises:
        InputError: as `find_model`, or for weights that do not fit the configuration.
    """
    import torch

    model = load_weights(path)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.nn.Module.to(model, place)
    model.eval()
    return model


def load_weights(path: str | Path, **arguments: Any) -> "ThoughtbubblesForCausalLM":
    """A trained model as `from_pretrained` gives it.

    Args:
        arguments: for `from_pretrained`.

    Raises:
        InputError: as `find_model`, or for weights that do not fit the configuration.
    """
    from transformers.utils import logging

    from thoughtbubbles.model.modeling import ThoughtbubblesForCausalLM

    name = find_model(path)
    logging.disable_progress_bar()
    try:
        return ThoughtbubblesForCausalLM.from_pretrained(name, trust_remote_code=False, **arguments)
    except Exception as error:  # hub, safetensors, JSON and shape errors alike: it is not what was saved
        raise _unusable(name, error) from error


def load_config(path: str | Path, **changes: Any) -> "ThoughtbubblesConfig":
    """The configuration of a trained model, with fields changed.

    Raises:
        InputError: as `find_model`, or for values that are not allowed.
    """
    from thoughtbubbles.model.configuration import ThoughtbubblesConfig

    name = find_model(path)
    try:
        config: ThoughtbubblesConfig = ThoughtbubblesConfig.from_pretrained(name, trust_remote_code=False, **changes)
    except Exception as error:
        raise _unusable(name, error) from error
    return config


def _unusable(name: str, error: Exception) -> InputError | RunError:
    if is_network(error):
        return RunError(f"model {name} cannot be fetched: {library_reason(error)}")
    where = (
        "" if Path(name).exists() else ": expected a folder with config.json, that of a finished run, or a hub model"
    )
    return InputError(f"model {name}{where}: {library_reason(error)}")


def check_tokenizer(path: str | Path, tokenizer: "PreTrainedTokenizerBase", source: str) -> None:
    """Check that a model's own tokenizer, where it has one, gives the tokens that some data was made of.

    Raises:
        InputError: naming the model and the data.
    """
    name = find_model(path)
    if _lacks_tokenizer(name):
        return
    if load_tokenizer(path).get_vocab() != tokenizer.get_vocab():
        raise InputError(f"data {source}: tokenised with another tokenizer than that of the model {name}")


def recorded_start_of(path: str | Path, tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The token that stood before each document of a model's data; None if nothing is recorded, or not for `tokenizer`.

    Raises:
        InputError: as `load_tokenizer`, for a model that has a tokenizer.
    """
    if _lacks_tokenizer(find_model(path)):
        return None
    own = load_tokenizer(path)
    return recorded_start(own) if own.get_vocab() == tokenizer.get_vocab() else None


def check_start(path: str | Path, tokenizer: "PreTrainedTokenizerBase", source: str) -> None:
    """Check that some data puts before its documents what a model was trained to see there.

    Raises:
        InputError: naming the model, the data and both tokens.
    """
    expected, found = recorded_start_of(path, tokenizer), recorded_start(tokenizer)
    if expected is not None and found is not None and expected != found:
        ours, theirs = map(tokenizer.convert_ids_to_tokens, (expected, found))
        raise InputError(
            f"data {source}: {theirs!r} stands before its documents, expected {ours!r} as in what the model {path} was "
            "trained on"
        )


def _lacks_tokenizer(name: str) -> bool:
    """Whether a model is a folder without a tokenizer; a hub model is known to lack one only when it is loaded."""
    return Path(name).exists() and not (Path(name) / "tokenizer.json").is_file()


def load_tokenizer(path: str | Path) -> "PreTrainedTokenizerFast":
    """The tokenizer saved beside a model, without its limit: texts too long are minded where they are read.

    Raises:
        InputError: as `find_model`, or where there is none, a slow one, or one that needs code of its own.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

    # Registers the configuration, which the tokenizer's class may be found by.
    import thoughtbubbles.model.modeling  # noqa: F401

    name = find_model(path)
    if _lacks_tokenizer(name):
        raise InputError(f"model {name}: expected tokenizer.json beside it")
    try:
        # Left open, transformers would ask on standard input whether to run code out of the folder.
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # the libraries raise anything
        raise _unusable(name, error) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise InputError(f"model {name}: its tokenizer is a slow one, expected one with a tokenizer.json")
    tokenizer.model_max_length = VERY_LARGE_INTEGER
    return tokenizer
