"""A training run: from a recipe to metrics, checkpoints and a trained model (Design 5.2)."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import yaml
from transformers import TrainerCallback, TrainingArguments, set_seed
from transformers.utils import logging as transformers_logging

from thoughtbubbles.accounting import count_parameters
from thoughtbubbles.configuration import ThoughtbubblesConfig
from thoughtbubbles.files import partial_path, replacing, sole_user, write_text
from thoughtbubbles.loading import check_tokenizer
from thoughtbubbles.machine import describe_machine
from thoughtbubbles.modeling import ThoughtbubblesForCausalLM
from thoughtbubbles.progress import say
from thoughtbubbles.sharing import write_model_card
from thoughtbubbles.training.callbacks import MetricsWriter, ProgressDisplay, read_metrics
from thoughtbubbles.training.checkpoints import Checkpoint, clear_leavings, newest_sound
from thoughtbubbles.training.interruption import StopRequest, interrupted, stop_on_signals
from thoughtbubbles.training.pretrained import gate_changes, start_from
from thoughtbubbles.training.recipe import Recipe, RecipeError, check_rows, differences, load_recipe, model_config
from thoughtbubbles.training.rundata import RunData, check_batch, load_run_data
from thoughtbubbles.training.trainer import BubbleTrainer, disk_full, is_disk_full

SUMMARY_NAME = "summary.json"
RECIPE_NAME = "recipe.yaml"
METRICS_NAME = "metrics.jsonl"
RUN_NAME = "run.json"
LOCK_NAME = ".lock"
CHECKPOINTS_NAME = "checkpoints"
LIBRARIES = ("accelerate", "datasets", "numpy")


@dataclass(frozen=True)
class RunSummary:
    """What a finished run came to; summary.json in its folder.

    Attributes:
        parameters: of the model, a tied embedding counted once.
        steps: optimizer steps.
        tokens: seen in training.
        training_flops: by `thoughtbubbles.accounting`.
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
        """Read the summary of a finished run."""
        return cls(**json.loads((folder / SUMMARY_NAME).read_text(encoding="utf-8")))


def train(
    recipe: Recipe, progress: bool = True, callbacks: Sequence[TrainerCallback] = (), verify: bool = False
) -> RunSummary:
    """Train a model as a recipe says, or go on with a run that was interrupted.

    Leaves in `training.output`: recipe.yaml (every default spelled out), run.json (the data's identity, the commit,
    the machine and the libraries' versions), metrics.jsonl, checkpoints/, model/ (the trained model and its tokenizer)
    and, last, summary.json. If the folder holds an unfinished run of this recipe, it goes on from its newest sound
    checkpoint, and its metrics are those of a run that was never interrupted; a finished one is returned as it is.

    SIGTERM, SIGUSR1 and Ctrl-C save a checkpoint and stop.

    Args:
        progress: show progress on standard error.
        callbacks: of the Trainer, beside those of every run.
        verify: check prepared data whole, whatever their size and however often it was done.

    Raises:
        InputError: for data or model fields that cannot be used, or an output folder that holds something else, a
            run of another recipe or on other data, or a run that another process is at.
        RunError: if the disk is full, or the loss or its gradient is not finite.
        RunInterrupted: after a signal, when everything is saved.
    """
    output = Path(recipe.training.output)
    arguments = build_arguments(recipe, output)
    main = arguments.process_index == 0
    progress = progress and main
    data = load_run_data(recipe, progress, verify)
    config = build_config(recipe, data)
    with stop_on_signals() as stop, _opened(recipe, data, output, arguments) as finished, _full_disk_said(output):
        if finished is not None:
            say(f"{output} holds a finished run of this recipe: nothing to do", progress)
            return finished
        checkpoint = newest_sound(output / CHECKPOINTS_NAME, warn=lambda text: say(text, enabled=main))
        if checkpoint is not None:
            say(f"{output}: going on after step {checkpoint.step} of {recipe.training.steps}", progress)
        if recipe.training.sharding == "fsdp" and arguments.world_size == 1:
            say("training.sharding=fsdp: one process holds everything", progress)
        transformers_logging.disable_progress_bar()
        set_seed(recipe.training.seed)
        model = build_model(recipe, config, progress and checkpoint is None)
        trainer = build_trainer(recipe, model, data, arguments, checkpoint, stop, progress, callbacks)
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
def _opened(recipe: Recipe, data: RunData, output: Path, arguments: TrainingArguments) -> Iterator[RunSummary | None]:
    """The folder, made ready for the run and locked while it lasts; the summary if it holds the finished run."""
    stored = output / RECIPE_NAME
    if arguments.process_index > 0:
        torch.distributed.barrier()
        yield RunSummary.read(output) if (output / SUMMARY_NAME).exists() else None
        return
    if not stored.exists() and output.exists() and any(path.name != LOCK_NAME for path in output.iterdir()):
        raise RecipeError(f"training.output={output}: expected an empty or new folder, or that of a run to go on with")
    output.mkdir(parents=True, exist_ok=True)
    with sole_user(output / LOCK_NAME) as alone:
        if not alone:
            raise RecipeError(f"training.output={output} is in use by another run: expected a folder of its own")
        if stored.exists():
            check_same_run(recipe, data, output)
        else:
            facts = {"data": data.identity, **describe_machine(arguments.device.type)}
            versions = {library: version(library) for library in LIBRARIES}
            write_text(output / RUN_NAME, json.dumps({**facts, **versions}, indent=2) + "\n")
            write_text(stored, recipe.to_yaml())
        (output / CHECKPOINTS_NAME).mkdir(exist_ok=True)
        clear_leavings(output / CHECKPOINTS_NAME)
        if arguments.world_size > 1:
            torch.distributed.barrier()
        yield RunSummary.read(output) if (output / SUMMARY_NAME).exists() else None


