"""The training loop: steps, evaluations, rows of metrics, checkpoints, from the start or from a checkpoint.

Nothing is read back from the device but at steps that log, evaluate or save.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from thoughtbubbles.data.feed.rundata import Batch, RunData, Streamed
from thoughtbubbles.model.loss import IGNORE_INDEX
from thoughtbubbles.model.modeling import ThoughtbubblesForCausalLM
from thoughtbubbles.model.threshold import update_thresholds
from thoughtbubbles.recipes.training import Recipe
from thoughtbubbles.support.errors import RunError, RunInterrupted, is_disk_full
from thoughtbubbles.support.files import write_text
from thoughtbubbles.support.machine import measured_peak
from thoughtbubbles.support.signals import StopRequest, interrupted
from thoughtbubbles.training.checkpoints import PREFIX, Checkpoint, disk_full, last_checkpoint, prune, seal
from thoughtbubbles.training.folder import CHECKPOINTS_NAME, DIVERGED_NAME
from thoughtbubbles.training.forks import ForkStatistics
from thoughtbubbles.training.meter import Clock, Meter, peak_memory, training_budget
from thoughtbubbles.training.optimizer import add_adapters, build_optimizer, freeze, rate_of_step
from thoughtbubbles.training.session import Callback, Session
from thoughtbubbles.training.sharding import compile_model, divide, whole
from thoughtbubbles.training.states import load_draws, load_state, save_draws, save_state
from thoughtbubbles.training.validation import MOST_NATS, measure

LOSS_SUM_NAME = "loss_sum.json"


class Loop(Session):
    """Trains as a recipe says.

    Args:
        checkpoint: to go on from.
        begin: called after each step: the run has begun then.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: ThoughtbubblesForCausalLM,
        data: RunData,
        state: PartialState,
        precision: str,
        checkpoint: Checkpoint | None = None,
        stop: StopRequest | None = None,
        callbacks: Sequence[Callback] = (),
        begin: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(recipe, model, data, state, precision, stop or StopRequest(), callbacks)
        self.checkpoint, self.begin, settings = checkpoint, begin, recipe.training
        self.folder = Path(settings.output) / CHECKPOINTS_NAME
        self.step = 0 if checkpoint is None else checkpoint.step
        # Before the model takes its memory.
        self._peak = settings.peak_flops or measured_peak(self.device, precision == "bfloat16")
        self.meter = Meter(recipe, model.config, data.samples, self.micro_batch_size)
        self.clock = Clock(self.meter.tokens(self.step), self.meter.flops(self.step))
        self.adapted = None if settings.lora is None else add_adapters(model, settings.lora)
        freeze(model, settings.freeze)
        self.forks = ForkStatistics(model)
        self._wrapped = self._place()
        self.optimizer = build_optimizer(model, settings)
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._loss_sum, self._last_logged = torch.zeros((), device=self.device), self.step
        self._diverged = torch.zeros(3, device=self.device)  # step, loss and gradient norm of the first bad one
        self._targets = torch.zeros((), dtype=torch.int64, device=self.device)
        self._norm = self._loss_sum
        self._eval_losses: dict[int, float] = {}
        # Signals reach processes, not devices: what they say of them to each other does not wait for a GPU.
        self._talk = torch.distributed.new_group(backend="gloo") if state.num_processes > 1 else None

    def _place(self) -> nn.Module:
        """Put the model on the device, divided, compiled and wrapped as the recipe says."""
        count, device = self.state.num_processes, self.device
        if self.divided:
            divide(self.model, count, device.type, self.precision == "bfloat16")
        else:
            self.model.to(device)
        if self.compiled:
            compile_model(self.model, self.recipe.training.compile)
        if count == 1 or self.divided:
            return self.model
        return DistributedDataParallel(self.model, device_ids=[device] if device.type == "cuda" else None)

    def train(self, evaluate_first: bool = False) -> dict[str, float]:
        """Train to the end; the validation losses there, as `measure` gives them.

        Args:
            evaluate_first: a signal came during the evaluation at the checkpoint that this goes on from.

        Raises:
            RunError: for a loss or a gradient that is not finite, or a full disk.
            RunInterrupted: after a signal, when everything is saved.
        """
        settings = self.recipe.training
        self._load()
        self.tell("on_begin")
        try:
            going = not evaluate_first or self._evaluate()
            batches = self.batches()
            while going and self.step < self.steps:
                self.clock.start()
                self.tell("on_step_begin")
                self._take_step(batches)
                self.begin()
                self.tell("on_step_end")
                going = not self._must_stop()
                intervals = settings.log_every, settings.eval_every, settings.save_every
                log, evaluate, save = (self.step % interval == 0 for interval in intervals)
                save = save or not going or self.step == self.steps
                if log or evaluate or save:
                    self._check_finite()
                    self.clock.stop()
                if log:
                    self._log()
                if evaluate:
                    going = self._evaluate() and going
                if save or not going:
                    self._save()
            if not going and self.step < self.steps:
                raise interrupted(self.stop, self.step)
            return measure(self, self.data.final_eval_rows)
        finally:
            self.tell("on_end")

    def batches(self) -> Iterator[Batch]:
        """The micro-batches of this process that are left, in their order: processes take turns."""
        samples, micro, state = self.data.samples, self.micro_batch_size, self.state
        batch = self.recipe.training.batch_size
        left = range(self.step * batch, len(samples))
        order = iter(left)
        if isinstance(samples, Streamed):
            order = samples.shared(left, batch=batch, processes=state.num_processes, micro=micro)
        turns = iter(lambda: list(islice(order, micro)), [])
        loader: DataLoader[Any] = DataLoader(
            samples,  # type: ignore[arg-type]  # a map-style dataset by its methods
            batch_sampler=islice(turns, state.process_index, None, state.num_processes),
            collate_fn=self.data.collate,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # its own, so that opening it draws nothing from the model's
        )
        return iter(loader)

    def _take_step(self, batches: Iterator[Batch]) -> None:
        """Forward and backward passes over a batch, at the step's budget, rate and draws, and the update."""
        settings, step = self.recipe.training, self.step + 1
        micro_batches, logged = list(islice(batches, self.passes)), step % settings.log_every == 0
        targets, budget = self._count_targets(micro_batches), training_budget(settings, self.model.config.budget, step)
        self.model.model.routing_step.fill_(step)
        self._rate = rate_of_step(settings, step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * self._rate
        self.model.train()
        losses = []
        for number, batch in enumerate(micro_batches, 1):
            with self._exchanging(number == self.passes):
                with self.autocast():
                    inputs = {**self.on_device(batch), "num_items_in_batch": targets, "return_logits": False}
                    loss: Tensor = self._wrapped(**inputs, budget=budget).loss * self.state.num_processes
                loss.backward()
            if logged:
                self.forks.watch()
            losses.append(loss.detach())
        self._fork_figures = self.forks.summary() if logged else {}
        self._norm = whole(nn.utils.clip_grad_norm_(self._trained, settings.max_grad_norm))
        self._update(step, torch.stack(losses).sum())

    def _count_targets(self, micro_batches: Sequence[Batch]) -> Tensor:
        """Tokens to predict in the step's batch, on all processes."""
        self._targets.fill_(sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in micro_batches))
        total: Tensor = reduce(self._targets, "sum")
        return total

    def _update(self, step: int, loss: Tensor) -> None:
        """Change the weights; from the first gradient on that is not finite nothing does, on the device by itself."""
        bad = torch.stack([loss.new_full((), step), loss, self._norm.to(loss.dtype)]).to(self._diverged.dtype)
        first = ~self._norm.isfinite() & (self._diverged[0] == 0)
        self._diverged = torch.where(first, bad, self._diverged)
        # What a GradScaler says to an optimizer: its fused kernels then leave everything as it is.
        self.optimizer.found_inf = (self._diverged[0] > 0).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad()
        update_thresholds(self.model)
        self._loss_sum = self._loss_sum + loss
        self.step = step

    def _exchanging(self, last: bool) -> AbstractContextManager[Any]:
        """Of the passes of a step, DDP exchanges gradients in the last one."""
        wrapped = self._wrapped
        return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) and not last else nullcontext()

    def _log(self) -> None:
        """Hand on what was found since the last time, and what it cost."""
        step = self.step
        loss = reduce(self._loss_sum, "mean").item() / (step - self._last_logged)
        self._loss_sum, self._last_logged = torch.zeros_like(self._loss_sum), step
        tokens, flops = self.clock.rates(self.meter.tokens(step), self.meter.flops(step))
        figures = {
            "loss": loss,
            "perplexity": math.exp(min(loss, MOST_NATS)),
            "grad_norm": self._norm.item(),
            "learning_rate": self.recipe.training.learning_rate * self._rate,
            **self._fork_figures,
            "tokens_per_second": tokens,
            "mfu": flops / self._peak / self.state.num_processes,
            "peak_memory": peak_memory(self.device),
        }
        self._write_row(figures)

    def _write_row(self, figures: dict[str, float]) -> None:
        cost = {"tokens": self.meter.tokens(self.step), "flops": self.meter.flops(self.step)}
        self.tell("on_row", {"step": self.step, **cost, **figures})

    def _evaluate(self) -> bool:
        """Measure on the way, and log it; False if a signal ended it: the next start begins with it."""
        try:
            metrics = measure(self, self.data.eval_rows)
        except RunInterrupted:
            return False
        self._eval_losses[self.step] = metrics["eval_loss"]
        self._write_row(metrics)
        self.tell("on_evaluate")
        return True

    def _must_stop(self) -> bool:
        """Whether any process was asked to stop: all have to stop after the same step."""
        if self._talk is None:
            return self.stop.requested
        asked = torch.tensor(int(self.stop.requested))
        torch.distributed.all_reduce(asked, group=self._talk)
        return bool(asked)

    def _load(self) -> None:
        """Go on where the checkpoint says."""
        if self.checkpoint is None:
            return
        folder = self.checkpoint.folder
        if isinstance(self.data.samples, Streamed):
            self.data.samples.load(folder)
        load_state(folder, self.model, self.optimizer)
        content = json.loads((folder / LOSS_SUM_NAME).read_text(encoding="utf-8"))
        self._loss_sum.fill_(content["loss_sum"])
        self._last_logged = content["last_logged"]
        load_draws(folder, self.state.process_index, self.device)

    def _save(self) -> None:
        """Write a checkpoint under a temporary name, seal it, rename it, prune the old ones."""
        target, main = self.folder / f"{PREFIX}{self.step}", self.state.is_main_process
        loss_sum = reduce(self._loss_sum, "mean").item()
        with self.replacing(target) as partial:
            if main:
                partial.mkdir(parents=True)
            self.state.wait_for_everyone()
            try:
                self._write(partial)
                self.state.wait_for_everyone()
                if main:
                    content = {"loss_sum": loss_sum, "last_logged": self._last_logged}
                    write_text(partial / LOSS_SUM_NAME, json.dumps(content))
                    seal(partial, self.step, self._eval_losses.get(self.step))
            except Exception as error:
                if is_disk_full(error, self.folder):
                    raise disk_full(self.folder) from error
                raise
        if main:
            prune(self.folder, self.recipe.training.keep_checkpoints)

    def _write(self, folder: Path) -> None:
        """What this process adds to a checkpoint."""
        save_state(folder, self.model, self.optimizer, self.divided, loadable=self.adapted is None)
        save_draws(folder, self.state.process_index, self.device)
        if self.state.is_main_process:
            self.data.tokenizer.save_pretrained(folder)
        if isinstance(self.data.samples, Streamed):
            samples = self.step * self.recipe.training.batch_size
            self.data.samples.save(folder, samples, self.state.is_main_process)

    def _check_finite(self) -> None:
        """Say which batch made the loss or its gradient overflow, and stop: it has not reached the weights."""
        step, loss, norm = self._diverged.tolist()
        if not step:
            return
        settings, step = self.recipe.training, int(step)
        budget = training_budget(settings, self.model.config.budget, step)
        samples = range((step - 1) * settings.batch_size, step * settings.batch_size)
        content = {
            "step": step,
            "loss": str(loss),
            "grad_norm": str(norm),
            "budget": None if budget is None else str(budget),
            "samples": {index: self.data.samples.describe(index) for index in samples},
        }
        path = self.folder.parent / DIVERGED_NAME
        if self.state.is_main_process:
            write_text(path, json.dumps(content, indent=2) + "\n")
        raise RunError(
            f"step {step}: loss {loss:.4g}, gradient norm {norm:.4g}: stopped before the update. "
            f"The batch is in {path}; {last_checkpoint(self.folder)}"
        )
