"""Dense models of other classes as Thoughtbubbles models: the same function at budget 1, and the way back."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from tests.helpers import SHARED, padding_mask, random_ids
from tests.tokenizer_kinds import byte_level
from thoughtbubbles import ThoughtbubblesForCausalLM, retrofit, retrofit_folder, to_dense, to_dense_folder
from thoughtbubbles.data import load_prepared, prepare
from thoughtbubbles.model import stored
from thoughtbubbles.model.cache import StreamCache
from thoughtbubbles.model.loading import load_model, load_tokenizer
from thoughtbubbles.support.errors import InputError
from thoughtbubbles.support.text import recorded_start, start_document

STORIES = SHARED / "models" / "stories260K"
SHAPE = {"vocab_size": 19, "num_hidden_layers": 3, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 32}
KINDS: dict[str, Any] = {
    "llama": LlamaConfig(
        **SHAPE, hidden_size=36, num_attention_heads=6, num_key_value_heads=3, head_dim=8, intermediate_size=50,
        attention_bias=True, mlp_bias=True, tie_word_embeddings=True, rope_parameters=LLAMA3,
    ),
    "llama-yarn": LlamaConfig(
        **SHAPE, hidden_size=24, num_attention_heads=4, num_key_value_heads=4, head_dim=10, intermediate_size=31,
        rope_parameters=YARN,
    ),
    "mistral": MistralConfig(
        **SHAPE, hidden_size=20, num_attention_heads=4, num_key_value_heads=1, head_dim=6, intermediate_size=33,
        sliding_window=None, rope_parameters={"rope_type": "linear", "rope_theta": 50.0, "factor": 2.0},
    ),
    "qwen2": Qwen2Config(
        **SHAPE, hidden_size=24, num_attention_heads=6, num_key_value_heads=2, intermediate_size=29,
        tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 30.0},
    ),
    "qwen3": Qwen3Config(
        **SHAPE, hidden_size=20, num_attention_heads=6, num_key_value_heads=2, head_dim=14, intermediate_size=29,
        rope_parameters={"rope_type": "default", "rope_theta": 200.0},
    ),
    "qwen3-bias": Qwen3Config(
        **SHAPE, hidden_size=28, num_attention_heads=2, num_key_value_heads=2, head_dim=6, intermediate_size=29,
        attention_bias=True, tie_word_embeddings=True,
    ),
    "neox": GPTNeoXConfig(
        **SHAPE, hidden_size=48, num_attention_heads=3, intermediate_size=52,
        rope_parameters={"rope_type": "default", "rope_theta": 40.0, "partial_rotary_factor": 0.25},
    ),
    "neox-sequential": GPTNeoXConfig(
        **SHAPE, hidden_size=36, num_attention_heads=3, intermediate_size=40, attention_bias=False,
        use_parallel_residual=False, hidden_act="gelu_new", tie_word_embeddings=True,
        rope_parameters={"rope_type": "yarn", "rope_theta": 40.0, "partial_rotary_factor": 0.5, "factor": 2.0,
                         "original_max_position_embeddings": 16},
    ),
}  # fmt: skip


OFTEN = ("llama", "qwen3", "neox")
EVERY = [pytest.param(kind, marks=[] if kind in OFTEN else [pytest.mark.long]) for kind in KINDS]
"""All kinds, of which the quick tests take some."""


def dense(kind: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model of another class whose attention is far from even."""
    config = type(KINDS[kind]).from_dict({**KINDS[kind].to_dict(), **changes})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_gain = "norm" in name and name.endswith("weight")
            spread = 1.0 if "embed" in name or parameter.dim() == 1 else 1.3 / parameter.shape[-1] ** 0.5
            parameter.copy_(1 + 0.3 * noise if is_gain else spread * noise)
    return model


def close(ours: Tensor, theirs: Tensor, bar: float = 1e-5) -> bool:
    """Whether numbers agree within `bar` of the largest."""
    return bool((ours - theirs).abs().max() <= bar * theirs.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_at_budget_one_it_is_the_dense_model(kind: str) -> None:
    theirs, ids = dense(kind), random_ids(3, 48)
    ours = retrofit(theirs)
    assert close(ours(ids, budget=1).logits, theirs(ids).logits)
    assert not close(ours(ids, budget=2).logits, theirs(ids).logits, 1e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "neox", "neox-sequential"])
