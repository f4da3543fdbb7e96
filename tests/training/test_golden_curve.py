"""A seeded run in double precision whose losses later changes must not move.

`python -m tests.training.test_golden_curve` writes the file anew, for a change that is meant to move them.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, set_seed

from thoughtbubbles.data.feed.blocks import collate_blocks
from thoughtbubbles.data.feed.rundata import RunData, Validation
from thoughtbubbles.recipes.training import load_recipe
from thoughtbubbles.support.metrics import read_metrics
from thoughtbubbles.training.configuration import build_config
from thoughtbubbles.training.run import build_loop, build_model

GOLDEN = Path(__file__).parent / "golden_curve.json"
VOCABULARY, BLOCK, BATCH, STEPS = 64, 24, 4, 100
RECIPE = """
model:
  num_hidden_layers: 4
  hidden_size: 32
  num_attention_heads: 4
  fork_layers: [1, 2]
  budget: {budget}
  routing: {routing}
data: {{path: none}}
training:
  output: {output}
  steps: {steps}
  batch_size: {batch}
  micro_batch_size: 2
  learning_rate: 5e-3
  eval_budgets: [1]
  log_every: 5
  eval_every: 25
  save_every: 1000
"""


class Sequences:
    """Rows of an affine recurrence modulo the vocabulary, with a jump now and then: no data or tokenizer needed.

    None begins with the same token twice: rounding alone would choose between the forks of the two.
    """

    uniform_length: int | None = BLOCK

    def __init__(self, first: int, count: int) -> None:
        self._first, self._count = first, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        number = self._first + index
        token, tokens = number % VOCABULARY, []
        for place in range(BLOCK):
            tokens.append(token)
            jump = 17 if (number + place * place) % 7 == 0 else 0
            following = (5 * token + 3 + number % 3 + jump) % VOCABULARY
            token = (token + 1) % VOCABULARY if place == 0 and following == token else following
        return {"input_ids": torch.tensor(tokens)}

    def describe(self, index: int) -> str:
        return str(self._first + index)

    def length(self, index: int) -> int:
        return BLOCK


def curve(folder: Path, routing: str, budget: str) -> list[dict[str, Any]]:
    """The losses of a run."""
    path = folder / "recipe.yaml"
    text = RECIPE.format(output=folder / "run", steps=STEPS, batch=BATCH, routing=routing, budget=budget)
    path.write_text(text)
    recipe = load_recipe(path)
    data = RunData(
        samples=Sequences(0, STEPS * BATCH),
        validation={"held out": Validation(Sequences(10_000, 16), 1.0)},
        eval_rows=None,
        final_eval_rows=None,
        collate=collate_blocks,
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"x": 0}, unk_token="x"))),
        vocab_size=VOCABULARY,
        longest=BLOCK,
        source="golden",
        identity="golden",
    )
    set_seed(0)
    (folder / "run").mkdir()
    build_loop(recipe, build_model(recipe, build_config(recipe, data)), data).train()
    names = ("step", "loss", "grad_norm", "gate_grad_norm", "eval_loss", "eval_loss/budget_1")
    return [{name: row[name] for name in names if name in row} for row in read_metrics(folder / "run/metrics.jsonl")]


@pytest.mark.parametrize(
    ("routing", "budget"), [("causal", "1.5"), ("topk", "2"), pytest.param("none", "1", marks=pytest.mark.long)]
)
def test_losses_are_where_they_were(tmp_path: Path, float64: None, routing: str, budget: str) -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))[routing]
    found = curve(tmp_path, routing, budget)
    assert len(found) == len(golden) == STEPS // 5 + STEPS // 25
    for row, expected in zip(found, golden, strict=True):
        assert row == pytest.approx(expected, rel=1e-8)
    assert golden[-1]["eval_loss"] < golden[0]["loss"] - 0.5


if __name__ == "__main__":
    import tempfile

    torch.set_default_dtype(torch.float64)
    curves = {}
    for routing, budget in (("causal", "1.5"), ("topk", "2"), ("none", "1")):
        with tempfile.TemporaryDirectory() as folder:
            curves[routing] = curve(Path(folder), routing, budget)
    GOLDEN.write_text(json.dumps(curves, indent=1) + "\n", encoding="utf-8")
