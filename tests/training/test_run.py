import json
import math
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import accelerate.tracking
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import set_seed

from tests.run_fixtures import BLOCK, sentences, tiny_recipe
from thoughtbubbles import ThoughtbubblesConfig, ThoughtbubblesForCausalLM
from thoughtbubbles.data import DataError, PreparedData, prepare
from thoughtbubbles.data.feed import blocks as blocks_module
from thoughtbubbles.data.feed.blocks import collate_blocks
from thoughtbubbles.data.feed.loading import load_run_data
from thoughtbubbles.data.feed.mixture import BlockPlace
from thoughtbubbles.data.tokenizer import save_tokenizer, train_tokenizer
from thoughtbubbles.evaluation.perplexity import evaluate_perplexity
from thoughtbubbles.model import controls as controls_module
from thoughtbubbles.model.accounting import training_flops
from thoughtbubbles.model.loading import load_model
from thoughtbubbles.model.rules import RULES
from thoughtbubbles.recipes import training as recipe_module
from thoughtbubbles.recipes.training import DataSection, Recipe, RecipeError
from thoughtbubbles.support.errors import InputError, RunError, RunInterrupted
from thoughtbubbles.support.files import sole_user
from thoughtbubbles.support.metrics import read_metrics
from thoughtbubbles.training.checkpoints import Checkpoint, sealed
from thoughtbubbles.training.configuration import build_config
from thoughtbubbles.training.folder import RunSummary
from thoughtbubbles.training.loop import Loop
from thoughtbubbles.training.meter import budget_of_step
from thoughtbubbles.training.optimizer import rate_of_step
from thoughtbubbles.training.run import build_loop, build_model, train
from thoughtbubbles.training.session import Callback, Session

MEASURED = ("tokens_per_second", "mfu", "peak_memory")


def test_a_run_leaves_what_it_promises(tiny_run: Path) -> None:
    assert {path.name for path in tiny_run.iterdir()} == {
        ".lock",
        "recipe.yaml",
        "run.json",
        "metrics.jsonl",
        "checkpoints",
        "model",
        "summary.json",
    }
    assert {path.name for path in (tiny_run / "model").iterdir()} >= {"model.safetensors", "tokenizer.json"}
    card = (tiny_run / "model" / "README.md").read_text()
    assert f"{RunSummary.read(tiny_run).eval_loss:.4f} nats per token" in card


def test_metrics_count_steps_tokens_and_flops(tiny_run: Path) -> None:
    rows = read_metrics(tiny_run / "metrics.jsonl")
    model = ThoughtbubblesForCausalLM.from_pretrained(tiny_run / "model")
    assert [row["step"] for row in rows if "loss" in row] == [2, 4, 6, 8, 10, 12]
    assert [row["step"] for row in rows if "eval_loss" in row] == [4, 8, 12]
    for row in rows:
        assert row["tokens"] == row["step"] * 4 * BLOCK
        assert row["flops"] == row["step"] * 4 * training_flops(model.config, BLOCK)
        assert row.get("tokens_per_second", 1) > 0
        assert row.get("peak_memory", 1) > 0


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