def test_these_models_tell_heads_and_positions_apart(kind: str) -> None:
    """Else the tests above would pass whatever was joined."""
    theirs, ids = dense(kind), random_ids(2, 48)
    heads = retrofit(theirs)
    weight = heads.model.layers[1].attention.qkv_proj.weight.data
    size = heads.config.head_dim
    weight[: 2 * size] = weight[: 2 * size].roll(size, 0)
    assert not close(heads(ids, budget=1).logits, theirs(ids).logits, 1e-3)
    turned = retrofit(theirs)
    weight = turned.model.layers[1].attention.qkv_proj.weight.data
    weight[:size] = weight[:size].flip(0)
    assert not close(turned(ids, budget=1).logits, theirs(ids).logits, 1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "neox"])
def test_padding(kind: str, side: str) -> None:
    theirs, ids, mask = dense(kind), random_ids(3, 21), padding_mask(side, 3, 21)
    assert mask is not None
    wanted = theirs(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    found = retrofit(theirs)(ids, attention_mask=mask, budget=1).logits
    assert close(found[mask.bool()], wanted[mask.bool()])


@pytest.mark.parametrize("kind", ["llama-yarn", "qwen2", "mistral", "neox-sequential"])
def test_with_a_cache(kind: str) -> None:
    theirs, ids = dense(kind), random_ids(2, 23)
    ours, cache = retrofit(theirs), StreamCache()
    parts = [ours(part, cache=cache, budget=1).logits for part in ids.split([9, 1, 12, 1], 1)]
    assert close(torch.cat(parts, 1), theirs(ids).logits)


@pytest.mark.parametrize("kind", EVERY)
def test_gradients(kind: str) -> None:
    theirs, ids = dense(kind), random_ids(2, 24)
    ours = retrofit(theirs)
    theirs(ids, labels=ids).loss.backward()
    ours(ids, labels=ids, budget=1).loss.backward()
    wanted = {name: p.grad for name, p in theirs.named_parameters()}
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    # The way back takes the gradients where it takes the weights.
    for name, found in to_dense(ours).named_parameters():
        assert close(found, wanted[name], 1e-4), name


@torch.no_grad()
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", EVERY)
def test_bfloat16_is_no_further_than_two_kernels_are_apart(kind: str, seed: int, tmp_path: Path) -> None:
    dense(kind, seed).save_pretrained(tmp_path)  # read in bfloat16, a model's rotary frequencies stay as they are
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="sdpa")
    ours, ids = retrofit(theirs), random_ids(4, 40)
    sdpa = theirs(ids).logits.double()
    theirs.set_attn_implementation("eager")
    eager = theirs(ids).logits.double()
    found = ours(ids, budget=1).logits.double()
    assert ours.dtype == torch.bfloat16
    assert not torch.equal(eager, sdpa)
    assert (found - sdpa).norm() <= (eager - sdpa).norm()


@pytest.mark.parametrize("kind", KINDS)
def test_the_way_back_gives_the_same_bits(kind: str) -> None:
    theirs, ids = dense(kind), random_ids(2, 12)
    again = to_dense(retrofit(theirs))
    assert type(again) is type(theirs)
    assert again.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in again.state_dict().items())
    assert torch.equal(again(ids).logits, theirs(ids).logits)
    kept = {name: value for name, value in theirs.config.to_dict().items() if name not in ("architectures", "dtype")}
    assert {name: value for name, value in again.config.to_dict().items() if name in kept} == kept


@pytest.mark.parametrize("routing", ["none", "copy", "pause", "threshold", "uniform"])
def test_other_routings(routing: str, tmp_path: Path) -> None:
    theirs, ids = dense("qwen3"), random_ids(2, 12)
    theirs.save_pretrained(tmp_path / "source")
    retrofit_folder(tmp_path / "source", tmp_path / "out", routing=routing)
    for ours in (retrofit(theirs, routing=routing), reads(tmp_path / "out")):
        assert close(ours(ids, budget=1).logits, theirs(ids).logits)
        assert all(torch.equal(t, theirs.state_dict()[name]) for name, t in to_dense(ours).state_dict().items())


