"""LoRA of the library `peft` on every linear map: attention, MLP and gates."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor
from transformers.integrations.peft import MIN_PEFT_VERSION

from tests.helpers import padding_mask, random_ids, tiny_model
from thoughtbubbles.model.gate import ForkGate

peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'thoughtbubbles[peft]'")

TARGETS = ["qkv_proj", "o_proj", "up_proj", "down_proj", "projection"]
MAPS = {
    *(f"layers.{layer}.{name}" for layer in range(4) for name in ("attention.qkv_proj", "attention.o_proj")),
    *(f"layers.{layer}.mlp.{name}" for layer in range(4) for name in ("up_proj", "down_proj")),
    *(f"gates.{layer}.projection" for layer in (1, 2)),
}


def lora(targets: Any = TARGETS, **settings: Any) -> Any:
    return peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM", **settings)


def adapted(seed: int = 0, targets: Any = TARGETS, **overrides: Any) -> Any:
    """A tiny model in float64 under fresh adapters, which do nothing yet."""
    torch.manual_seed(seed)
    return peft.get_peft_model(tiny_model(**{"budget": 1.5, **overrides}).double(), lora(targets))


def scramble(model: Any) -> None:
    """Adapters that do something."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def adapted_maps(model: Any) -> set[str]:
    found = (re.match(r"base_model\.model\.model\.(.*)\.lora_A\.", name) for name, _ in model.named_parameters())
    return {match[1] for match in found if match}


def train(model: Any, ids: Tensor, steps: int, autocast: bool = False) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(steps):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


@pytest.mark.parametrize("targets", [TARGETS, "all-linear"], ids=["named", "all-linear"])
def test_every_linear_map_can_be_adapted(targets: Any) -> None:
    model = adapted(targets=targets)
    assert adapted_maps(model) == MAPS
    ids = random_ids(2, 9)
    assert torch.equal(model(ids).logits, tiny_model(budget=1.5).double()(ids).logits)


def test_every_linear_map_can_be_adapted_where_forks_attend() -> None:
    model = adapted(targets="all-linear", fork_content="attended")
    assert adapted_maps(model) == MAPS | {
        f"gates.{gate}.content.{name}" for gate in (1, 2) for name in ("qkv", "output")
    }
    ids = random_ids(2, 9)
    assert torch.equal(model(ids).logits, tiny_model(budget=1.5, fork_content="attended").double()(ids).logits)
    scramble(model)
    expected = model(input_ids=ids).logits
    assert torch.allclose(model.merge_and_unload()(ids).logits, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("routing", ["causal", "topk", "none"])
def test_training_lowers_the_loss_and_changes_adapters_alone(routing: str) -> None:
    model, ids = adapted(routing=routing), random_ids(2, 13)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = train(model, ids, 8)
    assert losses[-1] < 0.8 * losses[0]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("lora_" not in name), name


def test_adapters_of_the_gates_get_a_gradient() -> None:
    model, ids = adapted(), random_ids(2, 13)
    scramble(model)
    model(input_ids=ids, attention_mask=padding_mask("left", 2, 13), labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == ("lora_" in name), name


def test_adapters_of_the_gates_reach_the_scores() -> None:
    model, ids = adapted(targets=["projection"]), random_ids(2, 13)
    before = model(ids, output_streams=True).streams[-1].log_score
    scramble(model)
    assert not torch.allclose(model(ids, output_streams=True).streams[-1].log_score, before)


def test_adapters_survive_saving_and_loading(tmp_path: Path) -> None:
    model, ids = adapted(), random_ids(2, 9)
    train(model, ids, 3)
    model.save_pretrained(tmp_path)
    stored = {path.name for path in tmp_path.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= stored
    assert "model.safetensors" not in stored
    again = peft.PeftModel.from_pretrained(tiny_model(budget=1.5).double(), tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_adapters_of_transformers_are_stored_alone(tmp_path: Path) -> None:
    """The same through `add_adapter`, which keeps the class of the model."""
    if Version(peft.__version__) < Version(MIN_PEFT_VERSION):
        pytest.skip(f"transformers asks for peft {MIN_PEFT_VERSION}, here is {peft.__version__}")
    model, ids = tiny_model(), random_ids(2, 9)
    model.add_adapter(lora())
    scramble(model)
    model.save_pretrained(tmp_path)
    stored = {path.name for path in tmp_path.iterdir()}
    assert "adapter_model.safetensors" in stored
    assert not stored & {"model.safetensors", "config.json", "modeling.py", "README.md"}
    again = tiny_model()
    before = again(ids).logits
    again.load_adapter(str(tmp_path))
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert not torch.allclose(again(ids).logits, before)


@pytest.mark.parametrize("routing", ["causal", "topk"])
def test_merging_gives_the_same_logits(routing: str) -> None:
    model, ids = adapted(routing=routing), random_ids(3, 13)
    train(model, ids, 3)
    mask = padding_mask("holes", 3, 13)
    expected = model(input_ids=ids, attention_mask=mask, budget=2).logits
    merged = model.merge_and_unload()
    assert type(merged).__name__ == "ThoughtbubblesForCausalLM"
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert torch.allclose(merged(input_ids=ids, attention_mask=mask, budget=2).logits, expected, rtol=0, atol=1e-10)


def test_a_merged_model_is_stored_whole(tmp_path: Path) -> None:
    model, ids = adapted(), random_ids(2, 9)
    scramble(model)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert {"model.safetensors", "modeling.py", "README.md"} <= {path.name for path in tmp_path.iterdir()}
    again = type(merged).from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.allclose(again(ids).logits, merged(ids).logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("budget", [None, 3])
def test_generation_under_an_adapter(budget: float | None) -> None:
    model, ids = adapted(), random_ids(2, 7)
    plain: Any = tiny_model(budget=1.5).double()
    scramble(model)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    arguments |= {} if budget is None else {"budget": budget}
    cached = model.generate(**arguments, use_cache=True)
    assert torch.equal(cached, model.generate(**arguments, use_cache=False))
    assert torch.equal(cached, model.merge_and_unload().generate(**arguments))
    assert not torch.equal(cached, plain.generate(**arguments))


def test_gradient_checkpointing_under_an_adapter() -> None:
    ids, gates = random_ids(2, 13), []
    plain, checkpointed = adapted(), adapted()
    checkpointed.gradient_checkpointing_enable()
    for module in checkpointed.modules():
        if isinstance(module, ForkGate):
            module.register_forward_hook(lambda *_: gates.append(1))
    assert train(plain, ids, 3) == train(checkpointed, ids, 3)
    assert len(gates) == 2 * 3
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("autocast", [True, False])
def test_adapters_of_a_bfloat16_model(autocast: bool) -> None:
    """The gate computes in float32 under its adapter too."""
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_model(budget=1.5).bfloat16(), lora(), autocast_adapter_dtype=autocast)
    ids = random_ids(2, 13)
    losses = train(model, ids, 8, autocast)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = model(ids, output_streams=True)
    assert losses[-1] < 0.9 * losses[0]
    assert all(streams.log_score.dtype == torch.float32 for streams in out.streams)
    assert out.logits.isfinite().all()
