"""Plans: what the parts cost comes from accounting, what a run costs is what a run then measures."""

import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.run_fixtures import BLOCK, tiny_recipe
from thoughtbubbles import ThoughtbubblesConfig
from thoughtbubbles.data import PreparedData
from thoughtbubbles.data.feed.loading import load_run_data
from thoughtbubbles.model.accounting import SHARDINGS, cache_bytes, count_parameters, layer_widths, training_flops
from thoughtbubbles.planning.plan import Plan, make_plan, parse_bytes
from thoughtbubbles.planning.table import closing_lines, costs_table, title
from thoughtbubbles.support.errors import InputError
from thoughtbubbles.training.folder import RunSummary
from thoughtbubbles.training.meter import Meter


def text_of(plan: Plan) -> str:
    console = Console(file=io.StringIO(), width=1000)
    console.print(title(plan), costs_table(plan), *closing_lines(plan), sep="\n")
    output = console.file
    assert isinstance(output, io.StringIO)
    return output.getvalue()


@pytest.mark.parametrize("length", [None, 100, 4096])
def test_a_preset(length: int | None) -> None:
    plan, config = make_plan("150m", length=length), ThoughtbubblesConfig.preset("150m")
    assert plan.length == (length or 1024)
    assert plan.model.parameters.total == count_parameters(config)
    assert plan.model.streams_per_token == [width / plan.length for width in layer_widths(config, plan.length)]
    assert plan.model.training_flops == training_flops(config, plan.length) / plan.length
    assert plan.model.cache_bytes == cache_bytes(config, plan.length, precision="bfloat16") / plan.length
    assert plan.dense.streams_per_token == [1.0] * 16
    assert plan.model.parameters.gates > plan.dense.parameters.gates == 0
    assert (plan.run, plan.fit, plan.model.tokens_per_second) == (None, None, None)


def test_the_memory_adds_up() -> None:
    memory = make_plan("mini").model.memory
    parts = (memory.weights, memory.gradients, memory.optimizer, memory.casts, memory.loss, memory.activations)
    assert memory.total == sum(parts)
    assert min(parts) > 0
    assert memory.exchange == 0
    assert make_plan("mini", precision="float32").model.memory.casts == 0


@pytest.mark.parametrize("budget", [1, "3/2", 4.0])
def test_a_budget(budget: Any) -> None:
    plan = make_plan("mini", budget=budget)
    assert plan.model.training_flops == training_flops(ThoughtbubblesConfig.preset("mini"), 1024, budget) / 1024
    assert plan.budget in ("1", "3/2", "4")


def test_a_finished_run_cost_what_was_planned(tiny_run: Path, tiny_data: PreparedData, tmp_path: Path) -> None:
    tiny_recipe(tmp_path, tiny_data.path)
    plan, summary = make_plan(str(tmp_path / "recipe.yaml")), RunSummary.read(tiny_run)
    assert plan.run is not None
    assert (plan.run.steps, plan.run.tokens, plan.run.flops) == (12, summary.tokens, summary.training_flops)
    assert plan.model.parameters.total == summary.parameters
    assert (plan.batch_size, plan.micro_batch_size, plan.length) == (4, 4, BLOCK)


def test_a_model_is_planned_like_its_recipe(tiny_run: Path, tiny_data: PreparedData, tmp_path: Path) -> None:
    tiny_recipe(tmp_path, tiny_data.path)
    recipe = make_plan(str(tmp_path / "recipe.yaml"), batch_size=16)
    for folder in (tiny_run, tiny_run / "model"):
        plan = make_plan(str(folder))
        assert plan.run is None
        assert replace(plan, name=recipe.name, run=recipe.run, notes=recipe.notes) == recipe


