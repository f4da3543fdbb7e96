"""What a step of the optimizer does to which parameters: groups, their rates, what is frozen, adapters."""

import math
import re
import warnings
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.optim import AdamW

from thoughtbubbles.recipes.training import LoraSection, RecipeError, TrainingSection
from thoughtbubbles.recipes.values import nearest

BETAS = (0.9, 0.95)
# Of an adapter's update, over its rank.
ALPHA = 2
LINEAR = {"qkv_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
"""Linear layers of blocks."""


def build_optimizer(model: nn.Module, settings: TrainingSection) -> AdamW:
    """AdamW on what is trained. Each group has its peak rate as `peak`; decay is on matrices where no pattern says.

    Raises:
        RecipeError: for a pattern of `groups` that fits no parameter that is trained.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for pattern in settings.groups:
        _matches("groups", pattern, trained)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        rate, decay = settings.learning_rate, settings.weight_decay * (parameter.dim() > 1)
        section = next((each for pattern, each in settings.groups.items() if fnmatchcase(name, pattern)), None)
        if section is not None:
            rate = rate if section.learning_rate is None else section.learning_rate
            decay = decay if section.weight_decay is None else section.weight_decay
        groups.setdefault((rate, decay), []).append(parameter)
    listed: list[dict[str, Any]] = [
        {"params": parameters, "lr": rate, "peak": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]
    return AdamW(listed, betas=BETAS, fused=True)


def rate_of_step(settings: TrainingSection, step: int) -> float:
    """The learning rate of an optimizer step, 1-based, as a share of the peak."""
    start, end, before = settings.start_fraction, settings.end_fraction, step - 1
    warmup, decay = round(settings.warmup_fraction * settings.steps), round(settings.decay_share * settings.steps)
    if before < warmup:
        return start + (1 - start) * before / warmup
    if (left := settings.steps - before) > decay:
        return 1.0
    done = (decay - left) / decay
    fall = {"wsd": 1 - done, "wsd-sqrt": 1 - math.sqrt(done), "cosine": (1 + math.cos(math.pi * done)) / 2}
    return end + (1 - end) * fall[settings.schedule]


def freeze(model: nn.Module, patterns: Iterable[str]) -> None:
    """Let parameters whose names fit a pattern stay as they are.

    Raises:
        RecipeError: for a pattern that fits none, or where nothing is left to train.
    """
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        for name in _matches("freeze", pattern, parameters):
            parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise RecipeError(f"training.freeze={list(patterns)}: expected to leave something to train")


def add_adapters(model: nn.Module, settings: LoraSection) -> nn.Module:
    """Put adapters into a model, in place; they and the gates are trained. The result is peft's model around it.

    Raises:
        RecipeError: for targets that the model does not have.
    """
    from peft import LoraConfig, get_peft_model

    linear = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    targets = sorted(linear & LINEAR) if settings.targets is None else settings.targets
    for target in targets:
        if target not in linear:
            raise RecipeError(f"training.lora: target {target}: {nearest(target, sorted(linear))}")
    config = LoraConfig(r=settings.rank, lora_alpha=ALPHA * settings.rank, target_modules=targets)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # of names that peft uses and transformers renamed
        wrapped: nn.Module = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if ".gates." in name and ".base_layer." not in name:
            parameter.requires_grad_(True)
    return wrapped


def _matches(key: str, pattern: str, parameters: Iterable[str]) -> list[str]:
    if found := [name for name in parameters if fnmatchcase(name, pattern)]:
        return found
    kinds = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in parameters))
    raise RecipeError(f"training.{key}: {pattern!r} fits no parameter: {nearest(pattern, kinds)}")
