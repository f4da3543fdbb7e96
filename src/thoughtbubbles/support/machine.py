"""The machine: what a measurement ran on, in which precision it is fast, and how training on it keeps its memory."""

import ctypes
import os
import platform
import subprocess
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import transformers

from thoughtbubbles.support import VERSION


def describe_machine(device: str = "cpu") -> dict[str, str]:
    """Commit, versions, processor and threads, for the JSON of a result.

    Args:
        device: type of device it ran on, cpu or cuda.
    """
    return {
        "thoughtbubbles": VERSION,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else _processor(),
        "threads": str(torch.get_num_threads()),
    }


# Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let this process keep what tensors on a CPU free, for the next ones; whether that can be arranged.

    glibc gives large blocks back to the kernel, which hands them out again page by page, each emptied: in a training
    step that asks for all its activations anew a tenth of the time and more, in no operator that a profiler names.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    return bool(library.mallopt(_TRIM_THRESHOLD, -1)) and bool(library.mallopt(_MMAP_MAX, 0))


COMMIT_VARIABLE = "THOUGHTBUBBLES_COMMIT"
"""Environment variable that says it of a copy of the source, whose folder may be another checkout."""


def _commit() -> str:
    """Of the source that runs; `unknown` where it is not a checkout, or lies ignored inside another one."""
    if said := os.environ.get(COMMIT_VARIABLE):
        return said
    try:
        _git("ls-files", "--error-unmatch", Path(__file__).name)
        return _git("describe", "--always", "--dirty", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout.strip()


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


# oneDNN multiplies for torch; held back to one of these it has no instructions of bfloat16.
WITHOUT_BFLOAT16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")


def device_type() -> str:
    """The type of device that a run trains on."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type


def choose_precision(asked: str, device: str) -> str:
    """`float32` or `bfloat16`: what a recipe asks for, where that is `auto` the faster one on a type of device."""
    if asked != "auto":
        return asked
    return "bfloat16" if has_bfloat16(device) else "float32"


def has_bfloat16(device: str) -> bool:
    """Whether this machine multiplies bfloat16 in hardware; elsewhere it is emulated, many times slower than float32.

    Of a processor the capabilities count that torch and oneDNN are let use: `ATEN_CPU_CAPABILITY` and
    `ONEDNN_MAX_CPU_ISA` may hold them back.
    """
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device == "cpu" and torch.backends.mkldnn.is_available() and _processor_has_bfloat16()


def _processor_has_bfloat16() -> bool:
    found = torch.cpu.get_capabilities()
    if found.get("bf16"):  # the extension of ARM
        return True
    most = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "DEFAULT"
    if most.upper() in WITHOUT_BFLOAT16 or not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


# Of a container, in versions 2 and 1 of control groups.
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def device_memory(device: torch.device) -> float:
    """Bytes of memory of a device."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return host_memory()


def host_memory() -> float:
    """Bytes of memory of this machine, or that its container may use; infinite where neither is known."""
    found = [float("inf")]
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for path in map(Path, LIMITS):
        text = path.read_text(encoding="utf-8").strip() if path.exists() else ""
        if text.isdigit():
            found.append(int(text))
    return min(found)


LONG = 0.02
"""Seconds of a product, after which no larger one is tried."""


@cache
def measured_peak(device: torch.device, bfloat16: bool) -> float:
    """Operations per second of the fastest square matrix product found on a device, in float32 or bfloat16."""
    best, dtype = 0.0, torch.bfloat16 if bfloat16 else torch.float32
    generator = torch.Generator(device)  # its own: nobody else's draws change
    for size in (256, 512, 1024, 2048, 4096, 8192):
        a = torch.randn(size, size, device=device, dtype=dtype, generator=generator)
        seconds = min(_seconds(lambda a=a: a @ a) for _ in range(4))  # type: ignore[misc]
        best = max(best, 2 * size**3 / seconds)
        if seconds > LONG:
            break
    return best


def _seconds(product: Callable[[], torch.Tensor]) -> float:
    start = time.perf_counter()
    product()[0, 0].item()  # it waits
    return time.perf_counter() - start