def test_drawn_budgets_cost_what_the_meter_counts(tiny_data: PreparedData, tmp_path: Path) -> None:
    overrides = ["training.training_budgets=[1, 1.5, 3]", "training.micro_batch_size=2", "training.precision=float32"]
    recipe = tiny_recipe(tmp_path, tiny_data.path, *overrides)
    (tmp_path / "drawn.yaml").write_text(recipe.to_yaml())
    plan = make_plan(str(tmp_path / "drawn.yaml"))
    config = ThoughtbubblesConfig(**{**recipe.model, "vocab_size": tiny_data.manifest.vocab_size})
    meter = Meter(recipe, config, load_run_data(recipe).samples, micro_batch_size=2)
    assert plan.run is not None
    assert plan.run.flops == meter.flops(12)
    assert plan.micro_batch_size == 2
    assert "Steps draw their budget from 1, 1.5, 3" in text_of(plan)
    assert plan.model.memory == make_plan(str(tmp_path / "drawn.yaml"), budget=3).model.memory
    fixed = make_plan(str(tmp_path / "drawn.yaml"), budget=1)
    assert fixed.run is not None
    assert fixed.run.flops == 12 * 4 * training_flops(config, BLOCK, 1)


def test_a_rising_budget_costs_what_the_meter_counts(tiny_data: PreparedData, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, tiny_data.path, "training.budget_ramp=0.5", "training.steps=32", "model.budget=2")
    (tmp_path / "rising.yaml").write_text(recipe.to_yaml())
    plan = make_plan(str(tmp_path / "rising.yaml"))
    config = ThoughtbubblesConfig(**{**recipe.model, "vocab_size": tiny_data.manifest.vocab_size})
    meter = Meter(recipe, config, load_run_data(recipe).samples, micro_batch_size=4)
    assert plan.run is not None
    assert plan.run.flops == meter.flops(32) < 32 * 4 * training_flops(config, BLOCK)


def test_data_that_is_not_there_is_said(tmp_path: Path) -> None:
    tiny_recipe(tmp_path, tmp_path / "nowhere")
    plan = make_plan(str(tmp_path / "recipe.yaml"))
    assert plan.length == 1024
    assert "nowhere is not prepared yet: rows are the model's longest and its vocabulary" in text_of(plan)


def test_a_mixture(tmp_path: Path, tiny_data: PreparedData, other_data: PreparedData) -> None:
    text = f"data: {{mixture: {{{tiny_data.path}: 1, {other_data.path}: 2}}}}\n"
    text += "model: {preset: nano}\ntraining: {output: o, steps: 3}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    plan = make_plan(str(tmp_path / "recipe.yaml"))
    assert (plan.length, plan.config["vocab_size"]) == (BLOCK, tiny_data.manifest.vocab_size)


def test_fine_tuning_is_planned_for_the_longest_rows(tmp_path: Path, tiny_run: Path) -> None:
    text = f"task: sft\nmodel: {{pretrained: {tiny_run}}}\ndata: {{source: rows.jsonl, max_length: 12}}\n"
    (tmp_path / "sft.yaml").write_text(text + "training: {output: o, steps: 5, batch_size: 8}\n")
    plan = make_plan(str(tmp_path / "sft.yaml"))
    assert plan.run is not None
    assert plan.run.tokens == 5 * 8 * 12
    assert "Every row is taken for as long as the longest" in text_of(plan)


def test_tokens_become_whole_steps() -> None:
    plan = make_plan("nano", length=100, batch_size=10, tokens=2500.0)
    assert plan.run is not None
    assert (plan.run.steps, plan.run.tokens) == (3, 3000)
    dense = training_flops(ThoughtbubblesConfig.preset("nano", routing="none"), 100)
    assert plan.run.dense_tokens == plan.run.flops * 100 // dense


def test_a_device_gives_times() -> None:
    plan = make_plan("150m", tokens=1e9, device_flops=1e15)
    half = make_plan("150m", tokens=1e9, device_flops=1e15, mfu=0.2)
    assert plan.run is not None
    assert half.run is not None
    assert plan.run.seconds == pytest.approx(plan.run.flops / 0.4e15)
    assert half.run.seconds == pytest.approx(2 * plan.run.seconds)
    assert plan.model.tokens_per_second == pytest.approx(plan.run.tokens / plan.run.seconds)
    assert "minutes" in text_of(plan)


def test_the_largest_micro_batch_fits_and_the_next_does_not() -> None:
    plan = make_plan("1.9b", memory="80GB", batch_size=12)
    assert plan.fit is not None
    assert not plan.fit.fits
    fitting = plan.fit.micro_batch_size
    assert fitting in (1, 2, 3, 4, 6)
    following = next(rows for rows in (2, 3, 4, 6, 12) if rows > fitting)
    totals = [make_plan("1.9b", batch_size=rows).model.memory.total for rows in (fitting, following)]
    assert totals[0] <= plan.fit.usable < totals[1]
    assert plan.fit.checkpointed_micro_batch_size > fitting
    assert f"that fits: {fitting} rows" in text_of(plan)