def check_same_run(recipe: Recipe, data: RunData, output: Path) -> None:
    """Refuse to go on with the run in the folder `output` if it is of another recipe or on other data.

    Raises:
        RecipeError: saying what differs.
    """
    # Read as a recipe, so that a key that came into being since has its default.
    stored, ours = (yaml.safe_load(each.to_yaml()) for each in (load_recipe(output / RECIPE_NAME), recipe))
    for key in ("output", "sharding"):  # a run may be moved, and shared otherwise
        ours["training"][key] = stored["training"][key]
    if changed := list(differences(stored, ours)):
        raise RecipeError(f"training.output={output} holds a run of another recipe: {'; '.join(changed)}")
    if json.loads((output / RUN_NAME).read_text(encoding="utf-8"))["data"] != data.identity:
        raise RecipeError(
            f"training.output={output} holds a run on other data: {data.source} has changed since, expected "
            "another output"
        )


@contextmanager
def _full_disk_said(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if is_disk_full(error, output):
            raise disk_full(output / CHECKPOINTS_NAME) from error
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
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = model_config(recipe, {"vocab_size": data.vocab_size, **ids}, data.longest)
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
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
) -> BubbleTrainer:
    """The Trainer of a run with its callbacks, and `more` of them."""
    output = Path(recipe.training.output)
    callbacks: list[TrainerCallback] = [MetricsWriter(output / METRICS_NAME), *more]
    if progress:
        callbacks.append(ProgressDisplay(output.name))
    if checkpoint is not None and not _was_evaluated(output, checkpoint.step, recipe.training.eval_every):
        # A signal came during that evaluation.
        arguments.eval_on_start = True
    if "tensorboard" in recipe.training.report_to:
        callbacks.append(_tensorboard(output, 0 if checkpoint is None else checkpoint.step))
    return BubbleTrainer(recipe, model, data, arguments, checkpoint, stop or StopRequest(), callbacks)


def _was_evaluated(output: Path, step: int, every: int) -> bool:
    if step % every:
        return True
    return any("eval_loss" in row for row in read_metrics(output / METRICS_NAME) if row["step"] == step)


def _tensorboard(output: Path, step: int) -> TrainerCallback:
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations.integration_utils import TensorBoardCallback

    # What an interrupted run wrote after its last checkpoint is not shown.
    return TensorBoardCallback(SummaryWriter(str(output / "tensorboard"), purge_step=step + 1))


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
        bf16=settings.precision == "bfloat16" or (settings.precision == "auto" and _gpu_has_bfloat16()),
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


def _gpu_has_bfloat16() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


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
    leak = " (leaks: topk routing sees later tokens)" if summary.eval_leaks else ""
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
        eval_leaks=config.routing == "topk",
        routing=config.routing,
        budget=str(config.exact_budget()),
    )
