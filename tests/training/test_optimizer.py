"""Schedules, groups, what is frozen, adapters, the ramp of the budget and moments of another run."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.helpers import tiny_model
from tests.run_fixtures import BLOCK, tiny_recipe
from tests.training.test_run import Kill, comparable, train_with, trained_budgets
from thoughtbubbles import ThoughtbubblesForCausalLM
from thoughtbubbles.data import PreparedData
from thoughtbubbles.model.accounting import training_flops
from thoughtbubbles.recipes.training import GroupSection, LoraSection, Recipe, RecipeError, TrainingSection
from thoughtbubbles.support.metrics import read_metrics
from thoughtbubbles.training.meter import training_budget
from thoughtbubbles.training.optimizer import add_adapters, build_optimizer, freeze, rate_of_step
from thoughtbubbles.training.run import train


def settings(**fields: Any) -> TrainingSection:
    return TrainingSection(**{"output": "run", "steps": 20, "warmup_fraction": 0.25, **fields})


def rates(**fields: Any) -> list[float]:
    return [rate_of_step(settings(**fields), step) for step in range(1, 21)]


def test_each_schedule_is_its_formula() -> None:
    up = [step / 5 for step in range(5)]
    ends = {"start_fraction": 0.1, "end_fraction": 0.01}
    assert rates(decay_fraction=0.5) == pytest.approx([*up, *[1.0] * 6, *[1 - step / 10 for step in range(1, 10)]])
    assert rates() == pytest.approx([*up, *[1.0] * 12, 3 / 4, 2 / 4, 1 / 4])
    root = [1 - math.sqrt(step / 10) for step in range(10)]
    assert rates(schedule="wsd-sqrt", decay_fraction=0.5) == pytest.approx([*up, *[1.0] * 5, *root])
    half = [(1 + math.cos(math.pi * step / 15)) / 2 for step in range(15)]
    assert rates(schedule="cosine") == pytest.approx([*up, *half])
    assert rates(schedule="cosine", **ends) == pytest.approx(
        [*(0.1 + 0.9 * each for each in up), *(0.01 + 0.99 * each for each in half)]
    )
    assert rates(schedule="constant") == pytest.approx([*up, *[1.0] * 15])
    assert rates(schedule="constant", warmup_fraction=0) == [1.0] * 20


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schedule": "cosine", "decay_fraction": 0.5}, "decay_fraction=0.5: expected null with schedule=cosine"),
        ({"schedule": "constant", "end_fraction": 0.1}, "end_fraction=0.1: expected 0 where the rate does not fall"),
        ({"warmup_fraction": 0, "start_fraction": 0.1}, "start_fraction=0.1: expected 0 where the rate does not rise"),
        ({"warmup_fraction": 0.6, "decay_fraction": 0.5}, "expected shares of the steps, together at most 1"),
        ({"budget_ramp": 0.5, "training_budgets": [1]}, "budget_ramp=0.5: expected 0 with training_budgets"),
    ],
)
def test_what_would_have_no_effect_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**fields)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.lora={rank: 0}", r"training\.lora: rank=0: expected at least 1"),
        ("training.lora={ranks: 4}", r"training\.lora: unknown key ranks: did you mean rank\?"),
        ("training.lora={rank: 4}", r"training\.lora: expected model\.pretrained"),
        ("training.groups={'*': {decay: 1}}", r"training\.groups: unknown key decay: did you mean weight_decay\?"),
        ("training.groups=[1]", r"training\.groups: .*expected keys and values"),
        (
            "training.groups={'*gate*': {learning_rate: 0}}",
            r"training\.groups: learning_rate=0.*: expected a number above 0",
        ),
        ("training.schedule=linear", r"training\.schedule='linear': expected one of wsd, wsd-sqrt, cosine, constant"),
        ("training.freeze=embed", r"training\.freeze='embed': expected a list"),
        ("training.peak_flops=0", r"training\.peak_flops=0: expected a number above 0"),
    ],
)
def test_bad_keys_are_one_line(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=f"^{message}"):
        tiny_recipe(tmp_path, tmp_path, override)


def test_groups_have_rates_and_decay_of_their_own() -> None:
    model = tiny_model()
    groups = {
        "*gates*": GroupSection(learning_rate=0.5),
        "*embed_tokens*": GroupSection(weight_decay=0.0),
        "*norm*": GroupSection(weight_decay=0.3),
    }
    optimizer = build_optimizer(model, settings(learning_rate=0.1, weight_decay=0.2, groups=groups))
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {
        names[parameter]: (group["peak"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert set(found) == set(names.values())
    assert found["model.gates.1.projection.weight"] == (0.5, 0.2)
    assert found["model.gates.1.norm.weight"] == (0.5, 0.0)  # the first pattern that fits
    assert found["model.embed_tokens.weight"] == (0.1, 0.0)
    assert found["model.layers.0.mlp_norm.weight"] == (0.1, 0.3)
    assert found["model.layers.0.mlp.up_proj.weight"] == (0.1, 0.2)
    assert found["model.layers.0.mlp.up_proj.bias"] == (0.1, 0.0)
    with pytest.raises(RecipeError, match=r"training\.groups: '\*embeds\*' fits no .*: expected .*layers\.\*\.mlp"):
        build_optimizer(model, settings(groups={"*embeds*": GroupSection()}))


def test_one_pattern_decays_all_parameters() -> None:
    model = tiny_model(gate_start=0.1)
    everything = {"*": GroupSection(weight_decay=0.3)}
    (group,) = build_optimizer(model, settings(weight_decay=0.2, groups=everything)).param_groups
    assert group["weight_decay"] == 0.3
    assert {*group["params"]} == {*model.parameters()}
    assert {parameter.dim() for parameter in group["params"]} == {1, 2}


def test_what_is_frozen_stays(tmp_path: Path, tiny_data: PreparedData) -> None:
    recipe = tiny_recipe(tmp_path, tiny_data.path, "training.freeze=['*layers.0.*', '*norm*']", "training.save_every=5")
    with pytest.raises(KeyboardInterrupt):
        train_with(recipe, Kill(at=7))
    train(recipe, progress=False)
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    before = load_file(tmp_path / "run" / "checkpoints" / "checkpoint-10" / "model.safetensors")
    stayed = {name for name in after if torch.equal(after[name], before[name])}
    assert stayed == {name for name in after if ".layers.0." in name or "norm" in name}
    with pytest.raises(RecipeError, match=r"training\.freeze=\['\*'\]: expected to leave something to train"):
        freeze(tiny_model(), ["*"])
    with pytest.raises(RecipeError, match=r"training\.freeze: 'model\.embed' fits no parameter"):
        freeze(tiny_model(), ["model.embed"])


def test_adapters_and_gates_are_trained_and_merged(tmp_path: Path, tiny_run: Path, tiny_data: PreparedData) -> None:
    pytest.importorskip("peft")
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole, killed = (tiny_recipe(tmp_path / name, tiny_data.path) for name in ("whole", "killed"))
    for recipe in (whole, killed):
        recipe.model = {"pretrained": str(tiny_run)}
        recipe.training.lora = LoraSection(rank=2)
    summary = train(whole, progress=False)
    with pytest.raises(KeyboardInterrupt):
        train_with(killed, Kill(at=7))
    train(killed, progress=False)
    assert comparable(tmp_path / "killed" / "run") == comparable(tmp_path / "whole" / "run")
    before, after = (
        load_file(folder / "model" / "model.safetensors") for folder in (tiny_run, tmp_path / "whole" / "run")
    )
    assert before.keys() == after.keys()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert {name for name in changed if ".gates." not in name} == {
        f"model.layers.{layer}.{part}.weight"
        for layer in range(3)
        for part in ("attention.qkv_proj", "attention.o_proj", "mlp.up_proj", "mlp.down_proj")
    }
    assert any(".gates." in name for name in changed)
    difference = after["model.layers.0.mlp.up_proj.weight"] - before["model.layers.0.mlp.up_proj.weight"]
    assert torch.linalg.matrix_rank(difference, rtol=1e-4) == 2
    model = ThoughtbubblesForCausalLM.from_pretrained(tmp_path / "whole" / "run" / "model")
    blocks = tiny_data.validation[:]["input_ids"]
    loss = model(blocks, labels=blocks).loss.item()
    assert summary.eval_loss == pytest.approx(loss, abs=1e-4)


@pytest.mark.parametrize("mlp", ["plain", "gated"])
def test_adapters_stand_beside_all_linear_layers_of_the_blocks(mlp: str) -> None:
    pytest.importorskip("peft")
    model = tiny_model(mlp=mlp, fork_content="attended")
    linear = {name for name, part in model.model.layers.named_modules() if isinstance(part, nn.Linear)}
    add_adapters(model, LoraSection(rank=2))
    adapted = {name for name, part in model.model.layers.named_modules() if hasattr(part, "lora_A")}
    assert adapted == linear
    assert len(linear) == 4 * (5 if mlp == "gated" else 4)
    assert not any(hasattr(part, "lora_A") for part in model.model.gates.modules())
    assert all(parameter.requires_grad for parameter in model.model.gates.parameters())


def test_a_target_that_is_not_there_is_named() -> None:
    pytest.importorskip("peft")
    with pytest.raises(RecipeError, match=r"training\.lora: target q_proj: did you mean qkv_proj\?"):
        add_adapters(tiny_model(), LoraSection(rank=2, targets=["q_proj"]))


def test_the_budget_rises_in_rungs(tmp_path: Path, tiny_data: PreparedData) -> None:
    ramp = settings(steps=32, budget_ramp=0.5)
    rungs = [training_budget(ramp, 3, step) for step in range(1, 33)]
    assert (
        rungs
        == [f"{each}" for each in ("1", "5/4", "3/2", "7/4", "2", "9/4", "5/2", "11/4") for _ in "12"] + [None] * 16
    )
    recipe = tiny_recipe(tmp_path, tiny_data.path, "training.budget_ramp=0.5", "model.budget=2")
    with trained_budgets() as seen:
        summary = train(recipe, progress=False)
    assert seen == ["1", "9/8", "5/4", "3/2", "13/8", "7/4", *["None"] * 6]
    config = ThoughtbubblesForCausalLM.from_pretrained(tmp_path / "run" / "model").config
    flops = [training_flops(config, BLOCK, None if each == "None" else each) for each in seen]
    assert summary.training_flops == 4 * sum(flops)
    (tmp_path / "copy").mkdir()
    overrides = ("training.budget_ramp=0.5", "model.budget=2", "model.routing=copy")
    copy = tiny_recipe(tmp_path / "copy", tiny_data.path, *overrides)
    with pytest.raises(RecipeError, match=r"training\.budget_ramp: .*budget"):
        train(copy, progress=False)


def test_a_run_begins_with_the_moments_of_another(
    tmp_path: Path, tiny_data: PreparedData, capsys: pytest.CaptureFixture[str]
) -> None:
    constant = ("training.schedule=constant", "training.warmup_fraction=0", "training.log_every=1")

    def recipe_of(name: str, source: str | None, *overrides: str) -> Recipe:
        (tmp_path / name).mkdir()
        recipe = tiny_recipe(tmp_path / name, tiny_data.path, *constant, *overrides)
        if source is not None:
            recipe.model = {"pretrained": source}
        return recipe

    train(recipe_of("first", None, "training.steps=6"), progress=False)
    first, found = tmp_path / "first" / "run", {}
    before = load_file(first / "model" / "model.safetensors")["model.norm.weight"]
    carried = f"training.moments_from={first}"
    for name, more in (("with", [carried]), ("without", [])):
        train(recipe_of(name, str(first), "training.steps=1", *more))
        after = load_file(tmp_path / name / "run" / "model" / "model.safetensors")["model.norm.weight"]
        found[name] = (after - before).abs()
    assert capsys.readouterr().err.count(f"{carried}: moments of 47 weights after step 6\n") == 1
    # A first step of Adam goes as far as the rate, whatever the gradient.
    torch.testing.assert_close(found["without"], torch.full_like(before, 1e-2), rtol=1e-2, atol=1e-5)
    assert (found["with"] - 1e-2).abs().max() > 1e-3
    other = recipe_of("other", None, carried, "model.hidden_size=8", "model.intermediate_size=8")
    with pytest.raises(RecipeError, match=r"^training\.moments_from=.*: no weight of it has the name and the shape"):
        train(other, progress=False)
    nowhere = recipe_of("nowhere", None, f"training.moments_from={tmp_path / 'absent'}")
    with pytest.raises(RecipeError, match=r"^training\.moments_from=.*absent: expected the folder of a run"):
        train(nowhere, progress=False)
    assert not (tmp_path / "other" / "run").exists()


def test_rows_have_the_share_of_the_peak_and_bits_per_byte(tmp_path: Path, tiny_data: PreparedData) -> None:
    train(tiny_recipe(tmp_path, tiny_data.path, "training.peak_flops=1e9"), progress=False)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    each = rows[0]["flops"] / rows[0]["tokens"]
    for row in rows:
        if "loss" in row:
            assert row["mfu"] == pytest.approx(row["tokens_per_second"] * each / 1e9)
    split = tiny_data.manifest.validation
    bits = rows[-1]["eval_loss"] * split.tokens / split.bytes / math.log(2)
    assert rows[-1]["eval_bits_per_byte"] == pytest.approx(bits)
