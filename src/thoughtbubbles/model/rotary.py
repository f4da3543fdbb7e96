"""Rotary frequencies: the types that there are, and what transformers computes for them (method: The block)."""

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

Check = tuple[Callable[[Any], bool], str]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_POSITIVE: Check = (lambda value: _is_number(value) and value > 0, "a number above 0")
_FACTOR: Check = (lambda value: _is_number(value) and value >= 1, "a number of at least 1")
_TOKENS: Check = (lambda value: type(value) is int and value > 0, "a whole number of at least 1")
_CHOICE: Check = (lambda value: type(value) is bool, "True or False")

LONGEST = "original_max_position_embeddings"
REQUIRED: dict[str, dict[str, Check]] = {
    "default": {},
    "linear": {"factor": _FACTOR},
    "llama3": {"factor": _FACTOR, "low_freq_factor": _POSITIVE, "high_freq_factor": _POSITIVE, LONGEST: _TOKENS},
    "yarn": {"factor": _FACTOR, LONGEST: _TOKENS},
}
"""The types of rotary embedding, and the numbers that each needs."""
OPTIONAL: dict[str, dict[str, Check]] = {
    "yarn": {
        **dict.fromkeys(("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"), _POSITIVE),
        "truncate": _CHOICE,
    }
}
WITH_FIELDS = ("rope_theta", "partial_rotary_factor")
"""What a configuration has as fields of their own too."""
BY_LONGEST_ROW = ("dynamic", "longrope")


def settle_rope(parameters: Any, longest: int) -> dict[str, Any]:
    """Rotary parameters as transformers has them, checked, with the type by name and the tokens of pretraining.

    Args:
        parameters: a mapping; `type` is an older name of `rope_type`. None in it is as if it were not there.
        longest: tokens of pretraining where they do not say.

    Raises:
        ValueError: saying what was expected.
    """
    if not isinstance(parameters, Mapping):
        raise ValueError("a mapping such as {'rope_type': 'linear', 'rope_theta': 10000.0, 'factor': 2.0}")
    given = {key: value for key, value in parameters.items() if value is not None}
    older = given.pop("type", "default")
    kind = given.setdefault("rope_type", older)
    if kind in BY_LONGEST_ROW:
        raise ValueError(
            f"another rope_type than {kind!r}, whose frequencies depend on the longest row of a batch, so that neither "
            "causality nor a cache could be exact"
        )
    if not isinstance(kind, str) or kind not in REQUIRED:
        raise ValueError(f"rope_type to be one of {', '.join(REQUIRED)}")
    required, optional = REQUIRED[kind], OPTIONAL.get(kind, {})
    if LONGEST in required:
        given.setdefault(LONGEST, longest)
    known = {**required, **optional, **dict.fromkeys(WITH_FIELDS, _POSITIVE)}
    for key, value in given.items():
        if key != "rope_type" and key not in known:
            raise ValueError(f"no {key!r} for rope_type {kind!r}, which has {', '.join(known)}")
        if key != "rope_type" and not known[key][0](value):
            raise ValueError(f"{key} to be {known[key][1]}")
    if missing := [key for key in required if key not in given]:
        raise ValueError(f"{' and '.join(missing)} too, for rope_type {kind!r}")
    if kind == "llama3" and not given["low_freq_factor"] < given["high_freq_factor"]:
        raise ValueError("low_freq_factor below high_freq_factor")
    return given


class Rotary:
    """The frequencies of a model's rotary embedding, and what it multiplies cosines and sines by.

    Args:
        config: of the model.
        channels: of a head that turn; None is as many as turn of the blocks' heads.

    Attributes:
        factor: on cosines and sines; 1 but for `yarn`.
    """

    def __init__(self, config: Any, channels: int | None = None) -> None:
        self._config, self._scaled, self.factor = config, None, 1.0
        self._channels = turning_channels(config) if channels is None else channels
        if config.rope_parameters is not None:
            self._scaled, self.factor = _scaled(config, self._channels)

    def frequencies(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """[R / 2] angles a position, of R channels that turn. Those of types that scale them are float32 numbers."""
        if self._scaled is not None:
            return torch.tensor(self._scaled, device=device, dtype=dtype)
        exponents = torch.arange(0, self._channels, 2, device=device, dtype=dtype) / self._channels
        # As transformers writes it: at thousands of tokens the last bit shows.
        frequencies: Tensor = 1.0 / self._config.rope_theta**exponents
        return frequencies


def turning_channels(config: Any) -> int:
    """Channels of a head of K that are asked to turn; they turn in pairs, an odd number as the even one above it."""
    return int(config.head_dim * config.partial_rotary_factor)


def _scaled(config: Any, channels: int) -> tuple[list[float], float]:
    settled = copy.copy(config)
    settled.head_dim, settled.partial_rotary_factor = channels, 1.0
    settled.rope_parameters = {**config.rope_parameters, "partial_rotary_factor": 1.0}
    compute = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]]
    with torch.device("cpu"):  # a model may be made on the meta device
        frequencies, factor = compute(settled, torch.device("cpu"))
    return frequencies.tolist(), float(factor)
