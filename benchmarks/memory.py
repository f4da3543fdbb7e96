"""The memory of the benchmarks."""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(work: Callable[[], Any], device: str) -> int:
    """Bytes that PyTorch's allocator holds at most during some work, beside those that it held before."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    results: Any = seen.profiler.kineto_results  # no public name has single allocations
    changes = sorted((each.start_ns(), each.nbytes()) for each in results.events() if each.name() == "[memory]")
    return int(max(accumulate(change for _, change in changes)))
