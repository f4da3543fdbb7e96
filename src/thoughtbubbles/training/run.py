"""A training run: from a recipe to metrics, checkpoints and a trained model."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from transformers.utils import logging as transformers_logging

from thoughtbubbles.data.feed.loading import load_run_data
from thoughtbubbles.data.feed.rundata import RunData, check_batch
from thoughtbubbles.model.accounting import count_parameters
from thoughtbubbles.model.configuration import ThoughtbubblesConfig
from thoughtbubbles.model.modeling import ThoughtbubblesForCausalLM
from thoughtbubbles.model.routing import LEAK
from thoughtbubbles.model.sharing import write_model_card
from thoughtbubbles.model.weights import list_names
from thoughtbubbles.recipes.training import Recipe, RecipeError
from thoughtbubbles.support.errors import RunError, is_disk_full, is_out_of_memory, one_line
from thoughtbubbles.support.machine import choose_precision, device_type, has_bfloat16
from thoughtbubbles.support.metrics import read_metrics
from thoughtbubbles.support.progress import say
from thoughtbubbles.support.signals import StopRequest, stop_on_signals
from thoughtbubbles.support.text import token_list
from thoughtbubbles.training.callbacks import MetricsWriter, ProgressDisplay, Trackers
from thoughtbubbles.training.checkpoints import Checkpoint, disk_full, last_checkpoint, newest_sound
from thoughtbubbles.training.configuration import build_config
from thoughtbubbles.training.folder import (
    CHECKPOINTS_NAME,
    METRICS_NAME,
    RECIPE_NAME,
    SUMMARY_NAME,
    RunSummary,
    opened,
    read_facts,
)
from thoughtbubbles.training.loop import Loop
from thoughtbubbles.training.memory import TrainingMemory
from thoughtbubbles.training.session import Callback
from thoughtbubbles.training.states import carry_moments, whole_weights

__all__ = ["train"]


def train(
    recipe: Recipe, progress: bool = True, callbacks: Sequence[Callback] = (), verify: bool = False
) -> RunSummary:
    """Train a model as a recipe says, or go on with a run that was interrupted.

    Leaves in `training.output`: recipe.yaml (every default spelled out), run.json (the data's identity, the precision,
    the commit, the machine and the libraries' versions), metrics.jsonl, checkpoints/, model/ (the trained model and its
    tokenizer) and, last, summary.json; nothing if it fails before the first step is taken. If the folder holds an
    unfinished run of this recipe, it goes on from its newest sound checkpoint, and its metrics are those of a run that
    was never interrupted; a finished one is returned as it is.

    SIGTERM, SIGUSR1 and Ctrl-C save a checkpoint and stop.

    Args:
        progress: show progress on standard error.
        callbacks: beside those of every run.
        verify: check prepared data whole, whatever their size and however often it was done.

    Raises:
        InputError: for data or model fields that cannot be used, an output folder that cannot be written or that holds
            something else, a run of another recipe or on other data, or a run that another process is at; or where
            model or micro-batch do not fit into memory.
        RunError: if the disk is full or fails, or the loss or its gradient is not finite.
        RunInterrupted: after a signal, when everything is saved.
    """
    output, state = Path(recipe.training.output), find_processes(recipe)
    precision, main = decide_precision(recipe, output), state.is_main_process
    progress = progress and main
    data = load_run_data(recipe, progress, verify)
    config = build_config(recipe, data)
    memory = TrainingMemory(recipe, config, data.longest, precision, state.num_processes, state.device)
    memory.check()
    started = _opened(recipe, data, state, precision)
    with stop_on_signals() as stop, started as begin, _failures_said(output, memory):
        if (output / SUMMARY_NAME).exists():
            summary = RunSummary.read(output)
            say(f"{output} holds a finished run of this recipe: nothing to do", progress)
            return summary
        _say_precision(recipe, precision, state)
        checkpoint = newest_sound(output / CHECKPOINTS_NAME, warn=lambda text: say(text, enabled=main))
        if checkpoint is not None:
            say(f"{output}: going on after step {checkpoint.step} of {recipe.training.steps}", progress)
        alone = recipe.training.sharding == "fsdp" and state.num_processes == 1
        say("training.sharding=fsdp: one process holds everything", progress and alone)
        transformers_logging.disable_progress_bar()
        set_seed(recipe.training.seed)
        model = build_model(recipe, config, progress and checkpoint is None)
        loop = build_loop(recipe, model, data, checkpoint, stop, progress, callbacks, begin)
        # A signal may have come during the evaluation there.
        again = checkpoint is not None and not _was_evaluated(output, checkpoint.step, recipe.training.eval_every)
        try:
            summary = _summarise(loop, loop.train(again))
        finally:
            data.close()
        _save_model(loop, output, summary)
        if main:
            summary.write(output)
        return summary


def find_processes(recipe: Recipe) -> PartialState:
    """Which process this is of how many that torchrun started, and its device.

    Raises:
        RecipeError: if they cannot share the batch or the model as the recipe says.
    """
    settings, state = recipe.training, PartialState(cpu=not torch.accelerator.is_available())
    divided = settings.sharding == "fsdp" and state.num_processes > 1
    if settings.compile == "whole" and divided:
        raise RecipeError(
            "training.compile=whole: expected blocks with training.sharding=fsdp, whose weights are gathered between "
            "them"
        )
    if settings.eval_tasks is not None and divided:
        raise RecipeError(
            f"training.eval_tasks={settings.eval_tasks}: expected null with training.sharding=fsdp, where the process "
            "that scores does not hold the model"
        )
    check_batch(recipe, state.num_processes)
    return state


def decide_precision(recipe: Recipe, output: Path) -> str:
    """What the run in a folder began in, or else what its recipe and this machine want: float32 or bfloat16."""
    if recipe.training.precision == "auto" and (output / RECIPE_NAME).exists():
        return str(read_facts(output)["precision"])
    return choose_precision(recipe.training.precision, device_type())


@contextmanager
def _opened(recipe: Recipe, data: RunData, state: PartialState, precision: str) -> Iterator[Callable[[], None]]:
    """As `folder.opened`: the first process opens the folder, and the others wait for it."""
    if not state.is_main_process:
        state.wait_for_everyone()
        yield lambda: None
        return
    with opened(recipe, data, Path(recipe.training.output), precision, state.device.type) as begin:
        state.wait_for_everyone()
        yield begin


def _say_precision(recipe: Recipe, precision: str, state: PartialState) -> None:
    """Warn of bfloat16 where it is emulated, as far as that is known."""
    device = state.device.type
    if precision == "bfloat16" and device in ("cpu", "cuda") and not has_bfloat16(device):
        kept = recipe.training.precision == "auto"
        reason = f"{recipe.training.output} began in it" if kept else "the recipe asks for it; expected auto or float32"
        text = f"training.precision=bfloat16 is many times slower than float32 on this {device}"
        say(f"{text}: {reason}", enabled=state.is_main_process)


@contextmanager
def _failures_said(output: Path, memory: TrainingMemory) -> Iterator[None]:
    """Say in a line what no traceback helps with: a disk that is full or fails, and memory that has run out."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error, output):
            raise disk_full(output / CHECKPOINTS_NAME) from error
        raise RunError(f"{output}: {one_line(error)}; {last_checkpoint(output / CHECKPOINTS_NAME)}") from error
    except Exception as error:
        if is_out_of_memory(error):
            raise memory.exceeded() from error
        raise


