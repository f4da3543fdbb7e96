import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from tests.run_fixtures import BLOCK, tiny_recipe
from thoughtbubbles import ThoughtbubblesForCausalLM
from thoughtbubbles.accounting import training_flops
from thoughtbubbles.data import PreparedData
from thoughtbubbles.evaluation.perplexity import evaluate_perplexity
from thoughtbubbles.training import run as run_module
from thoughtbubbles.training.callbacks import read_metrics
from thoughtbubbles.training.recipe import RecipeError
from thoughtbubbles.training.run import RunSummary, collate_blocks, train


def test_a_run_leaves_what_it_promises(tiny_run: Path) -> None:
    assert {path.name for path in tiny_run.iterdir()} == {
        "recipe.yaml",
        "metrics.jsonl",
        "checkpoints",
        "model",
        "summary.json",
    }
    assert {path.name for path in (tiny_run / "model").iterdir()} >= {"model.safetensors", "tokenizer.json"}


def test_metrics_count_steps_tokens_and_flops(tiny_run: Path) -> None:
    rows = read_metrics(tiny_run / "metrics.jsonl")
    model = ThoughtbubblesForCausalLM.from_pretrained(tiny_run / "model")
    assert [row["step"] for row in rows if "loss" in row] == [2, 4, 6, 8, 10, 12]
    assert [row["step"] for row in rows if "eval_loss" in row] == [4, 8, 12]
    for row in rows:
        assert row["tokens"] == row["step"] * 4 * BLOCK
        assert row["flops"] == row["step"] * 4 * training_flops(model.config, BLOCK)
        assert row.get("tokens_per_second", 1) > 0


def test_the_model_learns(tiny_run: Path) -> None:
    losses = [row["eval_loss"] for row in read_metrics(tiny_run / "metrics.jsonl") if "eval_loss" in row]
    assert losses[-1] < losses[0] - 0.1


def test_summary_holds_the_saved_models_perplexity(tiny_run: Path, tiny_data: PreparedData) -> None:
    summary = RunSummary.read(tiny_run)
    model = ThoughtbubblesForCausalLM.from_pretrained(tiny_run / "model")
    measured = evaluate_perplexity(model, tiny_data.validation[:]["input_ids"])
    assert summary.eval_loss == pytest.approx(measured.loss, abs=1e-5)
    assert summary.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (summary.tokens, summary.eval_leaks) == (12 * 4 * BLOCK, False)


def test_evaluations_can_be_cut_to_the_first_blocks(tmp_path: Path, tiny_data: PreparedData) -> None:
    overrides = ("data.eval_blocks=3", "data.final_eval_blocks=5", "training.steps=4", "training.eval_every=4")
    train(tiny_recipe(tmp_path, tiny_data.path, *overrides), progress=False)
    model = ThoughtbubblesForCausalLM.from_pretrained(tmp_path / "run" / "model")
    blocks = tiny_data.validation[:5]["input_ids"]
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["eval_loss"]
    assert last == pytest.approx(evaluate_perplexity(model, blocks[:3]).loss, abs=1e-5)
    final = RunSummary.read(tmp_path / "run").eval_loss
    assert final == pytest.approx(evaluate_perplexity(model, blocks).loss, abs=1e-5)


def test_same_seed_same_metrics(tmp_path: Path, tiny_run: Path, tiny_data: PreparedData) -> None:
    train(tiny_recipe(tmp_path, tiny_data.path), progress=False)
    assert comparable(tmp_path / "run") == comparable(tiny_run)


def test_variants_of_a_seed_see_the_same_blocks(tmp_path: Path, tiny_data: PreparedData) -> None:
    seen: dict[str, list[Tensor]] = {}
    for routing in ("causal", "none"):
        (tmp_path / routing).mkdir()
        batches = seen.setdefault(routing, [])

        def collate(blocks: list[dict[str, Tensor]], batches: list[Tensor] = batches) -> dict[str, Tensor]:
            batches.append(torch.stack([block["input_ids"] for block in blocks]))
            return collate_blocks(blocks)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run_module, "collate_blocks", collate)
            overrides = (f"model.routing={routing}", "training.steps=3", "training.eval_every=9")
            train(tiny_recipe(tmp_path / routing, tiny_data.path, *overrides), progress=False)
    assert all(torch.equal(*pair) for pair in zip(seen["causal"][:3], seen["none"][:3], strict=True))


class _Kill(TrainerCallback):
    """Ends the process's training at a step, like a crash."""

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == 7:
            raise KeyboardInterrupt


