"""A training run: from a recipe to metrics, checkpoints and a trained model."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.utils import logging as transformers_logging

from thoughtbubbles.data.feed.loading import load_run_data
from thoughtbubbles.data.feed.rundata import RunData, check_batch
from thoughtbubbles.model.accounting import count_parameters
from thoughtbubbles.model.configuration import ThoughtbubblesConfig
from thoughtbubbles.model.loading import check_tokenizer
from thoughtbubbles.model.modeling import ThoughtbubblesForCausalLM
from thoughtbubbles.model.routing import LEAK
from thoughtbubbles.model.sharing import write_model_card
from thoughtbubbles.recipes.training import Recipe, RecipeError, check_rows, model_config
from thoughtbubbles.support.errors import RunError, is_out_of_memory, one_line
from thoughtbubbles.support.files import partial_path, read_as, replacing, write_text
from thoughtbubbles.support.machine import choose_precision, device_type, has_bfloat16
from thoughtbubbles.support.metrics import read_metrics
from thoughtbubbles.support.progress import say
from thoughtbubbles.support.signals import StopRequest, interrupted, stop_on_signals
from thoughtbubbles.support.text import document_ends, start_document
from thoughtbubbles.training.callbacks import MetricsWriter, ProgressDisplay
from thoughtbubbles.training.checkpoints import Checkpoint, newest_sound
from thoughtbubbles.training.folder import (
    CHECKPOINTS_NAME,
    METRICS_NAME,
    RECIPE_NAME,
    SUMMARY_NAME,
    RunFolder,
    opened,
    read_facts,
)
from thoughtbubbles.training.memory import TrainingMemory
from thoughtbubbles.training.trainer import BubbleTrainer, disk_full, is_disk_full, last_checkpoint

__all__ = ["train"]


@dataclass(frozen=True)
class RunSummary:
    """What a finished run came to; summary.json in its folder.

    Attributes:
        parameters: of the model, a tied embedding counted once.
        steps: optimizer steps.
        tokens: seen in training.
        training_flops: by `thoughtbubbles.model.accounting`.
        tokens_per_second: in training, evaluations and checkpoints left out, since the last start.
        eval_loss: nats per token, one forward a row, over all validation rows or as many as the recipe says.
        eval_perplexity: exp of it.
        eval_losses: of each corpus and at each further budget, named as in metrics.jsonl.
        eval_leaks: whether these losses are not the likelihood of a left-to-right model (routing `topk`).
        routing: of the model.
        budget: of the model.
    """

    parameters: int
    steps: int
    tokens: int
    training_flops: int
    tokens_per_second: float
    eval_loss: float
    eval_perplexity: float
    eval_losses: dict[str, float]
    eval_leaks: bool
    routing: str
    budget: str

    def write(self, folder: Path) -> None:
        """Write summary.json, whole or not at all."""
        write_text(folder / SUMMARY_NAME, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "RunSummary":
        """Read the summary of a finished run.

        Raises:
            InputError: if it is not as it was written; removed, it is made again by the next start.
        """
        return read_as(cls, folder / SUMMARY_NAME)


def train(
    recipe: Recipe, progress: bool = True, callbacks: Sequence[TrainerCallback] = (), verify: bool = False
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
        callbacks: of the Trainer, beside those of every run.
        verify: check prepared data whole, whatever their size and however often it was done.

    Raises:
        InputError: for data or model fields that cannot be used, an output folder that cannot be written or that holds
            something else, a run of another recipe or on other data, or a run that another process is at; or where
            model or micro-batch do not fit into memory.
        RunError: if the disk is full or fails, or the loss or its gradient is not finite.
        RunInterrupted: after a signal, when everything is saved.
    """
    output = Path(recipe.training.output)
    arguments = build_arguments(recipe, output)
    main = arguments.process_index == 0
    progress = progress and main
    data = load_run_data(recipe, progress, verify)
    config = build_config(recipe, data)
    memory = _memory(recipe, config, data, arguments)
    memory.check()
    with stop_on_signals() as stop, _opened(recipe, data, arguments) as folder, _failures_said(output, memory):
        if (output / SUMMARY_NAME).exists():
            summary = RunSummary.read(output)
            say(f"{output} holds a finished run of this recipe: nothing to do", progress)
            return summary
        _say_precision(recipe, arguments, main)
        checkpoint = newest_sound(output / CHECKPOINTS_NAME, warn=lambda text: say(text, enabled=main))
        if checkpoint is not None:
            say(f"{output}: going on after step {checkpoint.step} of {recipe.training.steps}", progress)
        if recipe.training.sharding == "fsdp" and arguments.world_size == 1:
            say("training.sharding=fsdp: one process holds everything", progress)
        transformers_logging.disable_progress_bar()
        set_seed(recipe.training.seed)
        model = build_model(recipe, config, progress and checkpoint is None)
        trainer = build_trainer(recipe, model, data, arguments, checkpoint, stop, progress, callbacks, folder)
        metrics = _run(trainer, data, stop)
        summary = _summarise(trainer, metrics)
        _save_model(trainer, output, summary)
        if trainer.is_world_process_zero():
            summary.write(output)
        return summary


