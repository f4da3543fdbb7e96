"""What a device that computes by itself needs of training: nothing is read back, and nothing stands on another device.

Tensors on the device `meta` have shapes and no values: to read one is an error, and so is to compute with another
device's.
"""

from contextlib import nullcontext

import pytest
import torch

from tests.helpers import Case, routed, tiny_config
from thoughtbubbles import ThoughtbubblesForCausalLM

ROUTINGS = ["causal", "topk", "threshold", "random", "random-topk", "uniform", "none", "copy", "pause"]


@pytest.mark.parametrize(
    ("fields", "padded"),
    [
        *((routed(routing), True) for routing in ROUTINGS),
        *(({"merge": merge}, False) for merge in ("residual", "residual-normed", "probability", "root")),
        *(({"fork_content": "attended"}, padded) for padded in (True, False)),
    ],
    ids=str,
)
def test_a_training_step_reads_no_value_back(fields: Case, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which does not know this device
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    model = ThoughtbubblesForCausalLM(tiny_config(**fields, budget=2)).to("meta").train()
    ids = torch.zeros(2, 9, dtype=torch.int64, device="meta")
    mask = torch.ones_like(ids) if padded else None
    model(ids, attention_mask=mask, labels=ids, return_logits=False, num_items_in_batch=16).loss.backward()
    assert {p.grad.device.type for p in model.parameters() if p.grad is not None} == {"meta"}
