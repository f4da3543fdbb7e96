"""The Trainer of transformers, made exact: order of the data, resumption, checkpoints, evaluation, what it logs."""

import errno
import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Sampler, Subset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_pt_utils import nested_gather

from thoughtbubbles.data.feed.rundata import Batch, Rows, RunData, Streamed, Validation
from thoughtbubbles.model.budget import Budget
from thoughtbubbles.model.loss import IGNORE_INDEX
from thoughtbubbles.model.modeling import ThoughtbubblesForCausalLM
from thoughtbubbles.recipes.training import Recipe
from thoughtbubbles.support.errors import RunError, RunInterrupted
from thoughtbubbles.support.files import partial_path, replacing, write_text
from thoughtbubbles.support.sampling import spread
from thoughtbubbles.support.signals import StopRequest, interrupted
from thoughtbubbles.training import states
from thoughtbubbles.training.callbacks import ThresholdCallback
from thoughtbubbles.training.checkpoints import PREFIX, Checkpoint, prune, seal, sealed
from thoughtbubbles.training.meter import Clock, ForkStatistics, Meter, budget_of_step, peak_memory
from thoughtbubbles.training.sharding import check_sharding, compile_model, divide, release, whole

LOSS_SUM_NAME = "loss_sum.json"
DIVERGED_NAME = "diverged.json"
# Perplexities beyond are not numbers in double precision.
MOST_NATS = 700.0