def test_several_gpus_share_the_batch_and_add_their_speed() -> None:
    one, eight = (make_plan("150m", tokens=1e9, batch_size=64, device_flops=1e15, gpus=gpus) for gpus in (1, 8))
    assert (one.sharding, eight.sharding) == (None, "ddp")
    assert (one.micro_batch_size, eight.batch_size, eight.micro_batch_size) == (64, 64, 8)
    assert one.run is not None
    assert eight.run is not None
    assert one.run.seconds is not None
    assert (eight.run.steps, eight.run.flops) == (one.run.steps, one.run.flops)
    assert eight.run.seconds == pytest.approx(one.run.seconds / 8)
    assert eight.model.tokens_per_second == pytest.approx(8 * (one.model.tokens_per_second or 0))
    assert make_plan("150m", gpus=8).batch_size == 128
    assert "8 GPUs, DDP" in text_of(eight)
    assert "on 8 GPUs." in text_of(eight)
    assert "GPU" not in text_of(one)


def test_each_gpu_of_fsdp_holds_its_share() -> None:
    ddp, fsdp = (make_plan("772m", batch_size=64, gpus=8, sharding=sharding).model.memory for sharding in SHARDINGS)
    assert fsdp.weights == pytest.approx(ddp.weights / 8, rel=1e-6)
    assert fsdp.optimizer == pytest.approx(ddp.optimizer / 8, rel=1e-6)
    assert (fsdp.activations, fsdp.passing) == (ddp.activations, ddp.passing)
    assert ddp.exchange == ddp.gradients > fsdp.exchange > 0
    parts = (fsdp.weights, fsdp.gradients, fsdp.optimizer, fsdp.casts, fsdp.loss, fsdp.exchange, fsdp.activations)
    assert fsdp.total == sum(parts)


def test_the_largest_micro_batch_divides_the_share_of_a_gpu() -> None:
    plans = [make_plan("1.9b", length=512, batch_size=480, memory="80GB", gpus=8, sharding=each) for each in SHARDINGS]
    ddp, fsdp = (plan.fit for plan in plans)
    assert ddp is not None
    assert fsdp is not None
    assert 60 % (ddp.micro_batch_size or 7) == 60 % (fsdp.micro_batch_size or 7) == 0
    assert (fsdp.micro_batch_size or 0) > (ddp.micro_batch_size or 0)
    shown = text_of(plans[1])
    assert "a batch of 480 rows, 60 rows a GPU, that fits" in shown
    assert "Memory of training on each GPU" in shown
    assert "buffers of the exchange" in shown


def test_a_recipe_on_several_gpus(tmp_path: Path, tiny_data: PreparedData) -> None:
    tiny_recipe(tmp_path, tiny_data.path)
    plan = make_plan(str(tmp_path / "recipe.yaml"), gpus=2)
    assert (plan.batch_size, plan.micro_batch_size) == (4, 2)
    assert plan.sharding == "ddp"
    with pytest.raises(InputError, match=r"training\.batch_size=4: expected a multiple of the number of processes, 3"):
        make_plan(str(tmp_path / "recipe.yaml"), gpus=3)


def test_a_recipe_that_divides_the_model(tmp_path: Path, tiny_data: PreparedData) -> None:
    path = tmp_path / "divided.yaml"
    tiny_recipe(tmp_path, tiny_data.path)
    path.write_text("extends: recipe.yaml\ntraining: {sharding: fsdp}\n")
    assert make_plan(str(path), gpus=2).sharding == "fsdp"
    assert make_plan(str(path), gpus=2, sharding="ddp").sharding == "ddp"
    assert make_plan(str(path)).sharding is None


COMPARISON = """
output: o
model: {preset: nano, budget: 2}
data: {path: nowhere}
training: {steps: 10, batch_size: 4}
variants:
  dense:
  causal-4: {like: causal, model: {budget: 4}}
  causal-half:
  causal:
  causal-elastic:
  dense-flops:
"""


