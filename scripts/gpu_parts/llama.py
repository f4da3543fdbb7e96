"""A Llama's block of ours beside transformers' class: the same numbers at budget 1, and the time of a training step."""

import argparse
import statistics
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from gpu_parts.driver import FAULTS, Item, Setting, run_part
from thoughtbubbles import ThoughtbubblesConfig, ThoughtbubblesForCausalLM, retrofit
from thoughtbubbles.model.accounting import training_flops
from training import LossAlone, Step, llama, with_llama_block

STEPS = 10
FAR = {"float32": 1e-5, "bfloat16": 1.0}
"""How far logits may be apart, over their norm; in bfloat16 over what two kernels of theirs are apart."""


def items(setting: Setting) -> Iterator[Item]:
    """The same numbers, then the time of steps as they are and as one graph."""
    bench = Bench(setting)
    for kind in ("float32", "bfloat16"):
        yield Item(f"logits, {kind}", 5, partial(bench.logits, getattr(torch, kind)))
    for groups in (None, 2 if setting.rehearse else 4):
        name = "" if groups is None else f", {groups} heads of keys"
        yield Item(f"step{name}", 8, partial(bench.step, groups, compiled=False))
    yield Item("step, compiled", 40, partial(bench.step, None, compiled=True))


class Bench:
    """Models of one shape, ours and theirs."""

    def __init__(self, setting: Setting) -> None:
        self.device, self.rehearse = setting.device, setting.rehearse
        self.length, self.rows = (32, 2) if setting.rehearse else (1024, 16)

    def shape(self, groups: int | None) -> ThoughtbubblesConfig:
        """Dense, with a Llama's block."""
        preset, words = ("nano", 512) if self.rehearse else ("150m", 50257)
        sizes = {"vocab_size": words, "max_position_embeddings": self.length}
        return with_llama_block(ThoughtbubblesConfig.preset(preset, routing="none", budget=1.0, **sizes), groups)

    @torch.inference_mode()
    def logits(self, dtype: torch.dtype) -> dict[str, Any]:
        """How far ours at budget 1 are from theirs, and theirs by another kernel."""
        torch.manual_seed(0)
        config = llama(self.shape(2 if self.rehearse else 4)).config
        # Made in that type, for `to` would round the frequencies of their rotary embedding too.
        theirs: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
        theirs.to(self.device)
        ids = torch.randint(theirs.config.vocab_size, (2, self.length), device=self.device)
        ours: Any = retrofit(theirs)
        found = {"ours": ours.to(self.device)(ids, budget=1).logits, "sdpa": theirs(ids).logits}
        theirs.set_attn_implementation("eager")
        found["eager"] = theirs(ids).logits
        apart = {name: distance(found[name], found["sdpa"]) for name in ("ours", "eager")}
        kind = str(dtype).removeprefix("torch.")
        bar = FAR[kind] * (1 if kind == "float32" else apart["eager"])
        faults = [f"{apart['ours']:.2g} from their logits, expected {bar:.2g}"] if apart["ours"] > bar else []
        return {"ours_from_sdpa": apart["ours"], "eager_from_sdpa": apart["eager"], FAULTS: faults}

    def step(self, groups: int | None, compiled: bool) -> dict[str, Any]:
        """Median milliseconds of a step in bfloat16, in turn."""
        torch.manual_seed(0)
        shape = self.shape(groups)
        arguments = argparse.Namespace(
            device=self.device,
            compile=compiled and not self.rehearse,
            batch_size=self.rows,
            length=self.length,
            vocab_size=shape.vocab_size,
            precision="bfloat16",
        )
        flops = self.rows * training_flops(shape, self.length)
        models = {"ours": LossAlone(ThoughtbubblesForCausalLM(shape)), "theirs": llama(shape)}
        steps = {name: Step(model, flops, arguments) for name, model in models.items()}
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(2 + (1 if self.rehearse else STEPS)):
            for name, step in steps.items():
                taken = step.run()
                if turn >= 2:
                    seconds[name].append(taken)
        medians = {name: statistics.median(each) for name, each in seconds.items()}
        milliseconds = {name: 1000 * median for name, median in medians.items()}
        return {"milliseconds": milliseconds, "times_theirs": medians["ours"] / medians["theirs"]}


def distance(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference over that of what was expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


if __name__ == "__main__":
    run_part("llama", items, __doc__)
