"""Speed of a training step, forward and backward with the optimizer, as ratios to the dense model in one run.

The baselines are the dense model of the same length, and the dense model with as many positions in every layer as
the Thoughtbubbles model has in its widest: what is left over that is gate, routing, gather and merge.

The last line is JSON: the settings, the machine and for each variant tokens per second and the median step in
milliseconds.
"""

import argparse
import json
import statistics
import time
from dataclasses import dataclass

import torch

from thoughtbubbles import ThoughtbubblesConfig, ThoughtbubblesForCausalLM
from thoughtbubbles.accounting import layer_widths, training_flops
from thoughtbubbles.machine import describe_machine


@dataclass(frozen=True)
class Variant:
    """A model to time.

    Attributes:
        name: in the output.
        routing: of the model.
        budget: streams per token.
        widened: dense over as many positions as the streams of the budget.
    """

    name: str
    routing: str
    budget: float = 1.0
    widened: bool = False


VARIANTS = (
    Variant("dense", "none"),
    Variant("budget 1", "causal", 1.0),
    Variant("causal 2", "causal", 2.0),
    Variant("topk 2", "topk", 2.0),
    Variant("dense, as wide as 2", "none", 2.0, widened=True),
)


def main() -> None:
    """Time every variant in turn, round by round, so that a drifting machine touches all alike."""
    arguments = parse_arguments()
    steps = {variant: Step(variant, arguments) for variant in VARIANTS}
    for step in steps.values():
        step.run()
    seconds: dict[Variant, list[float]] = {variant: [] for variant in VARIANTS}
    for _ in range(arguments.rounds):
        for variant, step in steps.items():
            seconds[variant].append(step.run())
    dense = statistics.median(seconds[VARIANTS[0]])
    rows = {}
    for variant, step in steps.items():
        median = statistics.median(seconds[variant])
        rows[variant.name] = {
            "milliseconds": 1000 * median,
            "spread": [1000 * min(seconds[variant]), 1000 * max(seconds[variant])],
            "tokens_per_second": arguments.batch_size * arguments.length / median,
            "flops_per_second": step.flops / median,
            "times_dense": median / dense,
        }
        print(f"{variant.name:<22}{1000 * median:>9.1f} ms {median / dense:>6.2f} x dense")
    print(json.dumps({"settings": vars(arguments), "machine": describe_machine(arguments.device), "variants": rows}))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="micro", help="shape of the models")
    parser.add_argument("--length", type=int, default=256, help="tokens a row")
    parser.add_argument("--batch-size", type=int, default=4, help="rows a step")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each variant")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


class Step:
    """A training step of a variant on random tokens."""

    def __init__(self, variant: Variant, arguments: argparse.Namespace) -> None:
        config = ThoughtbubblesConfig.preset(arguments.preset, routing=variant.routing, budget=variant.budget)
        length = arguments.length
        if variant.widened:
            wide = ThoughtbubblesConfig.preset(arguments.preset, budget=variant.budget)
            length = max(layer_widths(wide, length))
        torch.manual_seed(0)
        self.device = arguments.device
        self.model = ThoughtbubblesForCausalLM(config).to(self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.ids = torch.randint(config.vocab_size, (arguments.batch_size, length), device=self.device)
        self.flops = arguments.batch_size * training_flops(config, length)

    def run(self) -> float:
        """One step; its seconds."""
        start = self._now()
        self.model(self.ids, labels=self.ids).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self._now() - start

    def _now(self) -> float:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()


if __name__ == "__main__":
    main()