def build_model(recipe: Recipe, config: ThoughtbubblesConfig, progress: bool = False) -> ThoughtbubblesForCausalLM:
    """A new model, or the one that the recipe starts from.

    Args:
        progress: say which gates of the latter begin anew or are dropped.

    Raises:
        InputError: for weights that cannot be loaded, or do not fit but for gates that the recipe changes.
    """
    pretrained = recipe.model.get("pretrained")
    if pretrained is None:
        model = ThoughtbubblesForCausalLM(config)
    else:
        from thoughtbubbles.training.pretrained import start_from

        model, changes = start_from(pretrained, config)
        if changes:
            say(f"model.pretrained={pretrained}: {changes}", progress)
    model.generation_config.eos_token_id = _all_ends(model.generation_config.eos_token_id, config.eos_token_id)
    if recipe.training.gradient_checkpointing:
        # transformers 5.23 renamed it, 5.17 knows the older name alone.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    return model


def _all_ends(*several: int | list[int] | None) -> int | list[int] | None:
    """The tokens that end a generation by one setting or another, those of a model that a run starts from kept."""
    ends = list(dict.fromkeys(token for each in several for token in token_list(each)))
    return ends if len(ends) > 1 else next(iter(ends), None)


def build_loop(
    recipe: Recipe,
    model: ThoughtbubblesForCausalLM,
    data: RunData,
    checkpoint: Checkpoint | None = None,
    stop: StopRequest | None = None,
    progress: bool = False,
    more: Sequence[Callback] = (),
    begin: Callable[[], None] = lambda: None,
) -> Loop:
    """The loop of a run with its callbacks, and `more` of them."""
    output, state = Path(recipe.training.output), find_processes(recipe)
    callbacks = [*more]
    if state.is_main_process:
        names = recipe.training.report_to
        callbacks = [MetricsWriter(output / METRICS_NAME), *more, *([Trackers(names, output)] if names else [])]
    if progress:
        callbacks.append(ProgressDisplay(output.name))
    precision = decide_precision(recipe, output)
    loop = Loop(recipe, model, data, state, precision, checkpoint, stop, callbacks, begin)
    if checkpoint is None and recipe.training.moments_from is not None:
        _carry_moments(loop, Path(recipe.training.moments_from), progress)
    return loop


