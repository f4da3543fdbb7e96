"""Time of routing against its length, and memory of attention against the number of streams.

A router sees candidates as they stand before the last of three fork layers: as many streams as the budget allows, each
offering a fork and a keep. Its time is set beside that of a block over the streams that it lets through, forward alone
for both. Memory is what a process of its own holds at most in attention, forward and backward, beyond what it held
before; on a GPU what tensors hold.

The last line is JSON: the settings, the machine, and a row for each router, budget and length, and for each width.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thoughtbubbles import ThoughtbubblesConfig
from thoughtbubbles.attention import attenuated_attention, rotary_angles
from thoughtbubbles.budget import parse_budget
from thoughtbubbles.controls import ROUTERS
from thoughtbubbles.gate import pack_left
from thoughtbubbles.machine import describe_machine
from thoughtbubbles.modeling import ThoughtbubblesBlock
from thoughtbubbles.streams import Streams
from thoughtbubbles.training.meter import peak_memory


def main() -> None:
    """Measure, or be the process whose memory is measured."""
    arguments = parse_arguments()
    if arguments.memory_of is not None:
        print(attention_memory(arguments.memory_of, arguments))
        return
    rows = [
        measure(router, parse_budget(budget), length, arguments)
        for router in ("causal", "topk")
        for budget in arguments.budgets
        for length in arguments.lengths
    ]
    memory = [{"streams": streams, "bytes": memory_in_a_process(streams, arguments)} for streams in arguments.widths]
    for row in memory:
        each = row["bytes"] / row["streams"]
        print(f"attention over {row['streams']:>6} streams {row['bytes'] / 1e6:>9.1f} MB, {each:,.0f} bytes a stream")
    machine = describe_machine(arguments.device)
    print(json.dumps({"settings": vars(arguments), "machine": machine, "routing": rows, "memory": memory}))


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
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


@torch.no_grad()
def measure(router: str, budget: Fraction, length: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """A row of the result."""
    streams, width = crowd(budget, length, arguments)
    config = ThoughtbubblesConfig.preset(arguments.preset)
    block = ThoughtbubblesBlock(config).to(arguments.device)
    x = torch.randn(arguments.batch_size, width, config.hidden_size, device=arguments.device)
    angles = rotary_angles(streams.positions(), config.head_dim, config.rope_theta)
    token, alive = (each.repeat_interleave(2, dim=1) for each in (streams.token, streams.alive))
    optional = torch.stack([streams.alive, ~streams.is_root], dim=2).flatten(1)
    scores = -torch.rand(token.shape, device=arguments.device)

    def route() -> tuple[Tensor, Tensor]:
        return pack_left(ROUTERS[router](scores, token, optional, alive, budget), width)

    routing, whole = (median(work, arguments) for work in (route, lambda: block(x, *angles, streams.log_score, None)))
    name = f"{router:<8} budget {budget!s:<4} {length:>6} tokens"
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


def memory_in_a_process(streams: int, arguments: argparse.Namespace) -> int:
    """`attention_memory`, measured in a process that does nothing else."""
    command = [sys.executable, __file__, "--memory-of", str(streams)]
    command += ["--precision", arguments.precision, "--device", arguments.device]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def attention_memory(streams: int, arguments: argparse.Namespace) -> int:
    """Bytes that this process holds at most in attention over one row of 12 heads of 64, beyond what it held before."""
    dtype, device = getattr(torch, arguments.precision), torch.device(arguments.device)

    def work(width: int) -> None:
        q, k, v = (torch.randn(1, 12, width, 64, dtype=dtype, device=device, requires_grad=True) for _ in range(3))
        log_score = (-torch.rand(1, width, device=device)).requires_grad_()
        attenuated_attention(q, k, v, log_score, "paper").sum().backward()

    work(64)  # what libraries take once
    if (peaks := Path("/proc/self/clear_refs")).exists():
        peaks.write_text("5")  # begin anew: what was held in starting up hides what comes
    before = peak_memory(device)
    work(streams)
    return peak_memory(device) - before


def now(device: str) -> float:
    """Seconds, when the device has done its work."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
