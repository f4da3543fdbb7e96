"""A decoding step with a filled cache: ours with forks and dense, transformers' GPT-NeoX, and ours recomputed.

Ours over a cache of fixed shapes, too, whose step is replayed as a graph: first whether it is right and never waits.
"""

import argparse
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from transformers import StaticCache

from decoding import build_models, clock, measure, refuse_wrong_results
from gpu_parts.driver import FAULTS, Item, Setting, run_part
from thoughtbubbles import ThoughtbubblesConfig, ThoughtbubblesForCausalLM
from thoughtbubbles.model.graph import StepGraph
from thoughtbubbles.model.static import StaticStreamCache

STEPS = 12


def items(setting: Setting) -> Iterator[Item]:
    """Whether steps of fixed shapes are right, then each shape at each context and batch."""
    yield Item("static steps", 15, partial(check_static, setting.device))
    shapes, contexts, batches = (
        (("nano",), (512,), (1,)) if setting.rehearse else (("150m", "772m"), (512, 4096), (1, 32))
    )
    for shape in shapes:
        bench = Bench(setting, shape, contexts)
        for context in contexts:
            for batch in batches:
                yield Item(f"{shape}, context {context}, batch {batch}", 6, partial(bench.measure, context, batch))


@torch.inference_mode()
def check_static(device: str) -> dict[str, Any]:
    """How far steps of fixed shapes are from the whole forward in float64, while a GPU refuses to wait for the host."""
    torch.manual_seed(0)
    config = ThoughtbubblesConfig.preset("nano", budget=2.0, vocab_size=512, max_position_embeddings=200)
    model = ThoughtbubblesForCausalLM(config).double().eval()
    model.to(torch.device(device))
    ids = torch.randint(512, (3, 160), device=device)
    budgets = [1, 1.5, 2]
    full = model(ids, budget=budgets).logits
    cache = StaticStreamCache(3, 200, 2, device, fixed=True)
    model(ids[:, :60], cache=cache, budget=budgets)
    graph = StepGraph(model.advance, cache)
    graph.prepare()
    every = torch.ones(3, dtype=torch.bool, device=device)
    with no_waiting(device):
        found = [graph(ids[:, column], [True] * 3, every).clone() for column in range(60, 160)]
    off = float((torch.stack(found, 1) - full[:, 60:]).abs().max())
    return {"off": off, FAULTS: [f"{off:.2g} from the whole forward, expected 1e-9"] if off > 1e-9 else []}


@contextmanager
def no_waiting(device: str) -> Iterator[None]:
    """An error where a GPU's work is waited for."""
    if device != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Bench:
    """Models of one shape, made when the first of them is timed."""

    def __init__(self, setting: Setting, shape: str, contexts: tuple[int, ...]) -> None:
        self.arguments = argparse.Namespace(
            preset=shape,
            budget=2.0,
            contexts=list(contexts),
            steps=2 if setting.rehearse else STEPS,
            device=setting.device,
        )
        self.models: dict[str, Any] = {}

    def measure(self, context: int, batch: int) -> dict[str, Any]:
        """Milliseconds a step of each variant, and the bytes of its cache."""
        if not self.models:
            self.models = build_models(self.arguments)
            refuse_wrong_results(self.models["ours"], min(self.arguments.contexts))
            if self.arguments.device == "cuda":
                self.models = {name: model.bfloat16() for name, model in self.models.items()}
        rows = measure(self.models, context, batch, self.arguments)
        found = {row.pop("variant"): row for row in rows}
        found["GPT-NeoX, static cache"] = {"milliseconds": 1000 * self.static(context, batch)}
        found["ours, static cache"] = {"milliseconds": 1000 * self.replayed(context, batch)}
        return found

    @torch.inference_mode()
    def replayed(self, context: int, batch: int) -> float:
        """Median seconds of a step of ours with the cache whose shapes never change, a graph on a GPU."""
        model, steps = self.models["ours"], self.arguments.steps
        longest = context + steps + 2
        ids = torch.randint(model.config.vocab_size, (batch, longest), device=model.device)
        cache = StaticStreamCache(batch, longest, self.arguments.budget, model.device, fixed=True)
        model(ids[:, :context], cache=cache, logits_to_keep=1, budget=self.arguments.budget)
        graph, every = StepGraph(model.advance, cache), [True] * batch
        calls = (partial(graph, ids[:, context + step], every) for step in range(steps + 1))
        taken = [clock(self.arguments.device, call) for call in calls]
        return statistics.median(taken[1:])

    @torch.inference_mode()
    def static(self, context: int, batch: int) -> float:
        """Median seconds of a step of GPT-NeoX with the cache whose shapes never change."""
        model, steps = self.models["GPT-NeoX"], self.arguments.steps
        ids = torch.randint(model.config.vocab_size, (batch, context + steps + 2), device=model.device)
        cache = StaticCache(config=model.config, max_cache_len=context + steps + 2)
        model(ids[:, :context], past_key_values=cache, use_cache=True, logits_to_keep=1)
        taken = []
        for step in range(steps + 1):
            token = ids[:, context + step : context + step + 1]
            call = partial(model, token, past_key_values=cache, use_cache=True)
            taken.append(clock(self.arguments.device, call))
        return statistics.median(taken[1:])


if __name__ == "__main__":
    run_part("decoding", items, __doc__)
