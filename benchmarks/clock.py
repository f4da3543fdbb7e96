"""The clock of the benchmarks."""

import time

import torch


def now(device: str) -> float:
    """Seconds, when the device has done its work."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()
