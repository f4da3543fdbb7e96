"""What a measurement says of its machine, and how a process that trains keeps its memory."""

import platform
import subprocess
import sys

import pytest

from thoughtbubbles.support.machine import describe_machine

FAULTS = """
import resource, torch
from thoughtbubbles.support.machine import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(32, 1024, 1024)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(min(faults() for _ in range(5)))
assert keep_freed_memory()
print(min(faults() for _ in range(5)))
"""


@pytest.mark.long
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_kept_for_the_next_tensor() -> None:
    """Of 128 MiB, 32,768 pages, or 64 where they are huge; the allocator may move a block before it settles."""
    made = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    returned, kept = map(int, made.stdout.split())
    assert kept < 32 < returned


def test_a_copy_of_the_source_can_be_told_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THOUGHTBUBBLES_COMMIT", "0123abc")
    assert describe_machine()["commit"] == "0123abc"
