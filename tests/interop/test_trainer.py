"""transformers' own Trainer on our models, as whoever brings it uses it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from tests.helpers import histograms, random_ids, tiny_model
from thoughtbubbles import ThoughtbubblesForCausalLM
from thoughtbubbles.model.loss import IGNORE_INDEX
from thoughtbubbles.training.callbacks import ThresholdCallback

LENGTH = 11


def rows(count: int = 16) -> list[dict[str, Tensor]]:
    """Rows padded to one length on the right, of several lengths and with other numbers of targets."""
    found = []
    for number, ids in enumerate(random_ids(count, LENGTH, seed=3)):
        real, prompt = LENGTH - 3 * (number % 3), 1 + number % 4
        mask = (torch.arange(LENGTH) < real).long()
        labels = ids.masked_fill((mask == 0) | (torch.arange(LENGTH) < prompt), IGNORE_INDEX)
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


def trainer(folder: Path, model: Any, callbacks: Any = (), **settings: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 1,
    }
    arguments = TrainingArguments(output_dir=str(folder), **{**defaults, **settings})
    data: Any = rows()
    return Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data, callbacks=list(callbacks))


def trained(folder: Path, resume: str | None = None, routing: str = "causal", **settings: Any) -> Trainer:
    """A finished Trainer of a model in float64."""
    model = tiny_model(routing=routing, budget=1.5).double()
    found = trainer(folder, model, [ThresholdCallback()], **settings)
    found.train(resume_from_checkpoint=resume)
    return found


def losses(found: Trainer) -> list[float]:
    return [row["loss"] for row in found.state.log_history if "loss" in row]


def assert_same_weights(one: Any, other: Any, tolerance: float = 0) -> None:
    theirs = dict(other.state_dict())
    for name, value in one.state_dict().items():
        assert torch.allclose(value, theirs[name], rtol=0, atol=tolerance), name


def mean_loss(model: Any, batch: list[dict[str, Tensor]]) -> Tensor:
    """Over all targets of rows, each read alone and without its padding."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in batch:
        real = int(row["attention_mask"].sum())
        log_probs = model(row["input_ids"][None, :real]).logits[0].log_softmax(-1)
        for place in range(1, real):
            if row["labels"][place] != IGNORE_INDEX:
                total, count = total - log_probs[place - 1, row["labels"][place]], count + 1
    return total / count


def test_the_loss_is_the_mean_over_all_targets_of_a_step(tmp_path: Path) -> None:
    """Of several passes too, whose rows have other numbers of them."""
    whole, parts = (
        trained(tmp_path / str(size), per_device_train_batch_size=size, gradient_accumulation_steps=4 // size)
        for size in (4, 1)
    )
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-9)
    assert_same_weights(parts.model, whole.model, 1e-9)
    batch = next(iter(whole.get_train_dataloader()))
    first = [{name: values[number] for name, values in batch.items()} for number in range(4)]
    assert losses(whole)[0] == pytest.approx(mean_loss(tiny_model(budget=1.5).double(), first).item(), rel=1e-6)


def test_evaluation_gives_our_loss_and_logits(tmp_path: Path) -> None:
    model = tiny_model(budget=1.5)
    found = trainer(tmp_path, model, per_device_eval_batch_size=16)
    assert found.evaluate()["eval_loss"] == pytest.approx(mean_loss(model, rows()).item(), abs=1e-5)
    predicted: Any = found.predict(found.eval_dataset).predictions
    batch = {name: torch.stack([row[name] for row in rows()]) for name in ("input_ids", "attention_mask")}
    assert torch.allclose(torch.from_numpy(predicted), model(**batch).logits, atol=1e-5)


@pytest.mark.parametrize("micro", [pytest.param(4, marks=pytest.mark.long), 2])
def test_smoothed_labels_train(tmp_path: Path, micro: int) -> None:
    settings = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": 4 // micro}
    found = losses(trained(tmp_path, label_smoothing_factor=0.1, max_steps=8, **settings))
    # Of the same rows, in another order.
    assert sum(found[4:]) < sum(found[:4]) - 1


def test_checkpointed_gradients_are_the_same(tmp_path: Path) -> None:
    plain, checkpointed = (trained(tmp_path / str(on), gradient_checkpointing=on) for on in (False, True))
    assert losses(plain) == losses(checkpointed)
    assert_same_weights(plain.model, checkpointed.model)


@pytest.mark.parametrize(
    "routing", ["threshold", *(pytest.param(each, marks=pytest.mark.long) for each in ("causal", "random"))]
)
def test_resuming_goes_on_as_if_never_interrupted(tmp_path: Path, routing: str) -> None:
    whole = trained(tmp_path / "whole", routing=routing)
    trained(tmp_path / "parts", routing=routing, save_strategy="steps", save_steps=2)
    again = trained(tmp_path / "parts", str(tmp_path / "parts" / "checkpoint-2"), routing=routing)
    assert again.state.global_step == 4
    assert losses(again) == losses(whole)
    assert_same_weights(again.model, whole.model)
    if routing == "threshold":  # once before the run
        assert [histogram.updates.item() for histogram in histograms(again.model)] == [1 + 4, 1 + 4]
    stored = ThoughtbubblesForCausalLM.from_pretrained(tmp_path / "parts" / "checkpoint-4", dtype=torch.float64)
    assert_same_weights(stored, whole.model)


@pytest.mark.long
def test_the_best_checkpoint_comes_back(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    found = trained(tmp_path, load_best_model_at_end=True, **settings)
    best = min(row["eval_loss"] for row in found.state.log_history if "eval_loss" in row)
    assert found.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-6)


def test_adapters_train_and_resume_alone(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'thoughtbubbles[peft]'")

    def adapted(folder: Path, resume: str | None = None, **settings: Any) -> Trainer:
        torch.manual_seed(0)
        base = tiny_model(budget=1.5).double()
        targets = peft.LoraConfig(r=2, target_modules=["qkv_proj", "projection"], task_type="CAUSAL_LM")
        found = trainer(folder, peft.get_peft_model(base, targets), label_names=["labels"], **settings)
        found.train(resume_from_checkpoint=resume)
        return found

    whole = adapted(tmp_path / "whole", save_strategy="steps", save_steps=2)
    assert whole.evaluate()["eval_loss"] < mean_loss(tiny_model(budget=1.5).double(), rows()).item() - 0.1
    names = {path.name for path in (tmp_path / "whole" / "checkpoint-2").iterdir()}
    assert "adapter_model.safetensors" in names
    assert "model.safetensors" not in names
    assert_same_weights(whole.model.get_base_model().lm_head, tiny_model(budget=1.5).double().lm_head)
    again = adapted(tmp_path / "again", str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(again)[-2:] == losses(whole)[-2:]
    assert_same_weights(again.model, whole.model)