def test_evaluations_can_be_cut_to_a_few_blocks_evenly_spaced(tmp_path: Path, tiny_data: PreparedData) -> None:
    overrides = ("data.eval_blocks=3", "data.final_eval_blocks=5", "training.steps=4", "training.eval_every=4")
    train(tiny_recipe(tmp_path, tiny_data.path, *overrides), progress=False)
    model = ThoughtbubblesForCausalLM.from_pretrained(tmp_path / "run" / "model")
    blocks, total = tiny_data.validation[:]["input_ids"], len(tiny_data.validation)
    assert total > 5
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["eval_loss"]
    assert last == pytest.approx(evaluate_perplexity(model, blocks[[0, total // 3, 2 * total // 3]]).loss, abs=1e-5)
    final = RunSummary.read(tmp_path / "run").eval_loss
    few = blocks[[place * total // 5 for place in range(5)]]
    assert final == pytest.approx(evaluate_perplexity(model, few).loss, abs=1e-5)


def test_a_run_from_before_a_key_existed_goes_on(tmp_path: Path, tiny_run: Path, tiny_data: PreparedData) -> None:
    shutil.copytree(tiny_run, tmp_path / "run")
    stored = tmp_path / "run" / "recipe.yaml"
    text = stored.read_text()
    assert "  report_to: []\n" in text
    stored.write_text(text.replace("  report_to: []\n", ""))
    assert train(tiny_recipe(tmp_path, tiny_data.path), progress=False) == RunSummary.read(tiny_run)
    with pytest.raises(RecipeError, match=r"training\.batch_size: 4 is now 2"):
        train(tiny_recipe(tmp_path, tiny_data.path, "training.batch_size=2"), progress=False)


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
            patch.setattr(blocks_module, "collate_blocks", collate)
            overrides = (f"model.routing={routing}", "training.steps=3", "training.eval_every=9")
            train(tiny_recipe(tmp_path / routing, tiny_data.path, *overrides), progress=False)
    assert all(torch.equal(*pair) for pair in zip(seen["causal"][:3], seen["none"][:3], strict=True))


def test_random_routing_draws_by_the_number_of_the_step(
    tmp_path: Path, tiny_data: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, int]] = []
    draw = controls_module.draw_scores

    def watch(token: Tensor, layer: int, seed: int, step: Tensor) -> Tensor:
        seen.append((seed == 7, int(step)))
        return draw(token, layer, seed, step)

    monkeypatch.setattr(controls_module, "draw_scores", watch)
    overrides = ["model.routing=random", "model.routing_seed=7", "training.steps=3", "training.eval_every=9"]
    train(tiny_recipe(tmp_path, tiny_data.path, *overrides, "training.micro_batch_size=2"), progress=False)
    assert all(seeded for seeded, _ in seen)
    steps = [step for _, step in seen]
    trained = [step for step in steps if step]
    assert trained == sorted(trained)
    assert {trained.count(step) for step in (1, 2, 3)} == {len(trained) // 3}
    assert set(steps) == {0, 1, 2, 3}  # 0 is the evaluation at the end


@pytest.mark.parametrize("routing", ["random", "uniform", "copy", "pause"])
def test_a_control_trains_and_loads(tmp_path: Path, tiny_data: PreparedData, routing: str) -> None:
    overrides = [f"model.routing={routing}", "model.budget=2", "training.steps=2"]
    run = train(tiny_recipe(tmp_path, tiny_data.path, *overrides), progress=False)
    assert run.routing == routing
    assert not run.eval_leaks
    assert load_model(tmp_path / "run", "cpu").config.routing == routing


def loop_of(recipe: Recipe) -> Loop:
    """The loop of a recipe, before its run."""
    data = load_run_data(recipe)
    model = build_model(recipe, build_config(recipe, data))
    return build_loop(recipe, model, data)


class Kill(Callback):
    """Ends the process's training at a step, like a crash."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_step_end(self, session: Session) -> None:
        if session.step == self.at:
            raise KeyboardInterrupt


class _Raise(Callback):
    """Sends this process a signal at a step."""

    def __init__(self, name: str, at: int) -> None:
        self.name, self.at = name, at

    def on_step_begin(self, session: Session) -> None:
        if session.step + 1 == self.at:
            signal.raise_signal(getattr(signal, self.name))


class _RaiseInEvaluation(Callback):
    """Sends SIGTERM in the middle of an evaluation, the first being number 1."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.steps: list[int] = []

    def on_eval_batch(self, session: Session) -> None:
        self.steps.append(session.step)
        evaluations = len(set(self.steps)) + (self.number == 4 and self.steps.count(12) > 10)
        if evaluations == self.number:
            signal.raise_signal(signal.SIGTERM)


def train_with(recipe: Recipe, callback: Callback) -> None:
    """Train with one more callback."""
    train(recipe, progress=False, callbacks=[callback])


def test_resuming_goes_on_as_if_never_interrupted(tmp_path: Path, tiny_run: Path, tiny_data: PreparedData) -> None:
    recipe = tiny_recipe(tmp_path, tiny_data.path)
    with pytest.raises(KeyboardInterrupt):
        train_with(recipe, Kill(at=7))
    assert not (tmp_path / "run" / "summary.json").exists()
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 6
    train(recipe, progress=False)
    assert comparable(tmp_path / "run") == comparable(tiny_run)


def test_resuming_between_logged_steps_and_with_dropout_changes_nothing(
    tmp_path: Path, tiny_data: PreparedData
) -> None:
    overrides = ("model.hidden_dropout=0.2", "training.log_every=5", "training.save_every=3", "training.eval_every=6")
    runs = []
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        runs.append(tiny_recipe(tmp_path / name, tiny_data.path, *overrides))
    train(runs[0], progress=False)
    with pytest.raises(KeyboardInterrupt):
        train_with(runs[1], Kill(at=7))
    train(runs[1], progress=False)
    assert comparable(tmp_path / "killed" / "run") == comparable(tmp_path / "whole" / "run")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_saves_and_the_next_start_goes_on(
    tmp_path: Path, tiny_run: Path, tiny_data: PreparedData, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe(tmp_path, tiny_data.path)
    before = signal.getsignal(getattr(signal, name))
    with pytest.raises(RunInterrupted, match=f"stopped by {name} after step 7, saved; start again") as end:
        train_with(recipe, _Raise(name, at=7))
    assert end.value.exit_code == (130 if name == "SIGINT" else 0)
    assert signal.getsignal(getattr(signal, name)) == before
    assert sealed(tmp_path / "run" / "checkpoints")[-1].step == 7
    train(recipe)
    assert "going on after step 7 of 12" in capsys.readouterr().err
    assert comparable(tmp_path / "run") == comparable(tiny_run)


@pytest.mark.parametrize("place", ["on the way", "at the end"])
def test_a_signal_during_an_evaluation_does_not_wait_for_its_end(
    tmp_path: Path, tiny_run: Path, tiny_data: PreparedData, place: str
) -> None:
    recipe = tiny_recipe(tmp_path, tiny_data.path)
    step, evaluation = (8, 2) if place == "on the way" else (12, 4)
    with pytest.raises(RunInterrupted, match=f"after step {step}"):
        train_with(recipe, _RaiseInEvaluation(evaluation))
    assert sealed(tmp_path / "run" / "checkpoints")[-1].step == step
    train(recipe, progress=False)
    assert comparable(tmp_path / "run") == comparable(tiny_run)
    assert RunSummary.read(tmp_path / "run").eval_loss == RunSummary.read(tiny_run).eval_loss


def test_a_finished_run_is_not_trained_again(
    tiny_run: Path, tiny_data: PreparedData, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (tiny_run / "metrics.jsonl").stat().st_mtime_ns
    summary = train(tiny_recipe(tiny_run.parent, tiny_data.path))
    assert summary == RunSummary.read(tiny_run)
    assert (tiny_run / "metrics.jsonl").stat().st_mtime_ns == before
    assert "holds a finished run of this recipe: nothing to do" in capsys.readouterr().err


def test_a_folder_of_something_else_is_refused(tmp_path: Path, tiny_run: Path, tiny_data: PreparedData) -> None:
    with pytest.raises(
        RecipeError, match=r"a run of another recipe: model\.budget: 1\.5 is now 2; training\.steps: 12"
    ):
        train(tiny_recipe(tiny_run.parent, tiny_data.path, "training.steps=13", "model.budget=2"), progress=False)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(RecipeError, match="expected an empty or new folder"):
        train(tiny_recipe(tmp_path, tiny_data.path), progress=False)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"thesis.txt"}


def test_a_run_may_be_moved(tmp_path: Path, tiny_run: Path, tiny_data: PreparedData) -> None:
    shutil.copytree(tiny_run, tmp_path / "run")
    assert train(tiny_recipe(tmp_path, tiny_data.path), progress=False) == RunSummary.read(tiny_run)


def test_a_run_on_other_data_is_refused(tmp_path: Path, tiny_run: Path, tiny_data: PreparedData) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**facts, "data": "another"}))
    with pytest.raises(RecipeError, match=r"holds a run on other data: .* has changed since"):
        train(tiny_recipe(tmp_path, tiny_data.path), progress=False)


def test_a_folder_that_another_run_is_at_is_refused(tmp_path: Path, tiny_data: PreparedData) -> None:
    (tmp_path / "run").mkdir()
    recipe = tiny_recipe(tmp_path, tiny_data.path)
    with sole_user(tmp_path / "run" / ".lock"), pytest.raises(RecipeError, match="is in use by another run"):
        train(recipe, progress=False)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock"}
    train(tiny_recipe(tmp_path, tiny_data.path, "training.steps=1"), progress=False)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.batch_size=100000", "batch_size=100000: expected at most the"),
        ("training.micro_batch_size=3", "micro_batch_size=3: expected a divisor of 4"),
        ("model.vocab_size=20", "model.vocab_size=20: expected at least"),
        ("data.path=nowhere", "nowhere does not exist"),
    ],
)
def test_bad_input_leaves_nothing(tmp_path: Path, tiny_data: PreparedData, override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        train(tiny_recipe(tmp_path, tiny_data.path, override), progress=False)
    assert not (tmp_path / "run").exists()


def test_accumulated_batches_give_the_same_run(tmp_path: Path, tiny_data: PreparedData, float64: None) -> None:
    curves = []
    for micro in (4, 1):
        (tmp_path / str(micro)).mkdir()
        # At budget 1 nothing is chosen, and so no rounding can choose otherwise (method: Near ties).
        overrides = (f"training.micro_batch_size={micro}", "model.budget=1")
        train(tiny_recipe(tmp_path / str(micro), tiny_data.path, *overrides), progress=False)
        rows = read_metrics(tmp_path / str(micro) / "run" / "metrics.jsonl")
        curves.append([row.get("loss", row.get("eval_loss")) for row in rows])
    assert curves[1] == pytest.approx(curves[0], rel=1e-10)


def test_gradient_checkpointing_changes_no_number(tmp_path: Path, tiny_run: Path, tiny_data: PreparedData) -> None:
    recomputed: list[int] = []

    class Count(Callback):
        def on_begin(self, session: Session) -> None:
            session.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: recomputed.append(1))

    train_with(tiny_recipe(tmp_path, tiny_data.path, "training.gradient_checkpointing=true"), Count())
    assert comparable(tmp_path / "run") == comparable(tiny_run)
    evaluated = 4 * math.ceil(len(tiny_data.validation) / 4)
    assert len(recomputed) == 2 * 12 + evaluated


def test_bfloat16_is_autocast(tmp_path: Path, tiny_run: Path, tiny_data: PreparedData) -> None:
    train(tiny_recipe(tmp_path, tiny_data.path, "training.precision=bfloat16"), progress=False)
    ours, exact = RunSummary.read(tmp_path / "run").eval_loss, RunSummary.read(tiny_run).eval_loss
    assert ours != exact
    assert ours == pytest.approx(exact, rel=0.02)
    model = ThoughtbubblesForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert model.dtype == torch.float32


@contextmanager
def trained_budgets() -> Iterator[list[str]]:
    """The budgets of the forward passes in training while the block runs, in words."""
    seen: list[str] = []
    forward = ThoughtbubblesForCausalLM.forward

    def spy(self, *args, budget=None, **kwargs):
        if self.training:
            seen.append(str(budget))
        return forward(self, *args, budget=budget, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ThoughtbubblesForCausalLM, "forward", spy)
        yield seen


def test_budgets_are_drawn_for_each_step_and_evaluated(tmp_path: Path, tiny_data: PreparedData) -> None:
    overrides = ("training.training_budgets=[1, 3/2, 2.5]", "training.eval_budgets=[1, 2.5]", "training.steps=24")
    recipe = tiny_recipe(tmp_path, tiny_data.path, *overrides, "training.micro_batch_size=2", "training.eval_every=24")
    with trained_budgets() as seen:
        summary = train(recipe, progress=False)
    assert seen[::2] == seen[1::2] == [str(budget_of_step([1, "3/2", 2.5], 0, step)) for step in range(1, 25)]
    assert set(seen) == {"1", "3/2", "2.5"}
    model = ThoughtbubblesForCausalLM.from_pretrained(tmp_path / "run" / "model")
    blocks = tiny_data.validation[:]["input_ids"]
    assert summary.training_flops == 4 * sum(training_flops(model.config, BLOCK, budget) for budget in seen[::2])
    for budget in ("1", "2.5"):
        measured = evaluate_perplexity(model, blocks, budget=budget).loss
        assert summary.eval_losses[f"eval_loss/budget_{budget}"] == pytest.approx(measured, abs=1e-5)
    row = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "eval_loss" in row][-1]
    assert row["eval_loss/budget_1"] == pytest.approx(summary.eval_losses["eval_loss/budget_1"])


def test_mixtures_are_trained_on_and_evaluated_by_weight(
    tmp_path: Path, tiny_data: PreparedData, other_data: PreparedData
) -> None:
    recipe = tiny_recipe(tmp_path, tiny_data.path)
    recipe.data = DataSection(mixture={str(tiny_data.path): 3, str(other_data.path): 1})
    data = load_run_data(recipe)
    corpora = Counter(data.samples.describe(i).rpartition("/train[")[0] for i in range(48))
    assert corpora[str(tiny_data.path)] > corpora[str(other_data.path)] > 0
    summary = train(recipe, progress=False)
    model = ThoughtbubblesForCausalLM.from_pretrained(tmp_path / "run" / "model")
    losses = [evaluate_perplexity(model, corpus.validation[:]["input_ids"]).loss for corpus in (tiny_data, other_data)]
    assert summary.eval_loss == pytest.approx(0.75 * losses[0] + 0.25 * losses[1], abs=1e-5)
    assert list(summary.eval_losses.values()) == pytest.approx(losses, abs=1e-5)


def test_corpora_that_do_not_fit_each_other(tmp_path: Path, tiny_data: PreparedData) -> None:
    (tmp_path / "a.txt").write_text("\n".join(sentences(30)))
    (tmp_path / "b.txt").write_text("\n".join(sentences(30)[::-1]))
    tokenizer = str(tiny_data.path / "tokenizer")
    for name, block, given in (("wide", 32, tokenizer), ("strange", BLOCK, None)):
        prepare(
            tmp_path / name,
            [str(tmp_path / "a.txt")],
            validation=[str(tmp_path / "b.txt")],
            tokenizer=given,
            vocab_size=280,
            block_size=block,
            progress=False,
        )
    for name, message in (("wide", "has blocks of 32 tokens"), ("strange", "was prepared with another tokenizer")):
        recipe = tiny_recipe(tmp_path, tiny_data.path)
        recipe.data = DataSection(mixture={str(tiny_data.path): 1, str(tmp_path / name): 1})
        with pytest.raises(InputError, match=message):
            load_run_data(recipe)


def test_metrics_say_what_the_gates_do(tmp_path: Path, tiny_data: PreparedData) -> None:
    overrides = ("training.steps=1", "training.log_every=1", "training.eval_every=1", "training.micro_batch_size=2")
    recipe = tiny_recipe(tmp_path, tiny_data.path, *overrides)
    data = load_run_data(recipe)
    set_seed(0)
    model = build_model(recipe, build_config(recipe, data))
    batch = data.collate([data.samples[i] for i in range(4)])
    out = model(**batch, output_streams=True)
    out.loss.backward()
    train(recipe, progress=False)
    row = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]
    for layer in (1, 2):
        streams = out.streams[layer]
        sizes = streams.bubble_sizes().double()
        assert row[f"forks/{layer}/streams_per_token"] == pytest.approx(sizes.mean().item())
        assert row[f"forks/{layer}/bubble_share"] == pytest.approx((sizes > 1).double().mean().item())
        scores = streams.log_score[streams.alive].double().sort().values
        for level in (0.05, 0.25, 0.5, 0.75, 0.95):
            expected = torch.quantile(scores, level).item()
            assert row[f"forks/{layer}/log_score_q{round(100 * level):02}"] == pytest.approx(expected, abs=1e-5)
    squares = sum(p.grad.square().sum() for p in model.model.gates.parameters())
    assert row["gate_grad_norm"] == pytest.approx(squares.sqrt().item(), rel=1e-4)
    assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))