def test_a_model_in_another_type_than_it_was_read_in(tmp_path: Path) -> None:
    dense("qwen2").save_pretrained(tmp_path / "source")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "source").double()
    assert retrofit(theirs).dtype == to_dense(retrofit(theirs)).dtype == torch.float64


def test_a_copy_is_nobody_elses() -> None:
    theirs, ids = dense("llama"), random_ids(1, 9)
    wanted = theirs(ids).logits
    ours = retrofit(theirs)
    for parameter in ours.parameters():
        parameter.data.zero_()
    assert torch.equal(theirs(ids).logits, wanted)


@pytest.mark.parametrize("layers", [1, 2, 3, 5])
def test_fork_layers_exist_at_any_depth(layers: int) -> None:
    ours = retrofit(dense("qwen2", num_hidden_layers=layers, layer_types=None))
    assert ours.config.fork_layers
    assert ours(random_ids(1, 9), budget=2, output_streams=True).streams[-1].log_score.shape[1] > 9


def test_new_gates_begin_nearly_closed() -> None:
    theirs = dense("qwen3")
    closed, opened = (retrofit(theirs, gate_start=start) for start in (1e-6, 0.5))
    ids = random_ids(2, 40)
    wanted = theirs(ids).logits
    assert close(closed(ids).logits, wanted, 1e-3)
    assert not close(opened(ids).logits, wanted, 1e-2)
    out = retrofit(theirs)(ids, labels=ids, output_streams=True)
    forks = ~out.streams[-1].is_root & out.streams[-1].alive
    assert 0.001 < out.streams[-1].log_score[forks].exp().mean() < 0.1
    out.loss.backward()


def test_choices_about_streams_are_the_callers() -> None:
    theirs, ids = dense("llama"), random_ids(2, 16)
    mixed = retrofit(theirs, merge="probability", routing="topk", fork_layers=[0, 2], budget="3/2")
    assert (mixed.config.gated_layers, mixed.config.leaks) == ((0, 2), True)
    assert close(mixed(ids, budget=1).logits, theirs(ids).logits.log_softmax(-1))


