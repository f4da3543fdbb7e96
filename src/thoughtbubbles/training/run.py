"""A training run: from a recipe to metrics, checkpoints and a trained model (Design 5.2)."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging as transformers_logging

from thoughtbubbles.accounting import count_parameters, training_flops
from thoughtbubbles.configuration import ThoughtbubblesConfig
from thoughtbubbles.data import PreparedData, load_prepared
from thoughtbubbles.files import replacing, write_text
from thoughtbubbles.modeling import IGNORE_INDEX, ThoughtbubblesForCausalLM
from thoughtbubbles.training.callbacks import MetricsWriter, ProgressDisplay
from thoughtbubbles.training.recipe import Recipe, RecipeError, TrainingSection

if TYPE_CHECKING:
    from datasets import Dataset

SUMMARY_NAME = "summary.json"
RECIPE_NAME = "recipe.yaml"
METRICS_NAME = "metrics.jsonl"


@dataclass(frozen=True)
class RunSummary:
    """What a finished run came to; summary.json in its folder.

    Attributes:
        parameters: of the model, a tied embedding counted once.
        steps: optimizer steps.
        tokens: seen in training.
        training_flops: by `thoughtbubbles.accounting`.
        tokens_per_second: in training, evaluations and checkpoints left out, since the last start.
        eval_loss: nats per token, one forward a block, over all validation blocks or `data.final_eval_blocks`.
        eval_perplexity: exp of it.
        eval_leaks: whether that loss is not the likelihood of a left-to-right model (routing `topk`).
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


def train(recipe: Recipe, resume: bool = False, progress: bool = True) -> RunSummary:
    """Train a model as a recipe says.

    Leaves in `training.output`: recipe.yaml (every default spelled out), metrics.jsonl, checkpoints/, model/ (the
    trained model and its tokenizer) and, last, summary.json.

    Args:
        resume: go on from the last checkpoint; a finished run is returned as it is.
        progress: show progress on standard error.

    Raises:
        InputError: for data or model fields that cannot be used, an output folder that holds a run (without
            `resume`), or a run of another recipe (with it).
    """
    data = load_prepared(recipe.data.path)
    config = build_config(recipe, data)
    _check_enough_blocks(recipe, data)
    output = Path(recipe.training.output)
    if not _open_output(recipe, output, resume):
        return RunSummary.read(output)
    transformers_logging.disable_progress_bar()
    set_seed(recipe.training.seed)
    model = ThoughtbubblesForCausalLM(config)
    if recipe.training.gradient_checkpointing:
        # transformers 5.23 renamed it, 5.17 knows the older name alone.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    trainer, metrics = _build_trainer(recipe, model, data, output, progress)
    try:
        trainer.train(resume_from_checkpoint=get_last_checkpoint(str(output / "checkpoints")) if resume else None)
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressDisplay):
                callback.close()
    _save_model(trainer, output)
    summary = _summarise(config, trainer, _first(data.validation, recipe.data.final_eval_blocks), metrics)
    summary.write(output)
    return summary


def build_config(recipe: Recipe, data: PreparedData) -> ThoughtbubblesConfig:
    """The model's configuration, completed from its data.

    Raises:
        RecipeError: for a bad model field, a vocabulary smaller than the data's, or a block longer than the
            longest row of the model.
    """
    manifest = data.manifest
    tokenizer = data.tokenizer()
    fields = {
        "vocab_size": manifest.vocab_size,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **recipe.model,
    }
    preset = fields.pop("preset", None)
    if preset is None:
        fields.setdefault("max_position_embeddings", manifest.block_size)
    try:
        config = ThoughtbubblesConfig.preset(preset, **fields) if preset else ThoughtbubblesConfig(**fields)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"model.{error}") from None
    for field, needed in (("vocab_size", manifest.vocab_size), ("max_position_embeddings", manifest.block_size)):
        if getattr(config, field) < needed:
            raise RecipeError(f"model.{field}={getattr(config, field)}: expected at least {needed}, as in {data.path}")
    return config


def _check_enough_blocks(recipe: Recipe, data: PreparedData) -> None:
    if len(data.train) < recipe.training.batch_size:
        raise RecipeError(
            f"training.batch_size={recipe.training.batch_size}: expected at most the {len(data.train)} train blocks "
            f"of {data.path}"
        )


