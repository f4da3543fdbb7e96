"""Training steps of the paper's shapes: time, throughput, memory, and what is ours in them.

Compiled block by block in bfloat16, each shape dense and with forks, and a dense model that computes as many positions
in each layer as the one with forks: what a step takes beyond that is gate, routing, gather and merge, which are also
timed by themselves. Model FLOPs are counted over the whole square of attention, as is usual, and over the half of it
that causal attention needs. Memory is that of uncompiled steps, beside what `plan` says.
"""

import gc
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from clock import now
from gpu_parts.driver import FAULTS, Item, Setting, run_part
from gpu_parts.facts import seconds_of
from gpu_parts.report import Report
from parts import OURS, part_seconds
from thoughtbubbles import ThoughtbubblesConfig, ThoughtbubblesForCausalLM
from thoughtbubbles.model import loss as loss_module
from thoughtbubbles.model.accounting import activation_bytes, layer_widths, state_bytes, training_flops
from thoughtbubbles.model.loss import chunked_next_token_loss
from thoughtbubbles.training.meter import peak_memory
from thoughtbubbles.training.sharding import compile_model
from training import LossAlone, SamePositions

DATASHEET_FLOPS = 989e12
"""Dense bfloat16 operations per second of an H100 or H200 by its datasheet."""
USABLE = 0.88
LENGTH, MOST_ROWS = 1024, 64
STEPS = 6
MEMORY_OFF = 0.15


def items(setting: Setting) -> Iterator[Item]:
    """What matters most first."""
    bench = Bench(setting)
    first, second, *more = ("nano", "nano") if setting.rehearse else ("772m", "150m", "1.9b", "319m")
    for shape, scale in ((first, 1.0), (second, 0.5)) if first != second else ((first, 1.0),):
        for name, seconds in (("dense", 20), ("causal 2", 22), ("positions of causal 2", 18)):
            yield Item(f"{shape} {name}", scale * seconds, partial(bench.step, shape, name))
        yield Item(f"{shape} parts of causal 2", scale * 10, partial(bench.parts, shape, "causal 2"))
    for shape in dict.fromkeys((first, second)):
        yield Item(f"{shape} memory of causal 2", 20, partial(bench.memory, shape, "causal 2"))
    yield Item(f"{first} loss by rows", 5, partial(bench.loss, first))
    for shape in more:
        for name in ("dense", "causal 2"):
            yield Item(f"{shape} {name}", 25, partial(bench.step, shape, name))
    for name in ("causal 4", "positions of causal 4"):
        yield Item(f"{first} {name}", 20, partial(bench.step, first, name))
    yield Item(f"{second} causal 2, one graph", 60, partial(bench.step, second, "causal 2", "whole"))


