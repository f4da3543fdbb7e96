"""Callbacks in a Trainer that is not ours, and the rows of metrics.jsonl."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer, TrainingArguments

from tests.helpers import histograms, random_ids, tiny_model
from thoughtbubbles.support.metrics import last_metrics, read_metric_rows, read_metrics
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


def training_row(step: int) -> dict[str, float]:
    return {"step": step, "tokens": 64 * step, "flops": 100 * step, "loss": 5.0 / step, "tokens_per_second": 9.5}


def evaluation_row(step: int) -> dict[str, float]:
    return {"step": step, "tokens": 64 * step, "flops": 100 * step, "eval_loss": 6.0 / step}


def line(row: object) -> bytes:
    return json.dumps(row).encode() + b"\n"


NO_ROWS = {
    "torn": line(training_row(3))[:20] + b"\n",
    "NUL bytes": bytes(40) + b"\n",
    "NUL bytes, then a row": bytes(40) + line(training_row(3)),
    "not UTF-8": b'{"step": 3, "loss\xff": 1}\n',
    "empty": b"\n",
    "a list": line([3, 1.5]),
    "a number": b"3\n",
    "no step": line({"loss": 1.5}),
    "a step of text": line({**training_row(3), "step": "3"}),
    "a step of true": line({**training_row(3), "step": True}),
    "a broken step": line({**training_row(3), "step": 3.5}),
    "a step below 0": line({**training_row(3), "step": -3}),
    "a loss of text": line({**training_row(3), "loss": "1.5"}),
    "a loss of null": line({**training_row(3), "loss": None}),
    "a list within": line({**training_row(3), "loss": [1.5]}),
    "no tokens": line({"step": 3, "loss": 1.5}),
    "nested deeply": b"[" * 50_000 + b"\n",
    "a number of many digits": b'{"step": ' + b"9" * 5000 + b"}\n",
    "a step that is there": line({**training_row(2), "loss": 9.0}),
    "an evaluation that is there": line({**evaluation_row(2), "eval_loss": 9.0}),
}


@pytest.mark.parametrize("bad", NO_ROWS.values(), ids=NO_ROWS)
def test_what_is_no_row_is_left_out_and_told(tmp_path: Path, bad: bytes) -> None:
    rows = [training_row(2), evaluation_row(2), training_row(4), evaluation_row(4)]
    path = tmp_path / "metrics.jsonl"
    first, second = rows[:2], rows[2:]
    path.write_bytes(b"".join(map(line, first)) + bad + b"".join(map(line, second)))
    assert read_metric_rows(path) == (rows, [3])
    assert read_metrics(path) == rows
    path.write_bytes(b"".join(map(line, rows)) + bad)
    assert read_metric_rows(path) == (rows, [5])
    assert last_metrics(path)["step"] in (2, 4)
    path.write_bytes(b"".join(map(line, rows)) + line(training_row(5))[:-1])
    assert read_metric_rows(path) == (rows, [5])
    assert last_metrics(path) == rows[-1]


def test_a_step_far_off_costs_no_other_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(line(training_row(step)) for step in (2, 4, 4096, 6, 8)))
    assert read_metric_rows(path) == ([training_row(step) for step in (2, 4, 6, 8, 4096)], [])
