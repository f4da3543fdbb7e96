"""Several processes, started by torchrun, train the run that one process trains."""

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.run_fixtures import tiny_recipe
from tests.training import sharded_worker
from thoughtbubbles.data import PreparedData
from thoughtbubbles.training.callbacks import read_metrics
from thoughtbubbles.training.checkpoints import PREFIX
from thoughtbubbles.training.run import RunSummary

NUMBERS = ("step", "tokens", "flops", "loss", "eval_loss", "learning_rate", "gate_grad_norm")


def torchrun(*arguments: str) -> str:
    """Start processes; what they printed."""
    command = [sys.executable, "-m", "torch.distributed.run", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run(folder: Path, data: Path, processes: int, *overrides: str) -> str:
    """Train the tiny recipe in `folder` with the command; what it printed."""
    tiny_recipe(folder, data)
    command = ["-m", "thoughtbubbles", "train", str(folder / "recipe.yaml"), *overrides]
    return torchrun(f"--nproc-per-node={processes}", "--standalone", *command)


def numbers(run: Path) -> list[dict[str, float]]:
    return [{name: row[name] for name in NUMBERS if name in row} for row in read_metrics(run / "metrics.jsonl")]


@pytest.mark.long
def test_two_processes_train_the_run_of_one_and_either_goes_on_with_the_other(
    tmp_path: Path, tiny_run: Path, tiny_data: PreparedData
) -> None:
    printed = run(tmp_path, tiny_data.path, 2)
    assert printed.count("validation loss") == 1
    expected = numbers(tiny_run)
    for row, one in zip(numbers(tmp_path / "run"), expected, strict=True):
        assert row == pytest.approx(one, rel=1e-4)
    for processes in (1, 2):
        # As if the run had been killed after its checkpoint at step 8.
        for leaving in ("summary.json", f"checkpoints/{PREFIX}12/seal.json"):
            (tmp_path / "run" / leaving).unlink()
        run(tmp_path, tiny_data.path, processes)
        for row, one in zip(numbers(tmp_path / "run"), expected, strict=True):
            assert row == pytest.approx(one, rel=1e-4)
    assert RunSummary.read(tmp_path / "run").eval_loss == pytest.approx(RunSummary.read(tiny_run).eval_loss, rel=1e-4)


@pytest.mark.long
def test_a_batch_that_the_processes_cannot_share(tmp_path: Path, tiny_data: PreparedData) -> None:
    with pytest.raises(AssertionError, match="expected a multiple of the number of processes, 2"):
        run(tmp_path, tiny_data.path, 2, "training.batch_size=5")


@pytest.mark.long
def test_two_nodes_train_the_run_of_one_process(tmp_path: Path, tiny_run: Path, tiny_data: PreparedData) -> None:
    tiny_recipe(tmp_path, tiny_data.path)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    meeting = ["--rdzv-id=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}"]
    command = ["-m", "thoughtbubbles", "train", str(tmp_path / "recipe.yaml")]
    with ThreadPoolExecutor(2) as nodes:
        printed = list(nodes.map(lambda _: torchrun("--nnodes=2", "--nproc-per-node=1", *meeting, *command), range(2)))
    assert "".join(printed).count("validation loss") == 1
    for row, one in zip(numbers(tmp_path / "run"), numbers(tiny_run), strict=True):
        assert row == pytest.approx(one, rel=1e-4)


@pytest.mark.long
def test_a_model_that_torch_shards_learns_as_on_one_process() -> None:
    """`train` does not shard yet; that the model can be sharded is what it will rest on."""
    found = json.loads(torchrun("--nproc-per-node=2", "--standalone", "-m", sharded_worker.__name__))
    assert found == pytest.approx(sharded_worker.losses(), rel=1e-4)
    assert len(set(found)) == sharded_worker.STEPS