def test_forks_that_attend_are_new(tmp_path: Path) -> None:
    """Budget 1 stays the dense model, whatever their weights, and the way back drops them."""
    theirs, ids = dense("neox"), random_ids(2, 16)
    theirs.save_pretrained(tmp_path / "source")
    retrofit_folder(tmp_path / "source", tmp_path / "out", fork_content="attended")
    for ours in (retrofit(theirs, fork_content="attended"), load_model(tmp_path / "out")):
        content = ours.model.gates["0"].content
        assert content.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert content.output.weight.std().item() == pytest.approx(0.02 / (2 * 3) ** 0.5, rel=0.1)
        assert (content.norm.weight == 1).all()
        content.output.weight.data.normal_()
        assert close(ours(ids, budget=1).logits, theirs(ids).logits)
        assert not close(ours(ids, budget=2).logits, theirs(ids).logits, 1e-4)
        back = to_dense(ours).state_dict()
        assert back.keys() == theirs.state_dict().keys()
        assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in back.items())


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"attenuation": "released"}, r"attenuation='released': expected another, since it overwrites a channel"),
        ({"gate_scores": "learned"}, r"gate_scores='learned': expected 'forks'"),
        ({"hidden_size": 8}, r"hidden_size=8: expected it unsaid"),
        ({"fork_layers": [7]}, r"fork_layers=\[7\]: expected"),
        ({"gate_start": 1.0}, r"gate_start=1\.0: expected"),
    ],
)
def test_choices_that_would_make_another_function_are_refused(choice: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        retrofit(dense("llama"), **choice)


# --- Folders ---


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dense model with a tokenizer that puts its bos before a text."""
    source = byte_level(tmp_path / "source", "<s>", "</s>", "<s> $A", chat_template="{{ messages[0].content }}")
    size = len(AutoTokenizer.from_pretrained(source))
    dense("llama", vocab_size=size + 5).save_pretrained(source)
    return source


def reads(out: Path) -> ThoughtbubblesForCausalLM:
    model: ThoughtbubblesForCausalLM = AutoModelForCausalLM.from_pretrained(out)  # type: ignore[assignment]
    return model


def agrees(source: Path, out: Path) -> None:
    """The dense model of one folder is the other's at budget 1, in the type of its numbers."""
    theirs, ours, ids = AutoModelForCausalLM.from_pretrained(source), reads(out), random_ids(2, 20)
    assert ours.dtype == theirs.dtype
    assert close(ours(ids, budget=1).logits.float(), theirs(ids).logits.float(),
                 1e-5 if theirs.dtype == torch.float32 else 0.05)  # fmt: skip


def change(source: Path, drop: tuple[str, ...] = (), **fields: Any) -> None:
    """Write config.json otherwise."""
    said = json.loads((source / "config.json").read_text())
    kept = {name: value for name, value in {**said, **fields}.items() if name not in drop}
    (source / "config.json").write_text(json.dumps(kept))


def weights(source: Path) -> dict[str, Tensor]:
    return load_file(source / "model.safetensors")


def test_a_folder_with_all_that_belongs_to_it(folder: Path, tmp_path: Path) -> None:
    GenerationConfig(temperature=0.6, do_sample=True, cache_implementation="static").save_pretrained(folder)
    (folder / "LICENSE.txt").write_text("theirs")
    made = retrofit_folder(folder, tmp_path / "out", budget=1.5, fork_layers=[1])
    agrees(folder, tmp_path / "out")
    out = load_model(tmp_path / "out")
    assert (out.config.budget, out.config.fork_layers, out.config.merge) == (1.5, [1], "residual")
    assert (out.config.gate_scores, out.config.gate_start) == ("forks", 0.02)
    assert (out.generation_config.temperature, out.generation_config.cache_implementation) == (0.6, None)
    out.generate(random_ids(1, 4), max_new_tokens=3)
    ours, theirs = load_tokenizer(tmp_path / "out"), AutoTokenizer.from_pretrained(folder)
    assert ours("the river").input_ids == theirs("the river").input_ids
    assert ours.chat_template == theirs.chat_template == "{{ messages[0].content }}"
    assert start_document(ours) == [recorded_start(ours)] == [ours.bos_token_id]
    assert (made.kind, made.left_out, made.document_start) == ("llama", [], "<s>")
    assert (tmp_path / "out" / "LICENSE.txt").read_text() == "theirs"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(("kind", "shards"), [*((kind, True) for kind in KINDS), ("neox", False)])
def test_folders_of_every_family_and_back(
    kind: str, shards: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "SMALLEST_SHARD", 9_000 if shards else 10**9)
    theirs = dense(kind)
    theirs.save_pretrained(tmp_path / "source", max_shard_size="11KB" if shards else "1GB")
    retrofit_folder(tmp_path / "source", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists() != shards
    agrees(tmp_path / "source", tmp_path / "out")
    assert to_dense_folder(tmp_path / "out", tmp_path / "back") == type(theirs).__name__
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in back.state_dict().items())
    for file in ("generation_config.json", "config.json"):
        found, said = (json.loads((tmp_path / each / file).read_text()) for each in ("back", "source"))
        assert found == said


def test_a_folder_can_be_read_without_being_written(folder: Path, tmp_path: Path) -> None:
    ids = random_ids(2, 20)
    assert close(retrofit(folder)(ids, budget=1).logits, AutoModelForCausalLM.from_pretrained(folder)(ids).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("said", [True, False], ids=["said", "unsaid"])
def test_the_type_of_the_numbers_is_kept(dtype: torch.dtype, said: bool, tmp_path: Path) -> None:
    dense("qwen2").to(dtype).save_pretrained(tmp_path / "source")
    if not said:
        change(tmp_path / "source", drop=("dtype",))
    retrofit_folder(tmp_path / "source", tmp_path / "out")
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {dtype}
    agrees(tmp_path / "source", tmp_path / "out")


@pytest.mark.parametrize("shards", [1, 2])
def test_bin_files_are_read_by_weights_alone(shards: int, folder: Path, tmp_path: Path) -> None:
    parts = [dict(list(weights(folder).items())[place::shards]) for place in range(shards)]
    (folder / "model.safetensors").unlink()
    names = ["pytorch_model.bin"] if shards == 1 else [f"pytorch_model-{i}.bin" for i in range(shards)]
    for name, part in zip(names, parts, strict=True):
        torch.save(part, folder / name, _use_new_zipfile_serialization=shards > 1)
    if shards > 1:
        index = {name: file for file, part in zip(names, parts, strict=True) for name in part}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    retrofit_folder(folder, tmp_path / "out")
    agrees(folder, tmp_path / "out")


class Thief:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("stolen"),))


