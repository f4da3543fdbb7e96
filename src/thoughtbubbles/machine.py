"""What a measurement ran on: commit, versions, processor."""

import platform
import subprocess
from pathlib import Path

import torch
import transformers

import thoughtbubbles


def describe_machine(device: str = "cpu") -> dict[str, str]:
    """Commit, versions, processor and threads, for the JSON of a result.

    Args:
        device: type of device it ran on, cpu or cuda.
    """
    return {
        "thoughtbubbles": thoughtbubbles.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else _processor(),
        "threads": str(torch.get_num_threads()),
    }


def _commit() -> str:
    """Of the source that runs; `unknown` where it is not a checkout, or lies ignored inside another one."""
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
