"""Choices that depend on nothing but what is chosen from and a seed."""

import hashlib

DIGEST_BYTES = 16


def digest(text: bytes) -> bytes:
    """What stands for a text: equal for equal texts."""
    return hashlib.blake2b(text, digest_size=DIGEST_BYTES).digest()


def draw(seed: int, purpose: str, value: bytes) -> bytes:
    """A uniform random key that depends on its arguments alone: no process, platform or library version."""
    return hashlib.blake2b(f"{seed}/{purpose}/".encode() + value, digest_size=16).digest()


def spread(total: int, count: int | None) -> list[int]:
    """`count` of the indices below `total`, evenly spaced, or all: a sample that no single document fills."""
    count = total if count is None else min(count, total)
    return [index * total // count for index in range(count)]