def test_a_bin_file_that_runs_code_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Thief()}, folder / "pytorch_model.bin")
    refused(folder, r"pytorch_model\.bin cannot be read")
    assert not (tmp_path / "stolen").exists()


def test_an_older_configuration(folder: Path, tmp_path: Path) -> None:
    scaling = {name: value for name, value in LLAMA3.items() if name != "rope_theta"}
    change(folder, ("rope_parameters", "dtype"), rope_scaling=scaling, rope_theta=500.0, torch_dtype="float32")
    retrofit_folder(folder, tmp_path / "out")
    assert AutoConfig.from_pretrained(folder).rope_parameters["rope_type"] == "llama3"
    agrees(folder, tmp_path / "out")


def test_an_older_gpt_neox(tmp_path: Path) -> None:
    source = tmp_path / "source"
    dense("neox").save_pretrained(source)
    change(source, ("rope_parameters",), rotary_pct=0.25, rotary_emb_base=40)
    older = weights(source)
    for layer in range(3):
        older[f"gpt_neox.layers.{layer}.attention.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)
        older[f"gpt_neox.layers.{layer}.attention.masked_bias"] = torch.tensor(-1e9)
        older[f"gpt_neox.layers.{layer}.attention.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(older, source / "model.safetensors", metadata={"format": "pt"})
    assert retrofit_folder(source, tmp_path / "out").left_out == []
    agrees(source, tmp_path / "out")


@pytest.mark.parametrize("other", [True, False], ids=["another", "the same"])
def test_a_tied_configuration_keeps_another_head_in_its_file(other: bool, folder: Path, tmp_path: Path) -> None:
    stored_ = weights(folder)
    head = stored_["model.embed_tokens.weight"].clone()
    stored_["lm_head.weight"] = head.flip(0) if other else head
    save_file(stored_, folder / "model.safetensors", metadata={"format": "pt"})
    made = retrofit_folder(folder, tmp_path / "out")
    assert made.config.tie_word_embeddings is not other
    assert made.left_out == []
    agrees(folder, tmp_path / "out")
    to_dense_folder(tmp_path / "out", tmp_path / "back")
    ids = random_ids(1, 8)
    first, last = (AutoModelForCausalLM.from_pretrained(tmp_path / each)(ids).logits for each in ("source", "back"))
    assert torch.equal(first, last)


def test_a_tied_model_stored_by_its_head(folder: Path, tmp_path: Path) -> None:
    stored_ = weights(folder)
    stored_["lm_head.weight"] = stored_.pop("model.embed_tokens.weight")
    save_file(stored_, folder / "model.safetensors", metadata={"format": "pt"})
    retrofit_folder(folder, tmp_path / "out")
    agrees(folder, tmp_path / "out")


def test_a_model_that_was_saved_without_its_head(folder: Path, tmp_path: Path) -> None:
    LlamaModel.from_pretrained(folder).save_pretrained(folder)
    assert "embed_tokens.weight" in weights(folder)
    retrofit_folder(folder, tmp_path / "out")
    agrees(folder, tmp_path / "out")


def test_what_their_class_does_not_read_is_left_out_and_named(folder: Path, tmp_path: Path) -> None:
    save_file({**weights(folder), "v_head.weight": torch.ones(3)}, folder / "model.safetensors", {"format": "pt"})
    assert retrofit_folder(folder, tmp_path / "out").left_out == ["v_head.weight"]
    agrees(folder, tmp_path / "out")


def test_of_an_index_only_its_shards(tmp_path: Path) -> None:
    source = tmp_path / "source"
    dense("qwen2").save_pretrained(source, max_shard_size="5KB")
    save_file({"model.norm.weight": torch.zeros(24), "other.sinks": torch.zeros(3)}, source / "zzz.safetensors")
    torch.save({"model.norm.weight": torch.zeros(24)}, source / "pytorch_model.bin")
    assert retrofit_folder(source, tmp_path / "out").left_out == []
    agrees(source, tmp_path / "out")


def test_a_tokenizer_without_a_rule_of_its_own(tmp_path: Path) -> None:
    source = byte_level(tmp_path / "source", "<|endoftext|>", "<|endoftext|>")
    dense("neox", vocab_size=500).save_pretrained(source)
    assert retrofit_folder(source, tmp_path / "out").document_start == "<|endoftext|>"


def test_settings_that_transformers_would_not_save_are_left_out(folder: Path, tmp_path: Path) -> None:
    said = {"temperature": 0.9, "top_p": 0.6, "eos_token_id": [2, 3]}
    (folder / "generation_config.json").write_text(json.dumps(said))
    retrofit_folder(folder, tmp_path / "out")
    model = reads(tmp_path / "out")
    assert model.generation_config.eos_token_id == [2, 3]
    model.generation_config.max_new_tokens = 5
    model.save_pretrained(tmp_path / "again")


# --- With the tools of others ---


def test_the_longest_rows() -> None:
    theirs, ids = dense("llama-yarn", max_position_embeddings=512), random_ids(1, 512)
    assert close(retrofit(theirs)(ids, budget=1).logits, theirs(ids).logits)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_thousands_of_tokens(kind: str) -> None:
    theirs, ids = dense(kind, max_position_embeddings=4096), random_ids(1, 4096)
    assert close(retrofit(theirs)(ids, budget=1).logits, theirs(ids).logits, 1e-4)


def test_it_is_shared_out_over_devices_block_by_block(tmp_path: Path) -> None:
    dense("llama", num_hidden_layers=8).save_pretrained(tmp_path / "source")
    retrofit_folder(tmp_path / "source", tmp_path / "out")
    whole, ids = reads(tmp_path / "out"), random_ids(2, 12)
    room = {"cpu": whole.get_memory_footprint() * 2 // 3}
    split = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", device_map="auto", max_memory=room, offload_folder=tmp_path / "offload"
    )
    places = split.hf_device_map
    assert {"cpu", "disk"} <= set(places.values())
    assert not [name for name in places if "attention" in name or ".mlp" in name or name.count(".") > 2]
    assert torch.equal(split(ids).logits, whole(ids).logits)


def test_adapters_and_gates_learn_over_a_frozen_base(folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    ours, ids = retrofit(folder), random_ids(2, 12)
    adapted = peft.get_peft_model(ours, peft.LoraConfig(r=2, target_modules=["qkv_proj", "gate_proj"]))
    ours.model.gates.requires_grad_(True)
    adapted(input_ids=ids, labels=ids).loss.backward()
    learn = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or "gates" in name for name in learn)
    assert any("fork_bias" in name for name in learn)
    assert all(p.grad is not None for name, p in adapted.named_parameters() if "lora_B" in name)
    with pytest.raises(ValueError, match="expected the weights of a model without adapters"):
        to_dense(ours)


@pytest.mark.long
def test_a_large_folder_is_never_held_twice(tmp_path: Path) -> None:
    """2 GiB in five shards; a process that does nothing else, and what it held at most."""
    source = tmp_path / "source"
    write = f"""
import torch
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(vocab_size=32000, hidden_size=2048, num_hidden_layers=16, num_attention_heads=32,
                     num_key_value_heads=8, intermediate_size=8192, max_position_embeddings=2048, dtype="bfloat16")
torch.set_default_dtype(torch.bfloat16)
LlamaForCausalLM(config).save_pretrained({str(source)!r}, max_shard_size="500MB")
"""
    convert = """
import resource, sys
from thoughtbubbles import retrofit, retrofit_folder, to_dense_folder
ways = {"there": retrofit_folder, "back": to_dense_folder, "in memory": lambda source, out: retrofit(source)}
kept = ways[sys.argv[1]](*sys.argv[2:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
    subprocess.run([sys.executable, "-c", write], check=True)
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    assert size > 1.9 * 2**30
    ways = (("in memory", source), ("there", source), ("back", tmp_path / "there"))
    for way, folder in ways:
        argv = [sys.executable, "-c", convert, way, str(folder), str(tmp_path / way)]
        peak = int(subprocess.run(argv, check=True, capture_output=True, text=True).stdout.split()[-1])
        assert peak <= 1.3 * size, way
    for name in ("config.json", "generation_config.json"):
        assert json.loads((source / name).read_text()) == json.loads((tmp_path / "back" / name).read_text())


# --- A real model ---

real = pytest.mark.skipif(not STORIES.is_dir(), reason="the pretrained model beside the checkout is absent")


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stories") / "out"
    retrofit_folder(STORIES, out)
    return out


@real
@pytest.mark.data
def test_a_real_model_writes_what_it_wrote(stories: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    ids = tokenizer("Once upon a time, there was a little girl named Lily.", return_tensors="pt").input_ids
    settings: dict[str, Any] = {"max_new_tokens": 200, "do_sample": False}
    wanted = AutoModelForCausalLM.from_pretrained(STORIES).generate(ids, **settings)
    assert wanted.shape[1] == ids.shape[1] + 200
    assert torch.equal(reads(stories).generate(ids, budget=1, **settings), wanted)


@real
@pytest.mark.data
def test_a_real_model_loses_little_by_new_gates(stories: Path) -> None:
    theirs, ours = AutoModelForCausalLM.from_pretrained(STORIES), reads(stories)
    starts = torch.full((16, 1), theirs.config.bos_token_id)
    texts = theirs.generate(starts, attention_mask=torch.ones_like(starts), pad_token_id=0, max_new_tokens=255,
                            min_new_tokens=255, do_sample=True, top_k=0)  # fmt: skip
    with torch.no_grad():
        losses = [model(texts, labels=texts).loss for model in (theirs, ours)]
        assert ours(texts, budget=2, output_streams=True).streams[-1].alive.sum() > 1.5 * texts.numel()
    assert abs(losses[1] - losses[0]) < 0.02
    assert losses[0] < 2


@real
@pytest.mark.data
def test_what_precedes_a_text_goes_into_data(stories: Path, tmp_path: Path) -> None:
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps({"text": f"Lily saw ball {i}."}) + "\n" for i in range(40)))
    prepare(tmp_path / "data", [str(tmp_path / "docs.jsonl")], tokenizer=str(stories), block_size=16, progress=False)
    data = load_prepared(tmp_path / "data")
    bos = AutoTokenizer.from_pretrained(STORIES).bos_token_id
    assert data.train[0]["input_ids"][0] == bos == data.manifest.tokenizer.separator_id
    assert data.train[:]["input_ids"].eq(bos).sum() >= data.manifest.train.documents - 1


# --- Refusals ---


def refused(source: Path, message: str, out: str = "out") -> None:
    """In one line, and nothing is left."""
    before = sorted(source.parent.iterdir())
    with pytest.raises(InputError, match=message) as error:
        retrofit_folder(source, source.parent / "new" / out)
    assert "\n" not in str(error.value)
    assert sorted(source.parent.iterdir()) == before


Change = Callable[[Path], None]


def config_says(drop: tuple[str, ...] = (), **fields: Any) -> Change:
    return lambda source: change(source, drop, **fields)


def writes(file: str, text: str) -> Change:
    def write(source: Path) -> None:
        (source / file).write_text(text)

    return write


def cuts(source: Path) -> None:
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


def stores(**tensors: Tensor | None) -> Change:
    """Other weights, by the end of their names; None is a missing one."""

    def write(source: Path) -> None:
        found = weights(source)
        for end, tensor in tensors.items():
            name = f"model.layers.1.{end.replace('__', '.')}"
            found.pop(name, None)
            if tensor is not None:
                found[name] = tensor
        save_file(found, source / "model.safetensors", metadata={"format": "pt"})

    return write


REFUSED: dict[str, tuple[Change, str]] = {
    "family": (config_says(model_type="gpt2"), "model_type='gpt2': expected one of llama, mistral, qwen2, qwen3"),
    "no family": (config_says(drop=("model_type",)), "model_type=None"),
    "families": (config_says(model_type=["llama"]), r"model_type=\['llama'\]: expected one of"),
    "settings": (writes("generation_config.json", "{"), "generation_config.json is damaged"),
    "quantized": (config_says(quantization_config={"bits": 4}), "quantization_config: expected"),
    "code": (config_says(auto_map={"AutoModel": "theirs.Theirs"}), "auto_map: it needs code of its own"),
    "sinks": (config_says(attention_sinks=4), "attention_sinks=4: expected attention without sinks"),
    "sink weights": (stores(self_attn__sinks=torch.ones(6)), "self_attn.sinks: expected attention without sinks"),
    "dynamic": (config_says(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "'dynamic'"),
    "longrope": (
        config_says(rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4,
                                     "long_factor": [2.0] * 4, "original_max_position_embeddings": 64}),
        "'longrope'",
    ),
    "no weights": (lambda source: (source / "model.safetensors").unlink(), "expected weights, model.safetensors or"),
    "cut weights": (cuts, "model.safetensors cannot be read"),
    "no tensor": (stores(mlp__up_proj__weight=None), "missing: model.layers.1.mlp.up_proj.weight"),
    "shape": (stores(mlp__up_proj__weight=torch.ones(3, 36)), r"up_proj.weight: of shape \[3, 36\], expected \[50"),
    "whole numbers": (
        stores(mlp__up_proj__weight=torch.ones(50, 36, dtype=torch.int8)),
        "up_proj.weight: of type int8, expected weights that are not quantized",
    ),
    "configuration": (writes("config.json", "{"), "config.json is damaged"),
    "field": (config_says(num_attention_heads="many"), "config.json"),
    "tokenizer": (writes("tokenizer.json", "{"), "its tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_by_name(name: str, folder: Path) -> None:
    alter, message = REFUSED[name]
    alter(folder)
    refused(folder, message)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("mistral", {"sliding_window": 64}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1, "layer_types": None}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 64,
                   "layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
    ],
)  # fmt: skip
def test_windows_shorter_than_the_positions(kind: str, fields: dict[str, Any], tmp_path: Path) -> None:
    model = dense(kind, **fields)
    model.save_pretrained(tmp_path / "source")
    refused(tmp_path / "source", "sliding_window=64: expected none, or at least max_position_embeddings=512")
    with pytest.raises(ValueError, match="sliding_window=64"):
        retrofit(model)
    wide = dense(kind, **{**fields, "sliding_window": 512})
    assert close(retrofit(wide)(random_ids(1, 20), budget=1).logits, wide(random_ids(1, 20)).logits)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    dense("qwen2").save_pretrained(tmp_path / "source", max_shard_size="5KB")
    shard = sorted((tmp_path / "source").glob("model-*.safetensors"))[1]
    shard.unlink()
    refused(tmp_path / "source", f"{shard.name} is missing: expected it, since model.safetensors.index.json names it")


def test_code_beside_a_tokenizer_is_not_run(folder: Path, tmp_path: Path) -> None:
    file = folder / "tokenizer_config.json"
    theirs = {"tokenizer_class": "Theirs", "auto_map": {"AutoTokenizer": [None, "t.Theirs"]}}
    file.write_text(json.dumps({**json.loads(file.read_text()), **theirs}))
    (folder / "t.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'mark')!r}).touch()")
    refused(folder, "its tokenizer: it needs Python code of its own, which is not run")
    assert not (tmp_path / "mark").exists()


def test_an_output_that_something_is_in(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "new" / "out").mkdir(parents=True)
    (tmp_path / "new" / "out" / "mine.txt").write_text("mine")
    refused(folder, "expected a new or empty folder")
    assert (tmp_path / "new" / "out" / "mine.txt").read_text() == "mine"


def test_no_source(tmp_path: Path) -> None:
    refused(tmp_path / "absent", r"absent: expected a folder with config\.json, or a hub model")


def test_the_way_back_of_others_is_refused(folder: Path, tmp_path: Path) -> None:
    ours = retrofit(dense("llama"))
    with pytest.raises(ValueError, match="dense_config=None: expected a model that was retrofitted"):
        to_dense(ThoughtbubblesForCausalLM(type(ours.config)(**{**ours.config.to_dict(), "dense_config": None})))
    ours.config.gate_scores = "learned"
    with pytest.raises(ValueError, match="gate_scores='learned': at budget 1 it is no dense model"):
        to_dense(ours)
    with pytest.raises(InputError, match="model_type is 'llama', expected 'thoughtbubbles'"):
        to_dense_folder(folder, tmp_path / "back")
