"""What every test runs under: no network, fixed seeds, poisoned scratch memory, no flushing, repeatable hypothesis."""

import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings

pytest_plugins = ["tests.run_fixtures"]

# The tests run in as many processes as there are cores; what they start has as few threads.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

_EMPTY, _EMPTY_STRIDED = torch.empty, torch.empty_strided

for _variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ[_variable] = "1"

settings.register_profile("default", derandomize=True, deadline=None, max_examples=30)
settings.register_profile("long", derandomize=True, deadline=None, max_examples=2000)


def pytest_configure(config: pytest.Config) -> None:
    """`pytest -m long` also draws more examples."""
    settings.load_profile("long" if config.getoption("markexpr") == "long" else "default")


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Seed every generator, so that a test draws the same numbers alone, shuffled and in a whole run."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries that draw from the global generator
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the package remembers stays out of the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("THOUGHTBUBBLES_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """No test outlives a loss of power: what is written need not have reached the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def poisoned_scratch_memory() -> Iterator[None]:
    """Fill memory that nobody has written yet with NaN or a huge number, so that reading it shows."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch, "empty_strided"),
            (torch.Tensor, "new_empty"),
        ):
            patch.setattr(owner, name, _poisoning(getattr(owner, name)))
        yield


def _poisoning(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def allocate_poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        if allocate in (_EMPTY, _EMPTY_STRIDED) and kwargs.get("device") is None:
            kwargs["device"] = torch.get_default_device()  # `with torch.device(...)` does not know this function
        scratch = allocate(*args, **kwargs)
        with torch.no_grad():
            if scratch.is_floating_point() or scratch.is_complex():
                return scratch.fill_(torch.nan)
            return scratch.fill_(1 if scratch.dtype == torch.bool else torch.iinfo(scratch.dtype).max)

    return allocate_poisoned
