"""What a plan is asked for."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from thoughtbubbles.support.options import option

if TYPE_CHECKING:
    from thoughtbubbles.model.budget import Budget


@dataclass(frozen=True)
class PlanOptions:
    """What is to be planned of a model, with the help of the command; None is what the model or its recipe says."""

    length: int | None = option(
        "Tokens a row; if not given, a block of the recipe's data, or the model's longest row.", None
    )
    budget: "Budget | None" = option("Streams per token; if not given, the model's own, or those of the recipe.", None)
    batch_size: int | None = option("Rows of a training step; if not given, the recipe's, or 16 a GPU.", None)
    tokens: float | None = option(
        "Tokens to train on, such as 2.5e9, rounded up to whole steps; if not given, those of the recipe.", None
    )
    precision: str | None = option("`float32` or `bfloat16`; if not given, the recipe's, or bfloat16.", None)
    device_flops: float | None = option(
        "A device's peak in operations per second, such as 989e12 for an H100 in bfloat16: gives times.", None
    )
    mfu: float | None = option("Share of that peak which training reaches; 0.4 if not given.", None)
    memory: str | None = option("A device's memory, such as 80GB or 24GiB: says what fits.", None)
    gpus: int = option("Devices that train together.", 1)
    sharding: str | None = option(
        "How they share weights, gradients and moments: `ddp`, not at all, or `fsdp`; if not given, the recipe's, "
        "or ddp.",
        None,
    )
    variant: str | None = option("Which variant, where the recipe is that of a comparison.", None)