def _carry_moments(loop: Loop, source: Path, progress: bool) -> None:
    """Begin with the moments of another run."""
    key = f"training.moments_from={source}"
    stored = newest_sound(source / CHECKPOINTS_NAME, warn=lambda text: say(text, progress))
    if stored is None:
        raise RecipeError(f"{key}: expected the folder of a run, with a checkpoint")
    taken, anew = carry_moments(stored.folder, loop.model, loop.optimizer)
    if not taken:
        raise RecipeError(f"{key}: no weight of it has the name and the shape of one that is trained here")
    rest = f"; they begin anew for {list_names(anew)}" if anew else ""
    say(f"{key}: moments of {len(taken)} weights after step {stored.step}{rest}", progress)


def _was_evaluated(output: Path, step: int, every: int) -> bool:
    if step % every:
        return True
    return any("eval_loss" in row for row in read_metrics(output / METRICS_NAME) if row["step"] == step)


def _save_model(loop: Loop, output: Path, summary: RunSummary) -> None:
    main, tokenizer = loop.state.is_main_process, loop.data.tokenizer
    # In training texts are of any length: they are cut into blocks.
    tokenizer.model_max_length = loop.model.config.max_position_embeddings
    if loop.adapted is not None:
        loop.adapted.merge_and_unload()  # type: ignore[operator]
    weights = whole_weights(loop.model) if loop.divided else None
    with loop.replacing(output / "model") as partial:
        if main:
            loop.model.save_pretrained(partial, state_dict=weights)
            tokenizer.save_pretrained(partial)
            write_model_card(partial, loop.model.config, _card_facts(loop, summary))


def _card_facts(loop: Loop, summary: RunSummary) -> dict[str, str]:
    leak = f" (leaks: {LEAK})" if summary.eval_leaks else ""
    pretrained = loop.recipe.model.get("pretrained")
    return {
        "Task": loop.recipe.task,
        **({} if pretrained is None else {"Started from": str(pretrained)}),
        # The folders' names alone: their paths are nobody's business where the card is read.
        "Data": ", ".join(Path(part).name for part in loop.data.source.split(", ")),
        "Steps": f"{summary.steps:,}",
        "Tokens": f"{summary.tokens:,}",
        "Training FLOPs": f"{summary.training_flops:.3g}",
        "Validation loss": f"{summary.eval_loss:.4f} nats per token, perplexity {summary.eval_perplexity:.2f}{leak}",
        "Seed": str(loop.recipe.training.seed),
    }


def _summarise(loop: Loop, metrics: dict[str, float]) -> RunSummary:
    config, steps = loop.model.config, loop.step
    return RunSummary(
        parameters=count_parameters(config),
        steps=steps,
        tokens=loop.meter.tokens(steps),
        training_flops=loop.meter.flops(steps),
        tokens_per_second=loop.clock.mean_rate(loop.meter.tokens(steps)),
        eval_loss=metrics["eval_loss"],
        eval_perplexity=metrics["eval_perplexity"],
        eval_losses={name: value for name, value in metrics.items() if name.startswith("eval_loss/")},
        eval_leaks=config.leaks,
        routing=config.routing,
        budget=str(config.exact_budget()),
    )