class BubbleTrainer(Trainer):
    """Trains as a recipe says, from the start or from a checkpoint.

    Args:
        arguments: of the Trainer, made from the recipe.
        checkpoint: to go on from.
        stop: says when a signal asks to stop.
        callbacks: beside its own.
        begin: called before a batch that made the loss overflow is written down; the run has begun then.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: ThoughtbubblesForCausalLM,
        data: RunData,
        arguments: TrainingArguments,
        checkpoint: Checkpoint | None,
        stop: StopRequest,
        callbacks: list[TrainerCallback],
        begin: Callable[[], None],
    ) -> None:
        self.recipe = recipe
        self.config = model.config
        self.data = data
        self.folder = Path(str(arguments.output_dir))
        self.checkpoint = checkpoint
        self.start = 0 if checkpoint is None else checkpoint.step
        self.stop = stop
        self._begin = begin
        if isinstance(data.samples, Streamed) and checkpoint is not None:
            data.samples.load(checkpoint.folder)
        self.meter = Meter(recipe, model.config, data.samples, arguments.per_device_train_batch_size)
        self.clock = Clock(self.meter.tokens(self.start))
        self.forks = ForkStatistics(model)
        self._routing_step = model.model.routing_step  # of the model itself, which the Trainer may wrap
        self._fork_figures: dict[str, float] = {}
        self._micro_losses: list[Tensor] = []
        self._evaluated: tuple[int, float] | None = None
        self._divided = recipe.training.sharding == "fsdp" and arguments.world_size > 1
        if self._divided:
            # Not left to accelerate: on CPUs it runs DDP instead, and it would divide the gates by themselves.
            divide(model, arguments.world_size, arguments.device.type, bool(arguments.bf16))
        self._compiled = recipe.training.compile != "none"
        if self._compiled:
            compile_model(model, recipe.training.compile)
        super().__init__(
            model=model,
            args=arguments,
            data_collator=data.collate,
            train_dataset=data.samples,
            eval_dataset=next(iter(data.validation.values())).rows,
            processing_class=data.tokenizer,
            callbacks=[
                *(_ShardingCheck(self), self.clock, _LossSum(self, checkpoint), ThresholdCallback()),
                *callbacks,
            ],
        )
        self.remove_callback(PrinterCallback)
        if self._divided:
            # Autocast alone; a model that is prepared is not wrapped for DDP later on.
            self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the parameters of two or more dimensions."""
        return [name for name, parameter in model.named_parameters() if parameter.dim() > 1]

    def get_train_dataloader(self) -> "DataLoader[Any]":
        """The samples that are left, in their order."""
        loader: DataLoader[Any] = DataLoader(
            self.data.samples,  # type: ignore[arg-type]  # a map-style dataset by its methods
            batch_size=self._train_batch_size,
            sampler=_From(self.start * self.recipe.training.batch_size, len(self.data.samples), self._order()),
            collate_fn=self.data.collate,
            pin_memory=self.args.dataloader_pin_memory,
            generator=torch.Generator(),  # its own, so that opening it draws nothing from the model's
        )
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared

    def _order(self) -> "Callable[[range], Iterator[int]]":
        """The order in which the processes, taking turns, take samples."""
        if not isinstance(self.data.samples, Streamed):
            return iter
        sharing = {"processes": self.args.world_size, "micro": self._train_batch_size}
        return partial(self.data.samples.shared, batch=self.recipe.training.batch_size, **sharing)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """A forward and backward pass, at the step's budget and draws, watched if its step will be logged."""
        settings, step = self.recipe.training, self.state.global_step + 1
        self._routing_step.fill_(step)
        if settings.training_budgets is not None:
            inputs = {**inputs, "budget": budget_of_step(settings.training_budgets, settings.seed, step)}
        inputs = {**inputs, "return_logits": False}
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if self._is_logged(step):
            self.forks.watch()
        self._micro_losses.append(loss)
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Clip; before that note what is logged, and stop if the step would spoil the weights."""
        if self.forks and self._is_logged(self.state.global_step + 1):
            self._fork_figures = {**self.forks.summary(), "gate_grad_norm": self.forks.gradient_norm()}
        norm = whole(super()._clip_grad_norm(model))
        if not math.isfinite(float(norm)):
            self._diverge(float(norm))
        self._micro_losses = []
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Hand on what the Trainer and the evaluations found, and what it cost."""
        if "loss" in logs:
            logs = {**logs, "perplexity": math.exp(min(logs["loss"], MOST_NATS)), **self._fork_figures}
            logs["tokens_per_second"] = self.clock.rate(self.meter.tokens(self.state.global_step))
            logs["peak_memory"] = peak_memory(self.args.device)
        elif "eval_loss" not in logs:
            return
        step = self.state.global_step
        super().log({"tokens": self.meter.tokens(step), "flops": self.meter.flops(step), **logs}, start_time)
        self.state.log_history.clear()  # metrics.jsonl has it; in every checkpoint it would grow without end

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measure on the way, and log it. A signal ends it: the next start begins with it."""
        try:
            metrics = self.measure(self.data.eval_rows)
        except RunInterrupted:
            self.control.should_save = self.control.should_training_stop = True
            return {}
        self._evaluated = (self.state.global_step, metrics["eval_loss"])
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def measure(self, rows: int | None) -> dict[str, float]:
        """Validation losses in nats per token, over `rows` of each set, evenly spaced.

        `eval_loss` and `eval_perplexity` at the model's own budget, the sets' losses weighted by their shares;
        `eval_loss/NAME` of each set where there are several; `eval_loss/budget_B` at each of `eval_budgets`.

        Raises:
            RunInterrupted: if a signal asks to stop.
            RunError: for a loss that is not finite.
        """
        own = {name: self._mean_loss(each, rows, None) for name, each in self.data.validation.items()}
        loss = self._weigh(own)
        metrics = {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, MOST_NATS))}
        if len(own) > 1:
            metrics |= {f"eval_loss/{name}": value for name, value in own.items()}
        for budget in self.recipe.training.eval_budgets or []:
            losses = {name: self._mean_loss(each, rows, budget) for name, each in self.data.validation.items()}
            metrics[f"eval_loss/budget_{budget}"] = self._weigh(losses)
        return metrics

    def _weigh(self, losses: dict[str, float]) -> float:
        return sum(self.data.validation[name].weight * loss for name, loss in losses.items())

    @torch.no_grad()
    def _mean_loss(self, validation: Validation, rows: int | None, budget: Budget | None) -> float:
        """Mean over all targets, each process measuring its share of the rows."""
        model = self.model
        assert model is not None
        was_training = model.training
        model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        for batch in self._eval_batches(validation.rows, rows):
            if self.stop.requested and self.args.world_size == 1:
                raise interrupted(self.stop, self.state.global_step)
            inputs = self._prepare_inputs(batch)
            with self.accelerator.autocast():
                loss = model(**inputs, budget=budget, num_items_in_batch=1, return_logits=False).loss
            targets = inputs["labels"][:, 1:] != IGNORE_INDEX
            sums += torch.stack([loss.double(), targets.sum().double()])
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        model.train(was_training)
        release(model)
        total, targets = self.accelerator.reduce(sums, "sum").tolist()
        if not math.isfinite(total):
            raise RunError(
                f"evaluation after step {self.state.global_step}: the loss is {total}, expected a finite number"
            )
        return total / targets if targets else math.nan

    def _eval_batches(self, validation: Rows, rows: int | None) -> Iterator[Batch]:
        """The batches of this process.

        A divided model needs as many on all processes, and a compiled one wants all of one shape: they are filled up
        with a row that has no targets.
        """
        picked, size = spread(len(validation), rows), self.args.per_device_eval_batch_size
        ours = picked[self.args.process_index :: self.args.world_size]
        filled = 0
        if self._divided or self._compiled:
            filled = math.ceil(len(picked) / (size * self.args.world_size)) * size - len(ours)
        loader: DataLoader[Any] = DataLoader(
            Subset(validation, [*ours, *picked[:1] * filled]),  # type: ignore[arg-type]
            batch_size=size,
            collate_fn=self.data.collate,
            generator=torch.Generator(),
        )
        for number, batch in enumerate(loader):
            batch["labels"][max(0, len(ours) - number * size) :] = IGNORE_INDEX
            yield batch

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """After a step: if a signal asks to stop, save and stop."""
        if self._must_stop():
            self.control.should_save = self.control.should_training_stop = True
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _must_stop(self) -> bool:
        """Whether any process was asked to stop: all have to stop after the same step."""
        if self.args.world_size == 1:
            return self.stop.requested
        asked = torch.tensor(float(self.stop.requested), device=self.args.device)
        return bool(self.accelerator.reduce(asked, "sum").item())

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint under a temporary name, seal it, rename it, prune the old ones."""
        folder, step = self.folder, self.state.global_step
        target = folder / f"{PREFIX}{step}"
        loss_sum = nested_gather(self._tr_loss, self.args.parallel_mode).mean().item()
        main = self.is_world_process_zero()
        with replacing(target) if main else nullcontext(partial_path(target)) as partial:
            # Before others write there the first process has removed what was there.
            self.accelerator.wait_for_everyone()
            try:
                self._write_checkpoint(model, trial, partial)
                self.accelerator.wait_for_everyone()
                if main:
                    self._complete(partial, loss_sum)
            except Exception as error:
                if is_disk_full(error, folder):
                    raise disk_full(folder) from error
                raise
        if main:
            prune(folder, self.recipe.training.keep_checkpoints)

    def _write_checkpoint(self, model: nn.Module, trial: Any, partial: Path) -> None:
        """The Trainer's own checkpoint, in a folder of `partial` that it names itself."""
        folder = self.args.output_dir
        self.args.output_dir = str(partial)
        try:
            super()._save_checkpoint(model, trial)
            if isinstance(self.data.samples, Streamed):
                samples = self.state.global_step * self.recipe.training.batch_size
                self.data.samples.save(partial, samples, self.is_world_process_zero())
        finally:
            self.args.output_dir = folder

    def _complete(self, partial: Path, loss_sum: float) -> None:
        """Move the files up to where they belong, add ours, seal."""
        step = self.state.global_step
        inner = partial / f"{PREFIX}{step}"
        for entry in inner.iterdir():
            entry.rename(partial / entry.name)
        inner.rmdir()
        (partial / "training_args.bin").unlink(missing_ok=True)  # paths of this machine, not needed to go on
        content = {"loss_sum": loss_sum, "last_logged": self._globalstep_last_logged}
        write_text(partial / LOSS_SUM_NAME, json.dumps(content))
        evaluated = self._evaluated
        seal(partial, step, evaluated[1] if evaluated and evaluated[0] == step else None)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model for others to load. The checkpoint of a divided one holds its weights in another form."""
        if not self._divided:
            super().save_model(output_dir, _internal_call)
        elif not _internal_call:
            self._save(output_dir, state_dict=states.whole_weights(self._bare_model))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """A divided model goes with its moments: each process writes its share of both."""
        if not self._divided:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        states.save_sharded(Path(output_dir), self._bare_model, self._bare_optimizer)
        assert self.lr_scheduler is not None
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load weights, whole or divided, into a model that is whole or divided."""
        checkpoint = Path(resume_from_checkpoint)
        if states.is_sharded(checkpoint):
            states.load_sharded_weights(checkpoint, self._bare_model)
        elif self._divided:
            states.divide_whole_weights(checkpoint, self._bare_model)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The same of moments; the schedule is stored alike."""
        folder = Path(checkpoint or "")
        if checkpoint is None or not (self._divided or states.is_sharded(folder)):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        assert self.lr_scheduler is not None
        load = states.load_sharded_moments if states.is_sharded(folder) else states.divide_whole_moments
        load(folder, self._bare_model, self._bare_optimizer)
        self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))
        for group, rate in zip(self._bare_optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """A divided model is there already."""
        if not self._divided:
            super()._move_model_to_device(model, device)

    @property
    def _bare_model(self) -> ThoughtbubblesForCausalLM:
        """The model without what wraps it."""
        assert isinstance(self.model, ThoughtbubblesForCausalLM)
        return self.model

    @property
    def _bare_optimizer(self) -> Optimizer:
        """The optimizer without accelerate's wrapping."""
        optimizer: Any = self.optimizer
        bare: Optimizer = getattr(optimizer, "optimizer", optimizer)
        return bare

    def _is_logged(self, step: int) -> bool:
        return step % self.recipe.training.log_every == 0

    def _diverge(self, norm: float) -> None:
        """Say which batch made the loss or its gradient overflow, and stop before it reaches the weights."""
        step, settings = self.state.global_step + 1, self.recipe.training
        samples = range((step - 1) * settings.batch_size, step * settings.batch_size)
        budgets = settings.training_budgets
        loss = sum(float(loss) for loss in self._micro_losses)
        content = {
            "step": step,
            "loss": str(loss),
            "grad_norm": str(norm),
            "budget": None if budgets is None else str(budget_of_step(budgets, settings.seed, step)),
            "samples": {index: self.data.samples.describe(index) for index in samples},
        }
        path = self.folder.parent / DIVERGED_NAME
        if self.is_world_process_zero():
            self._begin()
            write_text(path, json.dumps(content, indent=2) + "\n")
        raise RunError(
            f"step {step}: loss {loss:.4g}, gradient norm {norm:.4g}: stopped before the update. "
            f"The batch is in {path}; {last_checkpoint(self.folder)}"
        )


