"""Time of routing against its length, and memory of attention against the number of streams.

A router sees candidates as they stand before the last of three fork layers: as many streams as the budget allows, each
offering a fork and a keep. Its time is set beside that of a block over the streams that it lets through, forward alone
for both. Memory is what PyTorch's allocator holds at most in attention, forward and backward, its inputs and their
gradients included.

The last line is JSON: the settings, the machine, and a row for each router, budget and length, and for each width.
"""

import argparse
import math
import statistics
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import Tensor

from clock import now
from memory import peak_bytes
from thoughtbubbles import ThoughtbubblesConfig
from thoughtbubbles.model.attention import attenuated_attention, rotary_angles
from thoughtbubbles.model.budget import parse_budget
from thoughtbubbles.model.gate import pack_left
from thoughtbubbles.model.modeling import ThoughtbubblesBlock
from thoughtbubbles.model.rotary import Rotary
from thoughtbubbles.model.routing import route_causal, route_topk
from thoughtbubbles.model.streams import Streams
from thoughtbubbles.model.threshold import route_threshold, share_admitted
from thoughtbubbles.support.files import json_text
from thoughtbubbles.support.machine import describe_machine


def main() -> None:
    """Measure both."""
    arguments = parse_arguments()
    rows = [
        measure(router, parse_budget(budget), length, arguments)
        for router in ("causal", "threshold", "topk")
        for budget in arguments.budgets
        for length in arguments.lengths
    ]
    memory = [{"streams": streams, "bytes": attention_memory(streams, arguments)} for streams in arguments.widths]
    for row in memory:
        each = row["bytes"] / row["streams"]
        print(f"attention over {row['streams']:>6} streams {row['bytes'] / 1e6:>9.1f} MB, {each:,.0f} bytes a stream")
    machine = describe_machine(arguments.device)
    print(json_text({"settings": vars(arguments), "machine": machine, "routing": rows, "memory": memory}))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="micro", help="shape of the block")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096], help="tokens a row")
    parser.add_argument("--budgets", nargs="+", default=["2", "4"])
    parser.add_argument("--batch-size", type=int, default=4, help="rows")
    parser.add_argument("--widths", type=int, nargs="+", default=[1024, 2048, 4096, 8192], help="streams of a row")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--precision", choices=["float32", "bfloat16"], default="float32", help="of the memory's attention"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


@torch.no_grad()
def measure(router: str, budget: Fraction, length: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """A row of the result."""
    streams, width = crowd(budget, length, arguments)
    config = ThoughtbubblesConfig.preset(arguments.preset)
    block = ThoughtbubblesBlock(config).to(arguments.device)
    x = torch.randn(arguments.batch_size, width, config.hidden_size, device=arguments.device)
    angles = rotary_angles(streams.positions(), Rotary(config))
    token, alive = (each.repeat_interleave(2, dim=1) for each in (streams.token, streams.alive))
    optional = torch.stack([streams.alive, ~streams.is_root], dim=2).flatten(1)
    scores = -torch.rand(token.shape, device=arguments.device)
    # Scores are even in (-1, 0]: the threshold lets pass what the last fork layer can admit.
    threshold = torch.tensor(-share_admitted(budget, fork=2), device=arguments.device)
    rule = {"causal": route_causal, "topk": route_topk}.get(router, partial(route_threshold, threshold=threshold))

    def route() -> tuple[Tensor, Tensor]:
        return pack_left(rule(scores, token, optional, alive, budget), width)

    routing, whole = (median(work, arguments) for work in (route, lambda: block(x, *angles, streams.log_score, None)))
    name = f"{router:<9} budget {budget!s:<4} {length:>6} tokens"
    print(f"{name} {1000 * routing:>8.2f} ms, a block {1000 * whole:>8.2f} ms")
    seconds = {"routing_milliseconds": 1000 * routing, "block_milliseconds": 1000 * whole}
    return {"router": router, "budget": str(budget), "length": length, "width": width, **seconds}


def crowd(budget: Fraction, length: int, arguments: argparse.Namespace) -> tuple[Streams, int]:
    """Streams of a row that spends all its budget evenly, and how many they are."""
    width = math.floor(budget * length)
    token = torch.arange(width, device=arguments.device) * length // width
    token = token.expand(arguments.batch_size, -1)
    alive = torch.ones_like(token, dtype=torch.bool)
    nothing = torch.zeros(token.shape, device=arguments.device)
    return Streams(nothing[..., None], -torch.rand_like(nothing), token, alive, length), width


def median(work: Callable[[], Any], arguments: argparse.Namespace) -> float:
    """Seconds of some work."""
    times = []
    for _ in range(arguments.rounds + 1):
        start = now(arguments.device)
        work()
        times.append(now(arguments.device) - start)
    return statistics.median(times[1:])


def attention_memory(streams: int, arguments: argparse.Namespace) -> int:
    """Bytes held at most in attention over one row of 12 heads of 64."""
    dtype, device = getattr(torch, arguments.precision), torch.device(arguments.device)

    def work() -> None:
        q, k, v = (torch.randn(1, 12, streams, 64, dtype=dtype, device=device, requires_grad=True) for _ in range(3))
        log_score = (-torch.rand(1, streams, device=device)).requires_grad_()
        attenuated_attention(q, k, v, log_score, "paper").sum().backward()

    return peak_bytes(work, arguments.device)


if __name__ == "__main__":
    main()
