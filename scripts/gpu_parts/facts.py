"""What the device is, and what it does at best: the fastest matrix product and copy, on random numbers."""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from gpu_parts.driver import Item, Setting, run_part

ROUNDS = 10


def items(setting: Setting) -> Iterator[Item]:
    """The device, and its two ceilings."""
    size, most = (256, 1 << 20) if setting.rehearse else (8192, 1 << 30)
    yield Item("device", 1, lambda: describe(setting.device))
    yield Item("matmul", 2, lambda: matmul(setting.device, size))
    yield Item("copy", 2, lambda: copy(setting.device, most))


def describe(device: str) -> dict[str, Any]:
    """Name, memory and versions."""
    if device == "cpu":
        return {"capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def matmul(device: str, size: int) -> dict[str, Any]:
    """FLOP/s of a square product in bfloat16, and in float32 without tf32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        found[f"{dtype}".removeprefix("torch.")] = 2 * size**3 / seconds_of(device, lambda a=a, b=b: a @ b)  # type: ignore[misc]
    return {"size": size, **found}


def copy(device: str, size: int) -> dict[str, Any]:
    """Bytes per second read and written by a copy of `size` bytes within the device."""
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    taken = seconds_of(device, lambda: target.copy_(source))
    return {"bytes_per_second": 2 * source.nbytes / taken, "bytes": source.nbytes}


def seconds_of(device: str, work: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """Median seconds of some work, by the device's own events where it has them."""
    for _ in range(3):
        work()
    if device == "cpu":
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return statistics.median(times)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for start_event, end_event in events:
        start_event.record()
        work()
        end_event.record()
    torch.cuda.synchronize()
    return float(statistics.median(start.elapsed_time(end) for start, end in events)) / 1000


if __name__ == "__main__":
    run_part("facts", items, __doc__)