def test_resuming_goes_on_as_if_never_interrupted(
    tmp_path: Path, tiny_run: Path, tiny_data: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(tmp_path, tiny_data.path)
    build = run_module._build_trainer

    def build_and_kill(*args, **kwargs):
        trainer, metrics = build(*args, **kwargs)
        trainer.add_callback(_Kill())
        return trainer, metrics

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "_build_trainer", build_and_kill)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, progress=False)
    assert not (tmp_path / "run" / "summary.json").exists()
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 6
    train(recipe, resume=True, progress=False)
    assert comparable(tmp_path / "run") == comparable(tiny_run)


def test_a_finished_run_is_not_trained_again(tiny_run: Path, tiny_data: PreparedData) -> None:
    before = (tiny_run / "metrics.jsonl").stat().st_mtime_ns
    summary = train(tiny_recipe(tiny_run.parent, tiny_data.path), resume=True, progress=False)
    assert summary == RunSummary.read(tiny_run)
    assert (tiny_run / "metrics.jsonl").stat().st_mtime_ns == before


def test_a_folder_in_use_is_refused(tmp_path: Path, tiny_run: Path, tiny_data: PreparedData) -> None:
    with pytest.raises(RecipeError, match="holds a run: resume it with --resume"):
        train(tiny_recipe(tiny_run.parent, tiny_data.path), progress=False)
    with pytest.raises(RecipeError, match=r"another recipe: 'steps: 12' is now 'steps: 13'"):
        train(tiny_recipe(tiny_run.parent, tiny_data.path, "training.steps=13"), resume=True, progress=False)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(RecipeError, match="expected an empty or new folder"):
        train(tiny_recipe(tmp_path, tiny_data.path), progress=False)
    assert (tmp_path / "run" / "thesis.txt").read_text() == "mine"


def test_too_few_blocks_for_a_batch(tmp_path: Path, tiny_data: PreparedData) -> None:
    recipe = tiny_recipe(tmp_path, tiny_data.path, "training.batch_size=100000")
    with pytest.raises(RecipeError, match="batch_size=100000: expected at most the"):
        train(recipe, progress=False)
    assert not (tmp_path / "run").exists()


def test_weight_decay_is_on_matrices_alone(tmp_path: Path, tiny_data: PreparedData) -> None:
    recipe = tiny_recipe(tmp_path, tiny_data.path)
    model = ThoughtbubblesForCausalLM(run_module.build_config(recipe, tiny_data))
    trainer, _ = run_module._build_trainer(recipe, model, tiny_data, tmp_path, progress=False)
    decayed, undecayed = trainer.create_optimizer().param_groups
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.1, 0.0)
    assert {p.dim() for p in decayed["params"]} == {2}
    assert {p.dim() for p in undecayed["params"]} == {1}
    assert decayed["betas"] == (0.9, 0.95)


def test_learning_rate_warms_up_stays_and_decays(tmp_path: Path, tiny_data: PreparedData) -> None:
    overrides = ("training.steps=20", "training.warmup_fraction=0.25", "training.decay_fraction=0.5")
    recipe = tiny_recipe(tmp_path, tiny_data.path, *overrides)
    model = ThoughtbubblesForCausalLM(run_module.build_config(recipe, tiny_data))
    trainer, _ = run_module._build_trainer(recipe, model, tiny_data, tmp_path, progress=False)
    trainer.create_optimizer_and_scheduler(20)
    rates = []
    for _ in range(20):
        rates.append(trainer.optimizer.param_groups[0]["lr"] / 1e-2)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    expected = [i / 5 for i in range(5)] + [1.0] * 6 + [1 - i / 10 for i in range(1, 10)]
    assert rates == pytest.approx(expected)


def test_train_loss_is_the_mean_over_predicted_tokens(tmp_path: Path, tiny_data: PreparedData) -> None:
    recipe = tiny_recipe(tmp_path, tiny_data.path)
    model = ThoughtbubblesForCausalLM(run_module.build_config(recipe, tiny_data))
    trainer, _ = run_module._build_trainer(recipe, model, tiny_data, tmp_path, progress=False)
    batch = collate_blocks([tiny_data.train[i] for i in range(4)])
    samples, items = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    assert int(items) == 4 * (BLOCK - 1)
    loss = trainer.compute_loss(model, samples[0], num_items_in_batch=items)
    assert loss.item() == pytest.approx(model(**batch).loss.item(), abs=1e-6)


def test_read_metrics_leaves_out_a_line_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]


def comparable(run: Path) -> list[dict[str, float]]:
    """The metrics without what a clock measured."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in rows]