@pytest.fixture
def comparison(tmp_path: Path) -> str:
    (tmp_path / "compare.yaml").write_text(COMPARISON)
    return str(tmp_path / "compare.yaml")


@pytest.mark.parametrize(
    ("variant", "budget", "steps"), [("causal-4", "4", 10), ("causal-half", "2", 5), ("causal-elastic", "2", 10)]
)
def test_a_variant_of_a_comparison(comparison: str, variant: str, budget: str, steps: int) -> None:
    plan = make_plan(comparison, variant=variant)
    assert plan.run is not None
    assert (plan.budget, plan.run.steps, plan.batch_size) == (budget, steps, 4)
    assert f"compare.yaml, {variant}: 6 layers" in text_of(plan)
    assert ("Steps draw their budget from 1, 1.5, 2" in text_of(plan)) == (variant == "causal-elastic")


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        (None, "variant=None: expected one of those of the comparison"),
        ("causl", "compare.yaml: dense, causal-4, causal-half"),
        ("dense-flops", "variant='dense-flops': expected one that doesn't follow from the FLOPs of "),
    ],
)
def test_a_variant_that_cannot_be_planned(comparison: str, variant: str | None, message: str) -> None:
    with pytest.raises(InputError) as error:
        make_plan(comparison, variant=variant)
    assert message in str(error.value)


def test_a_run_has_no_variants(tmp_path: Path) -> None:
    tiny_recipe(tmp_path, tmp_path / "nowhere")
    for name in ("nano", str(tmp_path / "recipe.yaml")):
        with pytest.raises(InputError, match="variant='dense': expected the recipe of a comparison with it"):
            make_plan(name, variant="dense")


@pytest.mark.parametrize(("memory", "says"), [("1GB", "not even one row"), ("10TB", "16 rows fits")])
def test_a_device_too_small_and_one_large_enough(memory: str, says: str) -> None:
    assert says in text_of(make_plan("150m", memory=memory))


def test_gradient_checkpointing_of_a_recipe_counts(tmp_path: Path, tiny_data: PreparedData) -> None:
    recipe = tiny_recipe(tmp_path, tiny_data.path, "training.gradient_checkpointing=true")
    (tmp_path / "checkpointing.yaml").write_text(recipe.to_yaml())
    plain, checkpointing = (make_plan(str(tmp_path / f"{name}.yaml")) for name in ("recipe", "checkpointing"))
    assert checkpointing.model.memory.total < plain.model.memory.total
    assert "gradient checkpointing" in text_of(checkpointing)


def test_a_dense_model_stands_alone(tmp_path: Path) -> None:
    tiny_recipe(tmp_path, tmp_path / "nowhere")
    text = (tmp_path / "recipe.yaml").read_text().replace("budget: 1.5", "routing: none")
    (tmp_path / "dense.yaml").write_text(text)
    plan = make_plan(str(tmp_path / "dense.yaml"))
    assert plan.model == plan.dense
    shown = text_of(plan)
    assert "this model" not in shown
    assert "dense;" in shown
    assert "for the same FLOPs" not in shown


def test_the_table_names_layers_and_units() -> None:
    lines = [" ".join(line.split()) for line in text_of(make_plan("150m", tokens=1e9)).splitlines()]
    assert "layers 0 to 2 1.00 1.00 1.00" in lines
    assert "layers 3 to 15 2.00 1.00 2.00" in lines
    assert "all 152M 152M 1.00" in lines
    assert any(line.startswith("weights (float32) 608 MB 608 MB") for line in lines)
    assert any(line.startswith("Run: 61,036 steps of 16 rows, 1,000,013,824 tokens") for line in lines)


@pytest.mark.parametrize(
    ("text", "expected"), [("80GB", 80e9), ("24 GiB", 24 * 2**30), ("1.5tb", 1.5e12), ("512MiB", 2**29), ("7B", 7)]
)
def test_bytes_are_read(text: str, expected: float) -> None:
    assert parse_bytes(text) == expected


