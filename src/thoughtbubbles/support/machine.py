"""What a measurement ran on: commit, versions, processor; and how a process that trains on it keeps its memory."""

import ctypes
import os
import platform
import subprocess
from pathlib import Path

import torch
import transformers

from thoughtbubbles.support.version import VERSION


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
