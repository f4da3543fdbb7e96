"""A decoding step with a filled cache: ours with forks and dense, transformers' GPT-NeoX, and ours recomputed."""

import argparse
import statistics
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from transformers import StaticCache

from decoding import build_models, clock, measure, refuse_wrong_results
from gpu_parts.driver import Item, Setting, run_part

STEPS = 12


def items(setting: Setting) -> Iterator[Item]:
    """Each shape at each context and batch."""
    shapes, contexts, batches = (
        (("nano",), (512,), (1,)) if setting.rehearse else (("150m", "772m"), (512, 4096), (1, 32))
    )
    for shape in shapes:
        bench = Bench(setting, shape, contexts)
        for context in contexts:
            for batch in batches:
                yield Item(f"{shape}, context {context}, batch {batch}", 6, partial(bench.measure, context, batch))


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
        return {**found, "GPT-NeoX, static cache": {"milliseconds": 1000 * self.static(context, batch)}}

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