BAD_OPTIONS: list[tuple[str, dict[str, Any], str]] = [
    ("155m", {}, "config '155m': expected a preset (nano, micro"),
    ("org/model", {}, "or the folder of a model"),
    ("none.yaml", {}, "none.yaml: no such file"),
    (str(Path(__file__).parent), {}, "expected a folder with config.json"),
    ("nano", {"length": 0}, "length=0: expected more than 0"),
    ("nano", {"length": 10**400}, "expected more than 0 and at most 16,777,216"),
    ("nano", {"batch_size": 10**30, "memory": "1KB"}, "expected more than 0 and at most 1,048,576"),
    ("nano", {"gpus": 10**5000}, "gpus=a number of thousands of digits: expected more than 0"),
    ("nano", {"tokens": math.nan}, "tokens=nan: expected more than 0"),
    ("nano", {"device_flops": 1e300}, "device_flops=1e+300: expected more than 0 and at most 1e+30"),
    ("nano", {"memory": f"{'9' * 400}GB"}, "expected an amount such as 80GB or 24GiB"),
    ("nano", {"budget": "1e30000000"}, "budget='1e30000000': expected a number of streams per token"),
    ("nano", {"batch_size": -1}, "batch_size=-1: expected more than 0"),
    ("nano", {"tokens": float("inf")}, "tokens=inf: expected"),
    ("nano", {"budget": "0.5"}, "budget='0.5': expected"),
    ("nano", {"precision": "float16"}, "precision='float16': expected one of float32, bfloat16"),
    ("nano", {"device_flops": 0.0}, "device_flops=0.0: expected more than 0"),
    ("nano", {"device_flops": 1e12, "mfu": 1.5}, "mfu=1.5: expected a share"),
    ("nano", {"mfu": 0.5}, "expected device_flops with it"),
    ("nano", {"gpus": 0}, "gpus=0: expected more than 0"),
    ("nano", {"gpus": 3, "batch_size": 16}, "batch_size=16: expected a multiple of gpus=3"),
    ("nano", {"gpus": 2, "sharding": "zero"}, "sharding='zero': expected one of ddp, fsdp"),
    ("nano", {"sharding": "fsdp"}, "sharding='fsdp': expected gpus of at least 2 with it"),
    ("nano", {"memory": "80"}, "memory='80': expected an amount such as 80GB"),
    ("nano", {"memory": "0GB"}, "memory='0GB'"),
    ("nano", {"memory": "3XB"}, "memory='3XB'"),
]


@pytest.mark.parametrize(("name", "options", "message"), BAD_OPTIONS)
def test_bad_input(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        make_plan(name, **options)
    assert message in str(error.value)


def test_a_row_longer_than_a_trained_model_reads(tiny_run: Path) -> None:
    with pytest.raises(InputError, match=f"length=17: expected at most {BLOCK}"):
        make_plan(str(tiny_run), length=17)


def test_a_batch_that_micro_batches_cannot_share(tmp_path: Path, tiny_data: PreparedData) -> None:
    (tmp_path / "micro.yaml").write_text(tiny_recipe(tmp_path, tiny_data.path, "training.micro_batch_size=2").to_yaml())
    with pytest.raises(InputError, match=r"training\.micro_batch_size=2: expected a divisor of 7"):
        make_plan(str(tmp_path / "micro.yaml"), batch_size=7)


def test_very_many_steps_are_planned_at_once(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    budgets = "training: {output: o, steps: 2147483647, batch_size: 4, training_budgets: [1, 2]}\n"
    recipe.write_text("model: {preset: nano}\ndata: {path: nowhere}\n" + budgets)
    plan = make_plan(str(recipe))
    config = ThoughtbubblesConfig.preset("nano")
    assert plan.run is not None
    each = [training_flops(config, plan.length, budget) for budget in (1, 2)]
    assert plan.run.flops == pytest.approx(4 * 2147483647 * sum(each) / 2, rel=1e-2)


def test_tokens_of_very_many_steps_are_counted_at_once(tmp_path: Path, tiny_data: PreparedData) -> None:
    recipe = tiny_recipe(tmp_path, tiny_data.path, "training.steps=2147483647")
    meter = Meter(recipe, ThoughtbubblesConfig.preset("nano"), load_run_data(recipe).samples, 2)
    assert meter.tokens(2147483647) == 2147483647 * 4 * BLOCK
    assert (meter.tokens(3), meter.tokens(5)) == (3 * 4 * BLOCK, 5 * 4 * BLOCK)
    assert meter.flops(5) == 20 * training_flops(ThoughtbubblesConfig.preset("nano"), BLOCK)
