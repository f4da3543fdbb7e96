"""A tiny corpus and a tiny trained run, made once for all tests that need one."""

import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed
from matplotlib.figure import Figure
from torch.testing._internal.distributed.fake_pg import FakeStore

from thoughtbubbles.data import PreparedData, load_prepared, prepare
from thoughtbubbles.recipes.training import Recipe, load_recipe
from thoughtbubbles.training.run import train

BLOCK = 16
PROCESSES = 4
RECIPE = """
model:
  num_hidden_layers: 3
  hidden_size: 16
  num_attention_heads: 2
  fork_layers: [1, 2]
  budget: 1.5
data:
  path: {data}
training:
  output: {output}
  steps: 12
  batch_size: 4
  learning_rate: 1e-2
  log_every: 2
  eval_every: 4
  save_every: 4
"""


def sentences(count: int) -> list[str]:
    """Documents with some regularity, all different."""
    words = ["stream", "token", "root", "fork", "gate", "budget", "layer", "bubble"]
    return [
        "\n".join(f"the {words[(i + j) % 8]} of {words[(3 * i + j) % 8]} number {i * j}" for j in range(12))
        for i in range(count)
    ]


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    root = tmp_path_factory.mktemp("corpus")
    for index, text in enumerate(sentences(24)):
        (root / f"{index:02}.txt").write_text(text)
    output = tmp_path_factory.mktemp("prepared") / "data"
    prepare(output, [str(root)], vocab_size=300, block_size=BLOCK, validation_fraction=0.2, progress=False)
    return load_prepared(output)


@pytest.fixture(scope="session")
def other_data(tmp_path_factory: pytest.TempPathFactory, tiny_data: PreparedData) -> PreparedData:
    """Other documents, the same tokenizer and block size."""
    root = tmp_path_factory.mktemp("other")
    for index, text in enumerate(sentences(12)):
        (root / f"{index:02}.txt").write_text(text.replace("of", "beside"))
    output, tokenizer = root / "prepared", str(tiny_data.path / "tokenizer")
    prepare(output, [str(root)], tokenizer=tokenizer, block_size=BLOCK, validation_fraction=0.2, progress=False)
    return load_prepared(output)


@pytest.fixture
def float64() -> Iterator[None]:
    """New models and numbers in double precision."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def blank_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are written and not drawn: for tests of what is around them."""
    monkeypatch.setattr(Figure, "savefig", lambda _, path, **__: Path(path).write_bytes(b"a figure"))


@pytest.fixture
def forked_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of a comparison train in forks of this process, which has everything imported."""
    forking = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: forking)


@pytest.fixture
def imagined_processes() -> Iterator[None]:
    """This is the first of four processes; the others are only imagined."""
    torch.distributed.init_process_group("fake", rank=0, world_size=PROCESSES, store=FakeStore())
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def tiny_recipe(folder: Path, data: Path, *overrides: str) -> Recipe:
    """The tiny run's recipe with its output in `folder`/run."""
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(data=data, output=folder / "run"))
    return load_recipe(path, overrides)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, tiny_data: PreparedData) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    train(tiny_recipe(folder, tiny_data.path), progress=False)
    return folder / "run"