class _From(Sampler[int]):
    """Samples from `first` on; its length counts those before too, as the Trainer counts its steps."""

    def __init__(self, first: int, total: int, order: Callable[[range], Iterator[int]]) -> None:
        self._first, self._total, self._order = first, total, order

    def __iter__(self) -> Iterator[int]:
        return self._order(range(self._first, self._total))

    def __len__(self) -> int:
        return self._total


class _ShardingCheck(TrainerCallback):
    """Refuses to train a model that is not shared as the recipe says."""

    def __init__(self, trainer: BubbleTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: TrainingArguments, *_: Any, **__: Any) -> None:
        """Called when the Trainer has wrapped the model."""
        check_sharding(self._trainer.model_wrapped, self._trainer.recipe.training.sharding, args.world_size)


class _LossSum(TrainerCallback):
    """Gives a resumed Trainer the losses since the last logged step, which it forgets: its next row needs them."""

    def __init__(self, trainer: BubbleTrainer, checkpoint: Checkpoint | None) -> None:
        self._trainer = trainer
        self._checkpoint = checkpoint

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Called after the Trainer has set both to nothing."""
        if self._checkpoint is not None:
            content = json.loads((self._checkpoint.folder / LOSS_SUM_NAME).read_text(encoding="utf-8"))
            self._trainer._tr_loss.fill_(content["loss_sum"])
            self._trainer._globalstep_last_logged = content["last_logged"]


def is_disk_full(error: BaseException, folder: Path) -> bool:
    """Whether an error says, or hides, that no space is left: some libraries raise a bare RuntimeError for it."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return "No space left" in str(error) or (folder.exists() and shutil.disk_usage(folder).free < 1 << 16)


def disk_full(folder: Path) -> RunError:
    """What to say then."""
    return RunError(f"no space left on the disk of {folder}; {last_checkpoint(folder)}")


def last_checkpoint(folder: Path) -> str:
    """From where the next start goes on, in words."""
    found = sealed(folder)
    return f"the last checkpoint is {found[-1].folder}" if found else "there is no checkpoint yet"
