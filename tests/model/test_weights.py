"""Weights that do not fit the configuration are refused by everything that loads, naming the tensors."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, pipeline

from tests.helpers import random_ids, tiny_model
from thoughtbubbles.model.loading import load_model
from thoughtbubbles.model.modeling import ThoughtbubblesForCausalLM, ThoughtbubblesModel
from thoughtbubbles.support.errors import InputError

Edit = Callable[[dict[str, Tensor]], object]
load = ThoughtbubblesForCausalLM.from_pretrained
DOWN = "model.layers.1.mlp.down_proj.weight"
BLOCK = [
    *(f"attention.{name}.{kind}" for name in ("o_proj", "qkv_proj") for kind in ("bias", "weight")),
    *("attention_norm.bias", "attention_norm.weight"),
    *(f"mlp.{name}.{kind}" for name in ("down_proj", "up_proj") for kind in ("bias", "weight")),
    *("mlp_norm.bias", "mlp_norm.weight"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model(routing="threshold").save_pretrained(tmp_path / "tied")
    return tmp_path / "tied"


@pytest.fixture
def untied(tmp_path: Path) -> Path:
    tiny_model(tie_word_embeddings=False).save_pretrained(tmp_path / "untied")
    return tmp_path / "untied"


def edit(folder: Path, change: Edit) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(DOWN), f"missing: {DOWN}$"),
        (lambda w: w.pop("model.embed_tokens.weight"), r"missing: lm_head\.weight, model\.embed_tokens\.weight$"),
        (lambda w: w.pop("model.gates.2.histogram.reached"), r"missing: model\.gates\.2\.histogram\.reached$"),
        (lambda w: w.update({"model.extra": torch.ones(2)}), r"not expected: model\.extra$"),
        (lambda w: w.update({DOWN: w[DOWN][:8]}), rf"{DOWN}: of shape \[8, 24\], expected \[16, 24\]$"),
        (lambda w: w.update({DOWN: w[DOWN].long()}), rf"{DOWN}: of type int64, expected floating-point numbers$"),
        (
            lambda w: w.update({"model.gates.1.histogram.updates": torch.tensor(1.5)}),
            r"model\.gates\.1\.histogram\.updates: of type float32, expected whole numbers$",
        ),
    ],
    ids=["missing", "no-embedding", "no-buffer", "extra", "shape", "whole-numbers", "fraction"],
)
def test_damaged_weights(folder: Path, change: Edit, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    edit(folder, change)
    for loader in (load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=message):
            loader(folder)
    with pytest.raises(InputError, match=message) as error:
        load_model(folder)
    assert "\n" not in str(error.value)
    assert "REPORT" not in capsys.readouterr().err
    with pytest.raises(ValueError, match="that do not fit the configuration"):
        pipeline("text-generation", model=str(folder), tokenizer=None, device="cpu")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 5}, "missing: " + ", ".join(f"model.layers.4.{name}" for name in BLOCK)),
        ({"num_hidden_layers": 3}, "not expected: " + ", ".join(f"model.layers.3.{name}" for name in BLOCK)),
        ({"num_hidden_layers": 2, "fork_layers": [1]}, "and 18 more"),
        ({"fork_layers": [0, 2]}, "missing: model.gates.0.fork_embedding, "),
        ({"routing": "causal"}, "not expected: model.gates.1.histogram.reached, "),
        ({"vocab_size": 20}, "model.embed_tokens.weight: of shape [19, 16], expected [20, 16]"),
        ({"use_bias": False}, "not expected: model.gates.1.norm.bias, "),
        ({"gate_scores": "fixed"}, "not expected: model.gates.1.norm.bias, "),
        ({"routing": "pause", "fork_layers": [1, 2]}, "missing: model.copier."),
    ],
    ids=str,
)
def test_another_configuration(folder: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="weights that do not fit the configuration") as error:
        load(folder, **fields)
    assert message in str(error.value)
    configure(folder, **fields)
    with pytest.raises(InputError, match="weights that do not fit the configuration") as error:
        load_model(folder)
    assert message in str(error.value)


def test_untying_starts_from_the_tied_matrix(folder: Path) -> None:
    ids = random_ids(2, 9)
    for loader in (load, AutoModelForCausalLM.from_pretrained):
        model: Any = loader(folder, tie_word_embeddings=False)
        assert torch.equal(model(ids).logits, load(folder)(ids).logits)
        assert model.lm_head.weight is not model.model.embed_tokens.weight
        with torch.no_grad():
            model.lm_head.weight.zero_()
        assert model.model.embed_tokens.weight.any()


def test_an_untied_model_that_lost_its_unembedding_is_not_taken_for_a_tied_one(untied: Path) -> None:
    edit(untied, lambda weights: weights.pop("lm_head.weight"))
    with pytest.raises(InputError, match=r"missing: lm_head\.weight$"):
        load_model(untied)
    with pytest.raises(ValueError, match=r"missing: lm_head\.weight$"):
        load(None, config=tiny_model(tie_word_embeddings=False).config, state_dict=tiny_model().model.state_dict())


def test_matrices_that_differ_are_not_tied(untied: Path) -> None:
    message = r"lm_head\.weight and model\.embed_tokens\.weight differ, expected equal ones, since tie_word_embeddings"
    with pytest.raises(ValueError, match=message):
        load(untied, tie_word_embeddings=True)
    edit(untied, lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"].clone()}))
    assert load(untied, tie_word_embeddings=True).lm_head.weight.shape == (19, 16)


def test_shards(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    ids = random_ids(1, 7)
    assert torch.equal(load_model(tmp_path, "cpu")(ids).logits, model(ids).logits)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 5
    lost = next(iter(load_file(shards[1])))
    save_file({"model.extra": torch.ones(1)}, shards[1], metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"missing: {lost}.*not expected: model\.extra$"):
        load_model(tmp_path)
    shards[1].unlink()
    with pytest.raises(InputError, match=shards[1].name):
        load_model(tmp_path)


def test_pickled_weights_and_state_dicts(folder: Path) -> None:
    model = load(folder)
    weights = model.state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    ids = random_ids(1, 7)
    assert torch.equal(load(folder)(ids).logits, model(ids).logits)
    del weights[DOWN]
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=f"missing: {DOWN}$"):
        load(folder)
    with pytest.raises(ValueError, match=f"missing: {DOWN}$"):
        load(None, config=model.config, state_dict=weights)


def test_what_fits_is_loaded_by_either_class(folder: Path, untied: Path, tmp_path: Path) -> None:
    ids = random_ids(1, 7)
    for path in (folder, untied):
        base: Any = AutoModel.from_pretrained(path)
        assert type(base) is ThoughtbubblesModel
        assert torch.equal(base(ids).last_hidden_state, load(path).model(ids).last_hidden_state)
        base.save_pretrained(tmp_path / "bases" / path.name)
    assert torch.equal(load(tmp_path / "bases" / "tied")(ids).logits, load(folder)(ids).logits)
    with pytest.raises(ValueError, match=r"missing: lm_head\.weight$"):
        load(tmp_path / "bases" / "untied")
    load(folder, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    assert load(tmp_path / "half", dtype=torch.float32).dtype == torch.float32


def test_shapes_may_differ_where_the_caller_says_so(folder: Path) -> None:
    model = load(folder, vocab_size=20, ignore_mismatched_sizes=True)
    assert model.lm_head.weight.shape == (20, 16)
    with pytest.raises(ValueError, match="missing: "):
        load(folder, num_hidden_layers=5, ignore_mismatched_sizes=True)
