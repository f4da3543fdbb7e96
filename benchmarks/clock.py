"""The clock of the benchmarks."""

import time

import torch


def now(device: str) -> float:
    """Seconds, when the device has done its work."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def worked(device: str) -> float:
    """Seconds that this process has worked: on a CPU those of its threads, whatever else the machine does."""
    return now(device) if device.startswith("cuda") else time.process_time()
