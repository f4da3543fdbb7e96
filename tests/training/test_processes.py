"""Several processes, started by torchrun, train the run that one process trains."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import LLAMA
from tests.run_fixtures import tiny_recipe
from thoughtbubbles.data import PreparedData
from thoughtbubbles.model.accounting import SHARDINGS
from thoughtbubbles.support.metrics import read_metrics
from thoughtbubbles.training.checkpoints import PREFIX
from thoughtbubbles.training.folder import RunSummary
from thoughtbubbles.training.run import train

# Quicker than a compiler of code.
GRAPHS_ALONE = """
from functools import partial
from thoughtbubbles import cli
from thoughtbubbles.training import loop
loop.compile_model = partial(loop.compile_model, backend="aot_eager")
cli.main()
"""
NUMBERS = ("step", "tokens", "flops", "loss", "eval_loss", "learning_rate", "gate_grad_norm")


def start(*arguments: str) -> "subprocess.Popen[str]":
    """Start processes."""
    command = [sys.executable, "-m", "torch.distributed.run", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def torchrun(*arguments: str) -> str:
    """Run processes to their end; what they printed."""
    running = start(*arguments)
    out, error = running.communicate(timeout=300)
    assert running.returncode == 0, error
    return out


def command(folder: Path, data: Path, processes: int, *overrides: str) -> list[str]:
    """What trains the tiny recipe in `folder`."""
    tiny_recipe(folder, data)
    local = [f"--nproc-per-node={processes}", "--standalone"]
    return [*local, "-m", "thoughtbubbles", "train", str(folder / "recipe.yaml"), *overrides]


def with_script(folder: Path, script: str, arguments: list[str]) -> list[str]:
    """The same with a script in the place of the package."""
    path, place = folder / "script.py", arguments.index("-m")
    path.write_text(script)
    return [*arguments[:place], str(path), *arguments[place + 2 :]]


def run(folder: Path, data: Path, processes: int, *overrides: str) -> str:
    """Train the tiny recipe in `folder`; what the command printed."""
    return torchrun(*command(folder, data, processes, *overrides))


def numbers(run: Path) -> list[dict[str, float]]:
    return [{name: row[name] for name in NUMBERS if name in row} for row in read_metrics(run / "metrics.jsonl")]


def assert_same_curve(run: Path, other: Path) -> None:
    for row, one in zip(numbers(run), numbers(other), strict=True):
        assert row == pytest.approx(one, rel=1e-4)


def take_back_the_end(run: Path) -> None:
    """As if it had been killed after its checkpoint at step 8."""
    for leaving in ("summary.json", f"checkpoints/{PREFIX}12/seal.json"):
        (run / leaving).unlink()


def is_divided(checkpoint: Path) -> bool:
    """Whether its weights are in the parts that processes hold."""
    return not (checkpoint / "model.safetensors").exists() and len(list((checkpoint / "state").iterdir())) > 2


@pytest.mark.long
def test_two_processes_train_the_run_of_one_and_either_goes_on_with_the_other(
    tmp_path: Path, tiny_run: Path, tiny_data: PreparedData
) -> None:
    printed = run(tmp_path, tiny_data.path, 2)
    assert printed.count("validation loss") == 1
    assert_same_curve(tmp_path / "run", tiny_run)
    for processes in (1, 2):
        take_back_the_end(tmp_path / "run")
        run(tmp_path, tiny_data.path, processes)
        assert_same_curve(tmp_path / "run", tiny_run)
    assert RunSummary.read(tmp_path / "run").eval_loss == pytest.approx(RunSummary.read(tiny_run).eval_loss, rel=1e-4)


@pytest.mark.long
def test_a_run_divided_over_two_processes_is_that_of_one_which_goes_on_with_it(
    tmp_path: Path, tiny_run: Path, tiny_data: PreparedData
) -> None:
    printed = run(tmp_path, tiny_data.path, 2, "training.sharding=fsdp")
    assert printed.count("validation loss") == 1
    assert_same_curve(tmp_path / "run", tiny_run)
    weights = [load_file(folder / "model" / "model.safetensors") for folder in (tmp_path / "run", tiny_run)]
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)
    assert is_divided(tmp_path / "run" / "checkpoints" / f"{PREFIX}8")
    take_back_the_end(tmp_path / "run")
    run(tmp_path, tiny_data.path, 1, "training.sharding=fsdp")
    assert_same_curve(tmp_path / "run", tiny_run)
    assert not is_divided(tmp_path / "run" / "checkpoints" / f"{PREFIX}12")


@pytest.mark.long
@pytest.mark.parametrize(
    ("sharding", "fields"),
    [("fsdp", LLAMA), *((sharding, {"fork_content": "attended", "budget": 2}) for sharding in SHARDINGS)],
    ids=["llama", *(f"attended-{sharding}" for sharding in SHARDINGS)],
)
def test_another_model_divided_over_two_processes_trains_as_one(
    sharding: str, fields: dict[str, Any], tmp_path: Path, tiny_data: PreparedData
) -> None:
    said = [f"training.sharding={sharding}", *(f"model.{name}={json.dumps(value)}" for name, value in fields.items())]
    for processes in (1, 2):
        (tmp_path / str(processes)).mkdir()
        run(tmp_path / str(processes), tiny_data.path, processes, *said)
    assert_same_curve(tmp_path / "2" / "run", tmp_path / "1" / "run")


@pytest.mark.long
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_thresholds_are_those_of_one_process(tmp_path: Path, tiny_data: PreparedData, sharding: str) -> None:
    rule = "model.routing=threshold"
    (tmp_path / "one").mkdir()
    train(tiny_recipe(tmp_path / "one", tiny_data.path, rule), progress=False)
    shared = [rule, f"training.sharding={sharding}", "training.micro_batch_size=1"]
    run(tmp_path, tiny_data.path, 2, *shared)
    assert_same_curve(tmp_path / "run", tmp_path / "one" / "run")
    ours, theirs = (
        load_file(folder / "run" / "model" / "model.safetensors") for folder in (tmp_path, tmp_path / "one")
    )
    name = "model.gates.2.histogram."
    assert ours[f"{name}updates"] == theirs[f"{name}updates"] == 12
    # A score at the edge of a bin may fall into the next: a step has 192.
    assert (ours[f"{name}reached"] - theirs[f"{name}reached"]).abs().max() < 0.02
    take_back_the_end(tmp_path / "run")
    run(tmp_path, tiny_data.path, 1, *shared)
    assert_same_curve(tmp_path / "run", tmp_path / "one" / "run")


@pytest.mark.long
def test_a_run_of_one_process_goes_on_divided_over_two(tmp_path: Path, tiny_run: Path, tiny_data: PreparedData) -> None:
    shutil.copytree(tiny_run, tmp_path / "run")
    take_back_the_end(tmp_path / "run")
    run(tmp_path, tiny_data.path, 2, "training.sharding=fsdp")
    assert_same_curve(tmp_path / "run", tiny_run)
    assert is_divided(tmp_path / "run" / "checkpoints" / f"{PREFIX}12")


@pytest.mark.long
@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize(
    "shape",
    [
        ["model.tie_word_embeddings=false", "training.gradient_checkpointing=true", "data.eval_blocks=5"],
        ["model.routing=none", "model.num_loops=2"],
    ],
    ids=["untied", "looped"],
)
def test_gradients_that_accumulate_are_those_of_the_whole_batch(
    tmp_path: Path, tiny_data: PreparedData, sharding: str, shape: list[str]
) -> None:
    """Untied, checkpointed, and with an evaluation in which one process has fewer rows than the other; and looped."""
    (tmp_path / "one").mkdir()
    train(tiny_recipe(tmp_path / "one", tiny_data.path, *shape), progress=False)
    run(tmp_path, tiny_data.path, 2, *shape, "training.micro_batch_size=1", f"training.sharding={sharding}")
    assert_same_curve(tmp_path / "run", tmp_path / "one" / "run")


@pytest.mark.long
@pytest.mark.parametrize(("sharding", "pieces"), [("ddp", "whole"), ("ddp", "blocks"), ("fsdp", "blocks")])
def test_two_processes_train_a_compiled_model(
    tmp_path: Path, tiny_run: Path, tiny_data: PreparedData, sharding: str, pieces: str
) -> None:
    overrides = [f"training.compile={pieces}", f"training.sharding={sharding}"]
    torchrun(*with_script(tmp_path, GRAPHS_ALONE, command(tmp_path, tiny_data.path, 2, *overrides)))
    assert_same_curve(tmp_path / "run", tiny_run)


@pytest.mark.long
def test_adapters_of_a_divided_model_are_merged(tmp_path: Path, tiny_run: Path, tiny_data: PreparedData) -> None:
    pytest.importorskip("peft")
    for processes, name in ((1, "one"), (2, "two")):
        (tmp_path / name).mkdir()
        recipe = tiny_recipe(tmp_path / name, tiny_data.path)
        recipe.model = {"pretrained": str(tiny_run)}
        (tmp_path / name / "lora.yaml").write_text(recipe.to_yaml())
        train = ["-m", "thoughtbubbles", "train", str(tmp_path / name / "lora.yaml"), "training.lora={rank: 2}"]
        torchrun(f"--nproc-per-node={processes}", "--standalone", *train, "training.sharding=fsdp")
    assert_same_curve(tmp_path / "two" / "run", tmp_path / "one" / "run")
    one, two = (load_file(tmp_path / name / "run" / "model" / "model.safetensors") for name in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-4)


@pytest.mark.long
def test_killing_one_of_two_processes_ends_the_run_which_then_goes_on(tmp_path: Path, tiny_data: PreparedData) -> None:
    longer = ["training.sharding=fsdp", "training.steps=40"]
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    run(tmp_path / "whole", tiny_data.path, 2, *longer)
    killed = tmp_path / "killed" / "run"
    running = start(*command(tmp_path / "killed", tiny_data.path, 2, *longer))
    while not (killed / "checkpoints" / f"{PREFIX}8").exists():
        assert running.poll() is None
        time.sleep(0.01)
    workers = psutil.Process(running.pid).children()
    (second,) = (worker for worker in workers if worker.environ().get("RANK") == "1")
    second.send_signal(signal.SIGKILL)
    _, error = running.communicate(timeout=60)
    assert running.returncode != 0, error
    assert not any(worker.is_running() for worker in workers)
    assert not (killed / "summary.json").exists()
    run(tmp_path / "killed", tiny_data.path, 2, *longer)
    assert numbers(killed) == numbers(tmp_path / "whole" / "run")
    assert RunSummary.read(killed).eval_loss == RunSummary.read(tmp_path / "whole" / "run").eval_loss


@pytest.mark.long
def test_a_batch_that_the_processes_cannot_share(tmp_path: Path, tiny_data: PreparedData) -> None:
    with pytest.raises(AssertionError, match="expected a multiple of the number of processes, 2"):
        run(tmp_path, tiny_data.path, 2, "training.batch_size=5")


@pytest.mark.long
def test_benchmarks_are_not_scored_with_a_share_of_the_model(tmp_path: Path, tiny_data: PreparedData) -> None:
    with pytest.raises(AssertionError, match=r"expected null with training\.sharding=fsdp"):
        run(tmp_path, tiny_data.path, 2, "training.sharding=fsdp", "training.eval_tasks=[gsm8k]")


@pytest.mark.long
def test_a_divided_model_is_not_one_graph(tmp_path: Path, tiny_data: PreparedData) -> None:
    with pytest.raises(AssertionError, match=r"training\.compile=whole: expected blocks"):
        run(tmp_path, tiny_data.path, 2, "training.sharding=fsdp", "training.compile=whole")


@pytest.mark.long
def test_two_nodes_train_the_run_of_one_process(tmp_path: Path, tiny_run: Path, tiny_data: PreparedData) -> None:
    tiny_recipe(tmp_path, tiny_data.path)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    meeting = ["--rdzv-id=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}"]
    trains = ["-m", "thoughtbubbles", "train", str(tmp_path / "recipe.yaml")]
    with ThreadPoolExecutor(2) as nodes:
        printed = list(nodes.map(lambda _: torchrun("--nnodes=2", "--nproc-per-node=1", *meeting, *trains), range(2)))
    assert "".join(printed).count("validation loss") == 1
    assert_same_curve(tmp_path / "run", tiny_run)