def _open_output(recipe: Recipe, output: Path, resume: bool) -> bool:
    """Make the folder ready for a run; False if it holds a finished one to return."""
    stored = output / RECIPE_NAME
    if not stored.exists():
        if output.exists() and any(output.iterdir()):
            raise RecipeError(f"training.output={output}: expected an empty or new folder, or that of a run to resume")
        output.mkdir(parents=True, exist_ok=True)
        write_text(stored, recipe.to_yaml())
        return True
    if not resume:
        raise RecipeError(f"training.output={output} holds a run: resume it with --resume, or choose another folder")
    if (text := stored.read_text(encoding="utf-8")) != recipe.to_yaml():
        lines = zip(text.splitlines(), recipe.to_yaml().splitlines(), strict=False)
        changed = next((f"{old.strip()!r} is now {new.strip()!r}" for old, new in lines if old != new), "keys differ")
        raise RecipeError(f"training.output={output} holds a run of another recipe: {changed}")
    return not (output / SUMMARY_NAME).exists()


class _Trainer(Trainer):
    """The Trainer with weight decay on matrices alone."""

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Names of the parameters of two or more dimensions."""
        return [name for name, parameter in model.named_parameters() if parameter.dim() > 1]


def _build_trainer(
    recipe: Recipe, model: ThoughtbubblesForCausalLM, data: PreparedData, output: Path, progress: bool
) -> tuple[Trainer, MetricsWriter]:
    config, settings = model.config, recipe.training
    block = data.manifest.block_size
    flops = settings.batch_size * training_flops(config, block)
    metrics = MetricsWriter(output / METRICS_NAME, settings.batch_size * block, flops)
    callbacks: list[TrainerCallback] = [metrics]
    if progress:
        callbacks.append(ProgressDisplay(output.name))
    trainer = _Trainer(
        model=model,
        args=_arguments(settings, output),
        data_collator=collate_blocks,
        train_dataset=_whole_batches(data, settings.batch_size),
        eval_dataset=_first(data.validation, recipe.data.eval_blocks),
        processing_class=data.tokenizer(),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, metrics


def _whole_batches(data: PreparedData, batch_size: int) -> "Dataset":
    """The train blocks but for the few at the end that would make a smaller batch in every epoch."""
    return data.train.select(range(len(data.train) // batch_size * batch_size))


def _first(blocks: "Dataset", count: int | None) -> "Dataset":
    return blocks if count is None else blocks.select(range(min(count, len(blocks))))


def _arguments(settings: TrainingSection, output: Path) -> TrainingArguments:
    warmup = round(settings.warmup_fraction * settings.steps)
    return TrainingArguments(
        output_dir=str(output / "checkpoints"),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
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
        warmup_steps=warmup,
        logging_strategy="steps",
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=settings.eval_every,
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=settings.save_every,
        save_total_limit=settings.keep_checkpoints,
        seed=settings.seed,
        # The order of the blocks then depends on the seed alone, not on how many random numbers a model's
        # initialisation drew: variants of one seed see the same data.
        data_seed=settings.seed,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        report_to="none",
        log_level="error",
    )


def collate_blocks(blocks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack blocks into a batch {"input_ids", "labels"}, both [B, T] int64.

    The first token of a block is nobody's target: marked as such, it is not counted in the loss's denominator.
    """
    input_ids = torch.stack([block["input_ids"] for block in blocks])
    labels = input_ids.clone()
    labels[:, 0] = IGNORE_INDEX
    return {"input_ids": input_ids, "labels": labels}


def _save_model(trainer: Trainer, output: Path) -> None:
    with replacing(output / "model") as partial:
        trainer.save_model(str(partial))
        (partial / "training_args.bin").unlink(missing_ok=True)


def _summarise(config: ThoughtbubblesConfig, trainer: Trainer, blocks: "Dataset", metrics: MetricsWriter) -> RunSummary:
    steps = trainer.state.global_step
    done = steps - metrics.first_step
    loss = trainer.evaluate(blocks, metric_key_prefix="final")["final_loss"]
    return RunSummary(
        parameters=count_parameters(config),
        steps=steps,
        tokens=steps * metrics.tokens_per_step,
        training_flops=steps * metrics.flops_per_step,
        tokens_per_second=done * metrics.tokens_per_step / metrics.train_seconds if done else 0.0,
        eval_loss=loss,
        eval_perplexity=math.exp(loss),
        eval_leaks=config.routing == "topk",
        routing=config.routing,
        budget=str(config.exact_budget()),
    )
