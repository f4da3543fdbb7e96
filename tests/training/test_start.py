"""How a run starts: what it leaves when it cannot, what it goes on from, and what it computes in."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from tests.run_fixtures import tiny_recipe
from tests.training.test_run import Kill, comparable, train_with
from thoughtbubbles import ThoughtbubblesConfig, ThoughtbubblesForCausalLM
from thoughtbubbles.data import PreparedData
from thoughtbubbles.data.feed.loading import load_run_data
from thoughtbubbles.planning.plan import make_plan
from thoughtbubbles.recipes.training import Recipe, RecipeError
from thoughtbubbles.support import machine as machine_module
from thoughtbubbles.support.errors import InputError, RunError
from thoughtbubbles.support.machine import choose_precision, has_bfloat16
from thoughtbubbles.support.metrics import read_metrics
from thoughtbubbles.training import checkpoints, memory
from thoughtbubbles.training import run as run_module
from thoughtbubbles.training.checkpoints import sealed
from thoughtbubbles.training.configuration import build_config
from thoughtbubbles.training.folder import read_facts
from thoughtbubbles.training.run import build_model, decide_precision, train

RECIPES = Path(__file__).parents[2] / "recipes"
HIDDEN = ("model.hidden_size=100000000", "model.num_attention_heads=50000000")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def raising(error: BaseException, after: int = 0) -> Callable[..., object]:
    """`ThoughtbubblesForCausalLM.forward`, which fails after so many calls."""
    forward, calls = ThoughtbubblesForCausalLM.forward, []

    def fail(self: ThoughtbubblesForCausalLM, *args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) > after:
            raise error
        return forward(self, *args, **kwargs)

    return fail


OUT_OF_MEMORY = {
    "GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "CPU": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4e16 bytes."),
    "Python": MemoryError(),
}


@pytest.mark.parametrize("error", OUT_OF_MEMORY.values(), ids=OUT_OF_MEMORY)
def test_memory_that_runs_out_at_the_start_leaves_nothing(
    tmp_path: Path, tiny_data: PreparedData, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    recipe = tiny_recipe(tmp_path, tiny_data.path, f"training.output={tmp_path}/deep/down/run")
    with monkeypatch.context() as patch:
        patch.setattr(ThoughtbubblesForCausalLM, "forward", raising(error))
        patch.setattr(memory, "device_memory", lambda _: 1_200_000.0)
        with pytest.raises(
            RecipeError, match=r"training\.micro_batch_size=4 takes .*; at most 1 fits, 2 with"
        ) as caught:
            train(recipe, progress=False)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == {"recipe.yaml"}
    train(tiny_recipe(tmp_path, tiny_data.path, "training.micro_batch_size=2", "training.steps=1"), progress=False)


def test_the_micro_batch_that_fits_is_the_plans(tmp_path: Path, tiny_data: PreparedData) -> None:
    recipe = tiny_recipe(tmp_path, tiny_data.path)
    data = load_run_data(recipe)
    config = build_config(recipe, data)
    device = torch.device("cuda")
    ours = memory.TrainingMemory(recipe, config, data.longest, "float32", 1, device)
    found = []
    for there in (300_000, 700_000, 1_100_000, 1_500_000, 3_000_000):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(memory, "device_memory", lambda _, there=there: there)
            found.append((ours._largest(False), ours._largest(True)))
            plan = make_plan(str(tmp_path / "recipe.yaml"), precision="float32", memory=f"{there}B").fit
            assert plan is not None
            assert found[-1] == (plan.micro_batch_size, plan.checkpointed_micro_batch_size)
    assert found[0] == (None, None)
    assert found[-1] == (4, 4)


def test_memory_that_should_do_is_no_fault_of_the_recipe(
    tmp_path: Path, tiny_data: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ThoughtbubblesForCausalLM, "forward", raising(OUT_OF_MEMORY["GPU"]))
    with pytest.raises(RunError, match="which should fit: does another process hold memory"):
        train(tiny_recipe(tmp_path, tiny_data.path), progress=False)
    assert names(tmp_path) == {"recipe.yaml"}


def test_a_run_out_of_memory_goes_on_with_smaller_micro_batches(
    tmp_path: Path, tiny_run: Path, tiny_data: PreparedData, monkeypatch: pytest.MonkeyPatch, float64: None
) -> None:
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    budget = "model.budget=1"  # nothing is chosen, and so no rounding can choose otherwise
    train(tiny_recipe(tmp_path / "whole", tiny_data.path, budget), progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(ThoughtbubblesForCausalLM, "forward", raising(OUT_OF_MEMORY["GPU"], after=16))
        with pytest.raises(RunError):
            train(tiny_recipe(tmp_path / "stopped", tiny_data.path, budget), progress=False)
    assert sealed(tmp_path / "stopped" / "run" / "checkpoints")
    less = ("training.micro_batch_size=2", "training.gradient_checkpointing=true")
    train(tiny_recipe(tmp_path / "stopped", tiny_data.path, budget, *less), progress=False)
    for ours, whole in zip(*(comparable(tmp_path / name / "run") for name in ("stopped", "whole")), strict=True):
        assert ours == pytest.approx(whole, rel=1e-8)


@pytest.mark.parametrize(
    "overrides",
    [HIDDEN, ("model.num_hidden_layers=1000000000", "model.fork_layers=[1]"), ("model.vocab_size=1000000000000",)],
    ids=["wide", "deep", "many words"],
)
def test_a_model_that_no_memory_holds_is_refused_before_it_is_made(
    tmp_path: Path, tiny_data: PreparedData, overrides: tuple[str, ...]
) -> None:
    with pytest.raises(RecipeError, match=r"model\.hidden_size=\d+, .* parameters, whose weights take .* GB") as caught:
        train(tiny_recipe(tmp_path, tiny_data.path, *overrides), progress=False)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == {"recipe.yaml"}
    train(tiny_recipe(tmp_path, tiny_data.path, "training.steps=1"), progress=False)


def test_a_model_whose_moments_do_not_fit_the_device_is_refused(
    tmp_path: Path, tiny_data: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = sum(each.numel() for each in build_model(*_recipe_and_config(tmp_path, tiny_data)).parameters())
    monkeypatch.setattr(memory, "device_memory", lambda _: 16 * parameters - 1)
    with pytest.raises(RecipeError, match="whose weights, gradients and moments take"):
        train(tiny_recipe(tmp_path, tiny_data.path), progress=False)
    assert names(tmp_path) == {"recipe.yaml"}


def _recipe_and_config(folder: Path, data: PreparedData) -> tuple[Recipe, ThoughtbubblesConfig]:
    recipe = tiny_recipe(folder, data.path)
    return recipe, build_config(recipe, load_run_data(recipe))


def test_a_failure_in_the_folder_of_a_person_leaves_it_as_it_was(
    tmp_path: Path, tiny_data: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(ThoughtbubblesForCausalLM, "forward", raising(ValueError("some other fault")))
    with pytest.raises(ValueError, match="some other fault"):
        train(tiny_recipe(tmp_path, tiny_data.path), progress=False)
    assert names(tmp_path / "run") == set()


def test_a_run_that_was_killed_before_its_first_step_is_begun_anew(
    tmp_path: Path, tiny_run: Path, tiny_data: PreparedData
) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    for name in (".lock", ".recipe.yaml.partial"):
        (run / name).touch()
    shutil.copyfile(tiny_run / "run.json", run / "run.json")
    train(tiny_recipe(tmp_path, tiny_data.path, "training.steps=1"), progress=False)
    assert (run / "summary.json").exists()


@pytest.mark.parametrize("name", ["run.json", "checkpoints/mine", "tensorboard/events", "notes"])
def test_a_folder_that_holds_anything_else_is_refused(tmp_path: Path, tiny_data: PreparedData, name: str) -> None:
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_text('{"mine": 1}')
    with pytest.raises(RecipeError, match="expected an empty or new folder"):
        train(tiny_recipe(tmp_path, tiny_data.path), progress=False)
    assert path.read_text() == '{"mine": 1}'


@pytest.mark.parametrize("output", ["{folder}/file", "{folder}/file/below/it", "/proc/x", "/proc/x/y"])
def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path, tiny_data: PreparedData, output: str) -> None:
    (tmp_path / "file").write_text("mine")
    output = output.format(folder=tmp_path)
    with pytest.raises(RecipeError, match=rf"^training\.output={output}: .*expected a folder") as caught:
        train(tiny_recipe(tmp_path, tiny_data.path, f"training.output={output}"), progress=False)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "mine"
    assert names(tmp_path) == {"file", "recipe.yaml"}


@pytest.mark.parametrize(
    "content", ["", "{", '{"data": 3}', "[]", "[" * 100_000, None], ids=lambda text: str(text)[:12]
)
@pytest.mark.parametrize("name", ["run.json", "summary.json"])
def test_a_record_that_is_damaged_is_named(
    tmp_path: Path, tiny_run: Path, tiny_data: PreparedData, name: str, content: str | None
) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    (run / name).unlink()
    if content is not None:
        (run / name).write_text(content)
    if content is None and name == "summary.json":
        return  # then the run is not finished
    with pytest.raises(InputError, match=rf"run/{name} is damaged: ") as caught:
        train(tiny_recipe(tmp_path, tiny_data.path), progress=False)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_stored_recipe_that_is_damaged_is_named(tmp_path: Path, tiny_run: Path, tiny_data: PreparedData) -> None:
    stored = Path(shutil.copytree(tiny_run, tmp_path / "run")) / "recipe.yaml"
    text = stored.read_text()
    for damaged in ("", text[: len(text) // 2], "[" * 50_000):
        stored.write_text(damaged)
        with pytest.raises(InputError, match=r"recipe") as caught:
            train(tiny_recipe(tmp_path, tiny_data.path), progress=False)
        assert "\n" not in str(caught.value)


def test_a_run_goes_on_whatever_its_metrics_hold(
    tmp_path: Path, tiny_run: Path, tiny_data: PreparedData, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe(tmp_path, tiny_data.path)
    with pytest.raises(KeyboardInterrupt):
        train_with(recipe, Kill(at=7))
    path = tmp_path / "run" / "metrics.jsonl"
    first, second, third, *others = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(
        first + b'{"step": 2, "lo\n' + second + bytes(30) + b"\n" + second + third + b"".join(others) + b'{"s'
    )
    train(recipe, progress=False)
    said = capsys.readouterr().err
    assert f"{path}: dropped line 2, 4, 5, 8: expected rows of numbers, of each step one" in said
    assert comparable(tmp_path / "run") == comparable(tiny_run)


def test_rows_are_on_the_disk_before_the_checkpoint_that_follows_them(
    tmp_path: Path, tiny_data: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    synced: list[int] = [0]
    at_seals: list[tuple[int, int, int]] = []
    sync, seal = os.fsync, checkpoints.seal

    def note_sync(descriptor: int) -> None:
        sync(descriptor)
        if path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino:
            synced.append(path.stat().st_size)

    def note_seal(folder: Path, step: int, eval_loss: float | None) -> None:
        at_seals.append((step, synced[-1], path.stat().st_size))
        seal(folder, step, eval_loss)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr("thoughtbubbles.training.loop.seal", note_seal)
    train(tiny_recipe(tmp_path, tiny_data.path), progress=False)
    assert [step for step, _, _ in at_seals] == [4, 8, 12]
    assert all(on_disk == written > 0 for _, on_disk, written in at_seals)
    assert len(read_metrics(path)) == len(synced) - 1


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: str(path.relative_to(RECIPES)))
def test_shipped_recipes_leave_the_precision_to_the_machine(path: Path) -> None:
    sections = yaml.safe_load(path.read_text())
    trainings = [sections.get("training"), *(each.get("training") for each in _variants(sections))]
    assert {(each or {}).get("precision", "auto") for each in trainings} == {"auto"}


def _variants(sections: dict[str, object]) -> list[dict[str, dict[str, str]]]:
    variants = sections.get("variants")
    return [each for each in variants.values() if each] if isinstance(variants, dict) else []


CAPABILITIES = {
    "avx2": ({"avx2": True}, "AVX2", {}, False),
    "avx512 without bfloat16": ({"avx512_f": True}, "AVX512", {}, False),
    "avx512_bf16": ({"avx512_bf16": True}, "AVX512", {}, True),
    "amx": ({"amx_bf16": True}, "AVX512", {}, True),
    "torch held back": ({"avx512_bf16": True, "amx_bf16": True}, "AVX2", {}, False),
    "torch held back to nothing": ({"avx512_bf16": True}, "DEFAULT", {}, False),
    "oneDNN held back": ({"avx512_bf16": True}, "AVX512", {"ONEDNN_MAX_CPU_ISA": "avx2"}, False),
    "oneDNN held back a little": ({"amx_bf16": True}, "AVX512", {"DNNL_MAX_CPU_ISA": "AVX512_CORE_VNNI"}, False),
    "oneDNN free": ({"amx_bf16": True}, "AVX512", {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"}, True),
    "arm": ({"bf16": True, "neon": True}, "SVE256", {}, True),
    "arm without bfloat16": ({"bf16": False, "neon": True}, "DEFAULT", {}, False),
}


@pytest.mark.parametrize(("found", "capability", "variables", "expected"), CAPABILITIES.values(), ids=CAPABILITIES)
def test_bfloat16_is_for_processors_with_units_for_it(
    monkeypatch: pytest.MonkeyPatch, found: dict[str, bool], capability: str, variables: dict[str, str], expected: bool
) -> None:
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert has_bfloat16("cpu") == expected
    assert choose_precision("auto", "cpu") == ("bfloat16" if expected else "float32")
    assert [choose_precision(asked, "cpu") for asked in ("float32", "bfloat16")] == ["float32", "bfloat16"]


@pytest.mark.parametrize("fast", [True, False])
def test_a_gpu_is_asked_for_bfloat16_without_emulation(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: fast or including_emulation)
    assert has_bfloat16("cuda") == fast


def machine_with(patch: pytest.MonkeyPatch, bfloat16: bool) -> None:
    for module in (machine_module, run_module):
        patch.setattr(module, "has_bfloat16", lambda _device: bfloat16)


@pytest.mark.parametrize(("first", "then"), [(True, False), (False, True)])
def test_a_run_goes_on_in_the_precision_that_it_began_in(
    tmp_path: Path,
    tiny_data: PreparedData,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    first: bool,
    then: bool,
) -> None:
    recipe, decided = tiny_recipe(tmp_path, tiny_data.path), "bfloat16" if first else "float32"
    machine_with(monkeypatch, first)
    with pytest.raises(KeyboardInterrupt):
        train_with(recipe, Kill(at=5))
    assert "many times slower" not in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "run.json").read_text())["precision"] == decided
    assert "precision: auto" in (tmp_path / "run" / "recipe.yaml").read_text()
    machine_with(monkeypatch, then)
    assert decide_precision(recipe, tmp_path / "run") == decided
    assert decide_precision(recipe, tmp_path / "elsewhere") == ("bfloat16" if then else "float32")
    train(recipe, progress=False)
    said = capsys.readouterr().err
    assert (f"many times slower than float32 on this cpu: {tmp_path / 'run'} began in it" in said) == first
    assert read_facts(tmp_path / "run")["precision"] == decided
    # What it came to may also be said by name.
    train(tiny_recipe(tmp_path, tiny_data.path, f"training.precision={decided}"), progress=False)
    other = "float32" if first else "bfloat16"
    with pytest.raises(RecipeError, match=rf"training\.precision: {decided} is now {other}"):
        train(tiny_recipe(tmp_path, tiny_data.path, f"training.precision={other}"), progress=False)


def test_asking_for_the_slow_one_warns(
    tmp_path: Path, tiny_data: PreparedData, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine_with(monkeypatch, False)
    train(tiny_recipe(tmp_path, tiny_data.path, "training.precision=bfloat16", "training.steps=1"), progress=False)
    said = capsys.readouterr().err
    assert "training.precision=bfloat16 is many times slower than float32 on this cpu: the recipe asks for it" in said
