"""torch.compile: what is computed stays, and every budget has one graph."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from tests.helpers import OTHER_BLOCKS, random_ids, tiny_model
from tests.run_fixtures import tiny_recipe
from tests.training.test_run import MEASURED
from thoughtbubbles import ThoughtbubblesForCausalLM
from thoughtbubbles.data import PreparedData
from thoughtbubbles.model.rules import RULES
from thoughtbubbles.support.metrics import read_metrics
from thoughtbubbles.training import loop as loop_module
from thoughtbubbles.training.run import train
from thoughtbubbles.training.sharding import compile_model

long = pytest.mark.long


@pytest.fixture
def graphs() -> Iterator[CompileCounterWithBackend]:
    """A backend that counts graphs and makes no code of its own."""
    torch._dynamo.reset()
    counters.clear()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


def trained(
    model: ThoughtbubblesForCausalLM, ids: Tensor, step: int, budget: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and all gradients of a pass as the loop makes it."""
    model.train()
    model.zero_grad()
    model.model.routing_step.fill_(step)
    loss = model(input_ids=ids, labels=ids, budget=budget, num_items_in_batch=torch.tensor(ids.numel())).loss
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return loss.detach(), gradients


@torch.no_grad()
def evaluated(model: ThoughtbubblesForCausalLM, ids: Tensor) -> Tensor:
    model.eval()
    loss: Tensor = model(input_ids=ids, labels=ids, budget=None, num_items_in_batch=1).loss
    return loss


@pytest.mark.parametrize(
    ("routing", "budgets"),
    [
        ("threshold", [1.5, 2]),
        pytest.param("causal", [1.5, 2], marks=long),
        pytest.param("topk", [1.5, 2], marks=long),
        pytest.param("none", [1], marks=long),
        pytest.param("looped", [1], marks=long),
        pytest.param("random", [1.5, 2], marks=long),
        pytest.param("uniform", [1.5, 2], marks=long),
        pytest.param("copy", [1, 2], marks=long),
        pytest.param("pause", [1, 2], marks=long),
        pytest.param("attended", [1.5, 2], marks=long),
    ],
)
@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=long)])
def test_each_budget_is_one_graph_that_computes_what_the_model_does(
    routing: str, budgets: list[float], checkpointing: bool, graphs: CompileCounterWithBackend
) -> None:
    shape: dict[str, Any] = {"routing": routing, "num_hidden_layers": 2, "budget": 2}
    if routing == "looped":
        shape |= {"routing": "none", "num_loops": 2}
    if routing == "attended":
        shape |= {"routing": "causal", "fork_content": "attended"}
    shape["fork_layers"] = [1] if RULES[shape["routing"]].router is not None else []
    eager, compiled = tiny_model(**shape), tiny_model(**shape)
    if checkpointing:
        for model in (eager, compiled):
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    compile_model(compiled, "whole", backend=graphs)
    for step in (1, 2, 3):
        ids = random_ids(2, 9, seed=step)
        for budget in budgets:
            found, expected = (trained(model, ids, step, budget) for model in (compiled, eager))
            torch.testing.assert_close(found, expected)
        torch.testing.assert_close(evaluated(compiled, ids), evaluated(eager, ids))
        with torch.compiler.set_stance("force_eager"):  # as benchmarks are scored in between
            evaluated(compiled, random_ids(1, step))
    assert graphs.frame_count == len(budgets) + 1
    assert not counters["graph_break"]
    assert not counters["recompile_limit"]


@long
@pytest.mark.parametrize("block", OTHER_BLOCKS, ids=["llama", "neox", "both"])
@pytest.mark.parametrize("pieces", ["blocks", "whole"])
def test_other_blocks_compile(block: dict[str, Any], pieces: str, graphs: CompileCounterWithBackend) -> None:
    shape = {"num_hidden_layers": 2, "fork_layers": [1], "budget": 1.5, **block}
    eager, compiled = tiny_model(**shape), tiny_model(**shape)
    compile_model(compiled, pieces, backend=graphs)
    found, expected = (trained(model, random_ids(2, 9), 1, 1.5) for model in (compiled, eager))
    torch.testing.assert_close(found, expected)
    assert not counters["graph_break"]


@long
@pytest.mark.parametrize("pieces", ["blocks", "whole"])
def test_a_compiled_run_is_that_of_the_model(
    pieces: str,
    tmp_path: Path,
    tiny_run: Path,
    tiny_data: PreparedData,
    graphs: CompileCounterWithBackend,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its last batch of an evaluation has fewer rows than the others, and its last step of each two is watched."""
    monkeypatch.setattr(loop_module, "compile_model", partial(compile_model, backend=graphs))
    assert len(tiny_data.validation) % 4
    train(tiny_recipe(tmp_path, tiny_data.path, f"training.compile={pieces}"), progress=False)
    found, expected = (read_metrics(run / "metrics.jsonl") for run in (tmp_path / "run", tiny_run))
    for row in (*found, *expected):
        for name in MEASURED:
            row.pop(name, None)
    assert found == [pytest.approx(row, rel=1e-4) for row in expected]
    if pieces == "whole":
        assert graphs.frame_count == 2


@pytest.mark.parametrize(
    "rules",
    [
        {"routing": "causal"},
        pytest.param({"routing": "threshold"}, marks=long),
        pytest.param({"routing": "topk"}, marks=long),
        pytest.param({"routing": "random"}, marks=long),
        pytest.param({"routing": "none", "num_loops": 2}, marks=long),
    ],
    ids=str,
)
def test_blocks_compiled_by_themselves_compute_what_the_model_does(
    rules: dict[str, Any], graphs: CompileCounterWithBackend
) -> None:
    shape: dict[str, Any] = {"num_hidden_layers": 3, "fork_layers": [1], "budget": 2, **rules}
    eager, compiled = tiny_model(**shape), tiny_model(**shape)
    compile_model(compiled, "blocks", backend=graphs)
    for step in (1, 2, 3):
        ids = random_ids(2, 9, seed=step)
        for budget in (1.5, 2):
            found, expected = (trained(model, ids, step, budget) for model in (compiled, eager))
            torch.testing.assert_close(found, expected)
        torch.testing.assert_close(evaluated(compiled, ids), evaluated(eager, ids))
        if step == 1:
            warm = graphs.frame_count
    assert graphs.frame_count == warm


def test_blocks_of_one_width_share_their_graph(graphs: CompileCounterWithBackend) -> None:
    counts = []
    for layers in (4, 9):
        torch._dynamo.reset()
        before = graphs.frame_count
        model = tiny_model(num_hidden_layers=layers, fork_layers=[1], budget=2)
        compile_model(model, "blocks", backend=graphs)
        trained(model, random_ids(2, 9), 1, 2)
        counts.append(graphs.frame_count - before)
    assert counts == [3, 3]