def test_a_dense_run_has_no_fork_figures(tmp_path: Path, tiny_data: PreparedData) -> None:
    train(tiny_recipe(tmp_path, tiny_data.path, "model.routing=none", "training.steps=2"), progress=False)
    assert not any("gate" in name or "forks" in name for row in comparable(tmp_path / "run") for name in row)


@pytest.mark.parametrize("routing", RULES)
def test_a_run_that_diverges_stops_before_its_weights_are_spoiled(
    tmp_path: Path, tiny_data: PreparedData, routing: str
) -> None:
    overrides = ["training.learning_rate=1e30", "training.save_every=1", "training.warmup_fraction=0.5"]
    overrides += [f"model.routing={routing}", *(["model.budget=2"] if routing in ("copy", "pause") else [])]
    with pytest.raises(RunError, match=r"step \d+: loss nan, .* stopped before the update.*the last checkpoint is"):
        train(tiny_recipe(tmp_path, tiny_data.path, *overrides), progress=False)
    found = json.loads((tmp_path / "run" / "diverged.json").read_text())
    last = sealed(tmp_path / "run" / "checkpoints")[-1]
    assert found["step"] == last.step + 1
    assert list(found["samples"]) == [str(4 * last.step + i) for i in range(4)]
    place = found["samples"][str(4 * last.step)]
    assert place.startswith(f"{tiny_data.path}/train[")
    weights = load_file(last.folder / "model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())


def test_tensorboard_gets_what_metrics_has(tmp_path: Path, tiny_data: PreparedData) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    train(tiny_recipe(tmp_path, tiny_data.path, "training.report_to=[tensorboard]"), progress=False)
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    shown = [(event.step, event.value) for event in events.Scalars("eval/loss")]
    assert shown == [(row["step"], pytest.approx(row["eval_loss"])) for row in rows if "eval_loss" in row]
    assert {"train/forks/1/streams_per_token", "train/gate_grad_norm"} <= set(events.Tags()["scalars"])


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_what_metrics_has(
    tmp_path: Path, tiny_data: PreparedData, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The library itself need not be there."""
    rows: list[tuple[int, dict[str, float]]] = []
    said: dict[str, object] = {}

    class Tracker:
        def __init__(self, project: str, **kwargs: object) -> None:
            said.update(project=project, **kwargs)

        def start(self) -> None: ...

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            said["steps"] = values["training"]["steps"]

        def log(self, values: dict[str, float], step: int) -> None:
            rows.append((step, values))

        def finish(self) -> None:
            said["finished"] = True

    monkeypatch.setattr(accelerate.tracking, {"wandb": "WandBTracker", "trackio": "TrackioTracker"}[name], Tracker)
    monkeypatch.setattr(recipe_module, "find_spec", lambda _: True)
    monkeypatch.setenv(f"{name.upper()}_PROJECT", "bubbles")
    train(tiny_recipe(tmp_path, tiny_data.path, f"training.report_to=[{name}]", "training.steps=4"), progress=False)
    assert said["name"] == str(tmp_path / "run")
    assert (said["project"], said["steps"], said["finished"]) == ("bubbles", 4, True)
    metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [step for step, _ in rows] == [row["step"] for row in metrics] == [2, 4, 4]
    assert rows[0][1]["train/loss"] == metrics[0]["loss"]
    assert rows[2][1]["eval/loss"] == metrics[2]["eval_loss"]


def test_a_pretrained_model_is_gone_on_with(tmp_path: Path, tiny_run: Path, tiny_data: PreparedData) -> None:
    recipe = tiny_recipe(tmp_path, tiny_data.path, "training.learning_rate=1e-9", "training.steps=4")
    recipe.model = {"pretrained": str(tiny_run), "budget": 2}
    summary = train(recipe, progress=False)
    model = ThoughtbubblesForCausalLM.from_pretrained(tiny_run / "model")
    blocks = tiny_data.validation[:]["input_ids"]
    assert summary.eval_loss == pytest.approx(evaluate_perplexity(model, blocks, budget=2).loss, abs=1e-4)
    assert ThoughtbubblesConfig.from_pretrained(tmp_path / "run" / "model").budget == 2


def test_a_pretrained_model_of_another_tokenizer_is_refused(
    tmp_path: Path, tiny_run: Path, tiny_data: PreparedData
) -> None:
    copy = Path(shutil.copytree(tiny_run / "model", tmp_path / "model"))
    save_tokenizer(train_tokenizer(["another text"], 257), copy)
    recipe = tiny_recipe(tmp_path, tiny_data.path)
    recipe.model = {"pretrained": str(copy)}
    with pytest.raises(InputError, match="tokenised with another tokenizer than that of the model"):
        train(recipe, progress=False)


def test_samples_left_are_found_without_reading_those_before(tmp_path: Path, tiny_data: PreparedData) -> None:
    recipe = tiny_recipe(tmp_path, tiny_data.path, "training.steps=200000")
    data = load_run_data(recipe)
    model = build_model(recipe, build_config(recipe, data))
    loop = build_loop(recipe, model, data, Checkpoint(tmp_path, step=100_000, eval_loss=None))
    reads: list[int] = []

    def note_read(_samples: object, index: int) -> BlockPlace:
        reads.append(index)
        return BlockPlace(0, 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(data.samples), "place", note_read)
        batch = next(loop.batches())
    assert batch["input_ids"].shape == (4, BLOCK)
    assert min(reads) == 400_000
    assert len(reads) <= 8


def test_weight_decay_is_on_matrices_alone(tmp_path: Path, tiny_data: PreparedData) -> None:
    recipe = tiny_recipe(tmp_path, tiny_data.path)
    decayed, undecayed = loop_of(recipe).optimizer.param_groups
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.1, 0.0)
    assert {p.dim() for p in decayed["params"]} == {2}
    assert {p.dim() for p in undecayed["params"]} == {1}
    assert decayed["betas"] == (0.9, 0.95)


def test_learning_rate_warms_up_stays_and_decays(tmp_path: Path, tiny_data: PreparedData) -> None:
    overrides = ("training.steps=20", "training.warmup_fraction=0.25", "training.decay_fraction=0.5")
    recipe = tiny_recipe(tmp_path, tiny_data.path, *overrides)
    rates = [rate_of_step(recipe.training, step) for step in range(1, 21)]
    expected = [i / 5 for i in range(5)] + [1.0] * 6 + [1 - i / 10 for i in range(1, 10)]
    assert rates == pytest.approx(expected)


def test_train_loss_is_the_mean_over_predicted_tokens(tmp_path: Path, tiny_data: PreparedData) -> None:
    recipe = tiny_recipe(tmp_path, tiny_data.path, "training.log_every=1", "training.steps=1")
    batch = collate_blocks([load_run_data(recipe).samples[i] for i in range(4)])
    set_seed(0)
    expected = loop_of(recipe).model(**batch).loss.item()
    assert int((batch["labels"] != -100).sum()) == 4 * (BLOCK - 1)
    train(recipe, progress=False)
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[0]["loss"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("wrong", [-1, 300])
def test_a_batch_with_ids_outside_the_vocabulary_is_refused(
    tmp_path: Path, tiny_data: PreparedData, wrong: int
) -> None:
    data = load_run_data(tiny_recipe(tmp_path, tiny_data.path), progress=False)
    assert data.vocab_size == 300
    block = data.samples[0]
    assert data.collate([block, block])["labels"].shape == (2, BLOCK)
    spoilt = {"input_ids": block["input_ids"].clone()}
    spoilt["input_ids"][3] = wrong
    with pytest.raises(DataError, match=f"token id {wrong}, expected ids from 0 to 299"):
        data.collate([block, spoilt])


def test_read_metrics_leaves_out_a_line_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]


def comparable(run: Path) -> list[dict[str, float]]:
    """The metrics without what was measured of the machine."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in MEASURED} for row in rows]