class Bench:
    """Steps on random tokens."""

    def __init__(self, setting: Setting) -> None:
        self.device, self.rehearse = setting.device, setting.rehearse
        self.length = 32 if setting.rehearse else LENGTH
        self.backend = "aot_eager" if setting.rehearse else "inductor"
        facts = Report.read(setting.output / "facts.json").items
        self.measured = facts.get("matmul", {}).get("bfloat16")

    def step(self, shape: str, name: str, pieces: str = "blocks") -> dict[str, Any]:
        """The step at the largest micro-batch that should fit."""
        routing, budget = self.routing_of(name)
        config = self.config(shape, routing, budget)
        rows = self.rows(config)
        while True:
            try:
                taken = self.timed(config, name.startswith("positions"), rows, pieces)
                break
            except torch.OutOfMemoryError:
                if rows == 1:
                    raise
                rows = max(1, rows * 3 // 4)
        return {"rows": rows, "compiled": pieces, **taken, **self.rates(config, rows, taken["seconds"])}

    def parts(self, shape: str, name: str) -> dict[str, Any]:
        """Seconds of each part by itself, uncompiled, and the share of what is ours in a compiled step."""
        routing, budget = self.routing_of(name)
        config = self.config(shape, routing, budget)
        rows = max(1, self.rows(config) // 2)
        with released():
            model = self.build(ThoughtbubblesForCausalLM, config)
            found = part_seconds(model, rows, self.length, self.autocast(), lambda: now(self.device))
        total = sum(found.values())
        return {"rows": rows, "seconds": found, "ours": sum(found[part] for part in OURS) / total}

    def memory(self, shape: str, name: str) -> dict[str, Any]:
        """The uncompiled peak at two sizes beside what `plan` says, and the largest micro-batch that ran."""
        routing, budget = self.routing_of(name)
        config = self.config(shape, routing, budget)
        most = self.rows(config)
        peaks = {rows: self.peak(config, rows) for rows in sorted({max(1, most // 2), most})}
        planned = {rows: self.planned(config, rows) for rows in peaks}
        found: dict[str, Any] = {"peaks": peaks, "planned": planned, "largest": max(peaks)}
        off = max(abs(planned[rows] / peaks[rows] - 1) for rows in peaks)
        if self.device == "cuda":
            for rows in range(most + 1, most + 4):
                try:
                    peaks[rows] = self.peak(config, rows)
                except torch.OutOfMemoryError:
                    break
                found["largest"] = rows
            found[FAULTS] = [f"plan is {off:.0%} off"] if off > MEMORY_OFF else []
        return {**found, "off": off}

    def loss(self, shape: str) -> dict[str, Any]:
        """Seconds of the loss, forward and backward, by how many rows of logits it holds; and at odd widths."""
        config = self.config(shape, "none", "1")
        count = 64 if self.rehearse else 1 << 14
        hidden = torch.randn(1, count, config.hidden_size, device=self.device).requires_grad_()
        matrix = torch.randn(config.vocab_size, config.hidden_size, device=self.device).requires_grad_()
        targets = torch.randint(config.vocab_size, (1, count), device=self.device)

        def work() -> None:
            with self.autocast():
                loss = chunked_next_token_loss(hidden, matrix, targets)
            loss.backward()

        found = {}
        sizes = (32, 64) if self.rehearse else (512, 2048, 8192)
        with released():
            for size in sizes:
                with patch.object(loss_module, "ROWS", size):
                    found[str(size)] = seconds_of(self.device, work, rounds=3)
            with patch.dict(loss_module.ALIGNMENT, clear=True):
                found[f"{loss_module.ROWS}, as wide as the vocabulary"] = seconds_of(self.device, work, rounds=3)
        return {"rows": count, "seconds": found}

    def timed(self, config: ThoughtbubblesConfig, twin: bool, rows: int, pieces: str) -> dict[str, Any]:
        """Median seconds of a step, the first one's, in which graphs are made, and the peak."""
        with released():
            model = self.build(
                partial(SamePositions, length=self.length) if twin else ThoughtbubblesForCausalLM, config
            )
            ours = model.dense if isinstance(model, SamePositions) else model
            compile_model(ours, pieces, backend=self.backend)
            run = self.trainer(model if twin else LossAlone(model), rows)
            first = run()
            run()
            seconds = [run() for _ in range(1 if self.rehearse else STEPS)]
            return {
                "seconds": statistics.median(seconds),
                "spread": [min(seconds), max(seconds)],
                "first_seconds": first,
                "peak_memory": peak_memory(torch.device(self.device)),
            }

    def peak(self, config: ThoughtbubblesConfig, rows: int) -> int:
        """Bytes at the peak of an uncompiled step, moments and all."""
        with released():
            run = self.trainer(LossAlone(self.build(ThoughtbubblesForCausalLM, config)), rows)
            for _ in range(2):
                run()
            return peak_memory(torch.device(self.device))

    def trainer(self, model: nn.Module, rows: int) -> Callable[[], float]:
        """A step of training; it returns its seconds."""
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        ids = torch.randint(self.vocab_size, (rows, self.length), device=self.device)

        def run() -> float:
            start = now(self.device)
            with self.autocast():
                loss: Tensor = model(ids, labels=ids)[0]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return now(self.device) - start

        return run

    def build(self, maker: Callable[[ThoughtbubblesConfig], Any], config: ThoughtbubblesConfig) -> Any:
        """A new model on the device, in training."""
        torch.manual_seed(0)
        with torch.device(self.device):
            return maker(config).to(self.device).train()

    @property
    def vocab_size(self) -> int:
        """GPT-2's, or a small one."""
        return 512 if self.rehearse else 50257

    def config(self, shape: str, routing: str, budget: str) -> ThoughtbubblesConfig:
        """A preset's shape."""
        return ThoughtbubblesConfig.preset(
            shape,
            routing=routing,
            budget=budget,
            vocab_size=self.vocab_size,
            max_position_embeddings=self.length,
        )

    def routing_of(self, name: str) -> tuple[str, str]:
        """Routing and budget of a variant."""
        return ("none", "1") if name == "dense" else ("causal", name.rpartition(" ")[2])

    def rows(self, config: ThoughtbubblesConfig) -> int:
        """The largest micro-batch that should fit, by what `plan` counts."""
        if self.device == "cpu":
            return 1
        usable = USABLE * torch.cuda.get_device_properties(0).total_memory
        return max(1, *(rows for rows in range(MOST_ROWS + 1) if self.planned(config, rows) <= usable))

    def planned(self, config: ThoughtbubblesConfig, rows: int) -> int:
        """Bytes that `plan` counts for a micro-batch."""
        activations = activation_bytes(config, self.length, precision="bfloat16", device=self.device)
        return state_bytes(config, "bfloat16").total + rows * activations.total

    def rates(self, config: ThoughtbubblesConfig, rows: int, seconds: float) -> dict[str, float]:
        """Tokens per second, and model FLOPs over the datasheet's and the measured peak, counted both ways."""
        whole = rows * training_flops(config, self.length)
        widths = layer_widths(config, self.length)
        half = whole - rows * 3 * sum(2 * width**2 for width in widths) * config.hidden_size
        found = {"tokens_per_second": rows * self.length / seconds, "flops_per_second": whole / seconds}
        for name, flops in (("square", whole), ("half", half)):
            found[f"mfu_{name}"] = flops / seconds / DATASHEET_FLOPS
            if self.measured:
                found[f"measured_mfu_{name}"] = flops / seconds / self.measured
        return found

    def autocast(self) -> Any:
        """As in training in bfloat16."""
        return torch.autocast(self.device, torch.bfloat16)


@contextmanager
def released() -> Iterator[None]:
    """Give back what the work inside held, and count its peak alone."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        yield
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    run_part("training", items, __doc__)