def _run(trainer: BubbleTrainer, data: RunData, stop: StopRequest) -> dict[str, float]:
    """Train to the end and evaluate."""
    start = trainer.checkpoint
    try:
        trainer.train(resume_from_checkpoint=None if start is None else str(start.folder))
        if trainer.state.global_step < trainer.state.max_steps:
            raise interrupted(stop, trainer.state.global_step)
        return trainer.measure(data.final_eval_rows)
    finally:
        data.close()
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressDisplay):
                callback.close()


@contextmanager
def _opened(recipe: Recipe, data: RunData, arguments: TrainingArguments) -> Iterator[RunFolder]:
    """The folder of the run, opened by the first process, for which the others wait."""
    path = Path(recipe.training.output)
    if arguments.process_index > 0:
        torch.distributed.barrier()
        yield RunFolder(path, recipe, {}, begun=True)
        return
    with opened(recipe, data, path, _precision(arguments), arguments.device.type) as folder:
        if arguments.world_size > 1:
            torch.distributed.barrier()
        yield folder


def _precision(arguments: TrainingArguments) -> str:
    return "bfloat16" if arguments.bf16 else "float32"


def _say_precision(recipe: Recipe, arguments: TrainingArguments, main: bool) -> None:
    """Warn of bfloat16 where it is emulated, as far as that is known."""
    device = arguments.device.type
    if arguments.bf16 and device in ("cpu", "cuda") and not has_bfloat16(device):
        kept = recipe.training.precision == "auto"
        reason = f"{recipe.training.output} began in it" if kept else "the recipe asks for it; expected auto or float32"
        text = f"training.precision=bfloat16 is many times slower than float32 on this {device}"
        say(f"{text}: {reason}", enabled=main)


def _memory(
    recipe: Recipe, config: ThoughtbubblesConfig, data: RunData, arguments: TrainingArguments
) -> TrainingMemory:
    micro = arguments.per_device_train_batch_size
    precision, processes = _precision(arguments), arguments.world_size
    return TrainingMemory(recipe, config, data.longest, micro, precision, processes, arguments.device)


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


