"""Callbacks in a Trainer that is not ours."""

from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer, TrainingArguments

from tests.helpers import histograms, random_ids, tiny_model
from thoughtbubbles.training.callbacks import ThresholdCallback


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_thresholds_follow_the_optimizer_of_any_trainer(tmp_path: Path, micro_batches: int) -> None:
    model = tiny_model(routing="threshold")
    for histogram in histograms(model):
        histogram.forget()
    rows: Any = [{"input_ids": row, "labels": row} for row in random_ids(18, 9)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=micro_batches,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[ThresholdCallback()]).train()
    assert [histogram.updates.item() for histogram in histograms(model)] == [2, 2]
    assert all(histogram.reached[-1] == 1 and not histogram.observed.any() for histogram in histograms(model))