def build_config(recipe: Recipe, data: RunData) -> ThoughtbubblesConfig:
    """The model's configuration, completed from its data, and the data's tokenizer from it, so that both can be saved.

    Raises:
        InputError: for a bad model field, a vocabulary smaller than the data's, a row of data longer than the
            longest of the model, or a budget of the recipe that the model cannot have.
    """
    tokenizer = data.tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    start, ends = start_document(tokenizer), document_ends(tokenizer)
    ids = {
        "bos_token_id": start[-1] if start else None,
        "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None),
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = model_config(recipe, {"vocab_size": data.vocab_size, **ids}, data.longest)
    for name, token in ids.items():
        if getattr(config, name) is None:
            setattr(config, name, token)
    if (pretrained := recipe.model.get("pretrained")) is not None:
        check_tokenizer(pretrained, tokenizer, data.source)
    check_rows(config, data.vocab_size, data.longest, data.source)
    for field in ("training_budgets", "eval_budgets"):
        for budget in getattr(recipe.training, field) or []:
            try:
                config.exact_budget(budget)
            except ValueError as error:
                raise RecipeError(f"training.{field}: {error}") from None
    return config


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
        from thoughtbubbles.training.pretrained import gate_changes, start_from

        if changes := str(gate_changes(pretrained, config)):
            say(f"model.pretrained={pretrained}: {changes}", progress)
        model = start_from(pretrained, config)
    if recipe.training.gradient_checkpointing:
        # transformers 5.23 renamed it, 5.17 knows the older name alone.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    return model


def build_trainer(
    recipe: Recipe,
    model: ThoughtbubblesForCausalLM,
    data: RunData,
    arguments: TrainingArguments,
    checkpoint: Checkpoint | None = None,
    stop: StopRequest | None = None,
    progress: bool = False,
    more: Sequence[TrainerCallback] = (),
    folder: RunFolder | None = None,
) -> BubbleTrainer:
    """The Trainer of a run with its callbacks, and `more` of them."""
    output = Path(recipe.training.output)
    folder = folder or RunFolder(output, recipe, {}, begun=True)
    callbacks: list[TrainerCallback] = [_Beginning(folder), MetricsWriter(output / METRICS_NAME), *more]
    if progress:
        callbacks.append(ProgressDisplay(output.name))
    if checkpoint is not None and not _was_evaluated(output, checkpoint.step, recipe.training.eval_every):
        # A signal came during that evaluation.
        arguments.eval_on_start = True
    if "tensorboard" in recipe.training.report_to:
        callbacks.append(_Tensorboard(output / "tensorboard", 1 if checkpoint is None else checkpoint.step + 1))
    stop = stop or StopRequest()
    return BubbleTrainer(recipe, model, data, arguments, checkpoint, stop, callbacks, folder.begin)


class _Beginning(TrainerCallback):
    """Lets a run begin for good when its first step is taken."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called after each step, before anything of it is written."""
        self._folder.begin()


def _was_evaluated(output: Path, step: int, every: int) -> bool:
    if step % every:
        return True
    return any("eval_loss" in row for row in read_metrics(output / METRICS_NAME) if row["step"] == step)


class _Tensorboard(TrainerCallback):
    """Reports to tensorboard, whose files are made with the first row.

    Args:
        folder: of the files.
        step: from which what an interrupted run wrote is not shown.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._folder = folder
        self._step = step
        self._callback: TensorBoardCallback | None = None

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called with each row."""
        if self._callback is None and state.is_world_process_zero:
            from torch.utils.tensorboard import SummaryWriter

            self._callback = TensorBoardCallback(SummaryWriter(str(self._folder), purge_step=self._step))
        if self._callback is not None:
            self._callback.on_log(args, state, control, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the files."""
        if self._callback is not None:
            self._callback.on_train_end(args, state, control, **kwargs)


def build_arguments(recipe: Recipe, output: Path) -> TrainingArguments:
    """The Trainer's arguments.

    Raises:
        RecipeError: if the processes cannot share the batch, or would score benchmarks with a share of the model.
    """
    settings = recipe.training
    arguments = TrainingArguments(
        output_dir=str(output / CHECKPOINTS_NAME),
        max_steps=settings.steps,
        optim="adamw_torch_fused",
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        adam_beta1=0.9,
        adam_beta2=0.95,
        max_grad_norm=settings.max_grad_norm,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={
            "num_decay_steps": round(settings.decay_fraction * settings.steps),
            "decay_type": "linear",
        },
        warmup_steps=round(settings.warmup_fraction * settings.steps),
        bf16=_decide_precision(recipe, output) == "bfloat16",
        use_cpu=not torch.accelerator.is_available(),
        logging_strategy="steps",
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=settings.eval_every,
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=settings.save_every,
        ignore_data_skip=True,  # the data begins where the run stands
        seed=settings.seed,
        run_name=str(output),
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        report_to=[name for name in settings.report_to if name != "tensorboard"],
        log_level="error",
    )
    # A process uses one device; torchrun starts more.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    if settings.compile == "whole" and settings.sharding == "fsdp" and arguments.world_size > 1:
        raise RecipeError(
            "training.compile=whole: expected blocks with training.sharding=fsdp, whose weights are gathered between "
            "them"
        )
    if settings.eval_tasks is not None and settings.sharding == "fsdp" and arguments.world_size > 1:
        raise RecipeError(
            f"training.eval_tasks={settings.eval_tasks}: expected null with training.sharding=fsdp, where the process "
            "that scores does not hold the model"
        )
    micro, passes = check_batch(recipe, arguments.world_size)
    arguments.per_device_train_batch_size = arguments.per_device_eval_batch_size = micro
    arguments.gradient_accumulation_steps = passes
    return arguments


def _decide_precision(recipe: Recipe, output: Path) -> str:
    """What the run in a folder began in, or else what its recipe and this machine want."""
    if recipe.training.precision == "auto" and (output / RECIPE_NAME).exists():
        return str(read_facts(output)["precision"])
    return choose_precision(recipe.training.precision, device_type())


def _save_model(trainer: BubbleTrainer, output: Path, summary: RunSummary) -> None:
    main = trainer.is_world_process_zero()
    # In training texts are of any length: they are cut into blocks.
    trainer.data.tokenizer.model_max_length = trainer.config.max_position_embeddings
    with replacing(output / "model") if main else nullcontext(partial_path(output / "model")) as partial:
        trainer.save_model(str(partial))
        if main:
            (partial / "training_args.bin").unlink(missing_ok=True)
            write_model_card(partial, trainer.config, _card_facts(trainer, summary))


def _card_facts(trainer: BubbleTrainer, summary: RunSummary) -> dict[str, str]:
    leak = f" (leaks: {LEAK})" if summary.eval_leaks else ""
    pretrained = trainer.recipe.model.get("pretrained")
    return {
        "Task": trainer.recipe.task,
        **({} if pretrained is None else {"Started from": str(pretrained)}),
        # The folders' names alone: their paths are nobody's business where the card is read.
        "Data": ", ".join(Path(part).name for part in trainer.data.source.split(", ")),
        "Steps": f"{summary.steps:,}",
        "Tokens": f"{summary.tokens:,}",
        "Training FLOPs": f"{summary.training_flops:.3g}",
        "Validation loss": f"{summary.eval_loss:.4f} nats per token, perplexity {summary.eval_perplexity:.2f}{leak}",
        "Seed": str(trainer.recipe.training.seed),
    }


def _summarise(trainer: BubbleTrainer, metrics: dict[str, float]) -> RunSummary:
    config, steps = trainer.config, trainer.state.global_step
    return RunSummary(
        parameters=count_parameters(config),
        steps=steps,
        tokens=trainer.meter.tokens(steps),
        training_flops=trainer.meter.flops(steps),
        tokens_per_second=trainer.clock.mean_rate(trainer.meter.tokens(steps)),
        eval_loss=metrics["eval_loss"],
        eval_perplexity=metrics["eval_perplexity"],
        eval_losses={name: value for name, value in metrics.items() if name.startswith("eval_loss/")},
        eval_leaks=config.leaks,
        routing=config.routing,
        budget=str(config.exact_budget()),
    )
