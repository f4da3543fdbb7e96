"""The families of dense models that can become Thoughtbubbles models: their configurations and the names of weights.

A dense model of another class is the same function under other names: some of its matrices are joined into one of
ours, or hold the same rows in another order (method: Retrofit).

Shape letters: D hidden size, H heads of queries, G heads of keys and values, K head size.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from thoughtbubbles.model.configuration import ThoughtbubblesConfig
from thoughtbubbles.model.rotary import OPTIONAL, REQUIRED

COMMON = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
          "max_position_embeddings", "initializer_range", "tie_word_embeddings")  # fmt: skip
"""Fields of one name and meaning in all families and in ours."""
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
QKV = "attention.qkv_proj"
_OURS = re.compile(r"(?:model\.)?(layers\.\d+\.)?(.+)\.(weight|bias)")


@dataclass(frozen=True)
class Family:
    """How a class of transformers writes a dense model down.

    Attributes:
        fields: of our configuration, what this class alone says of the block.
        prefix: of the names of all weights but the head's.
        heads: names of the module that decodes, the one in files first.
        modules: the names of our modules, inside a block where they are in one, to theirs, which are joined.
        interleaved: whether the rows of q, k and v stand head by head, not one after the other.
        unused: patterns of tensors that older folders hold and nobody reads.
    """

    fields: Callable[[Any], dict[str, Any]]
    prefix: str
    heads: tuple[str, ...]
    modules: Mapping[str, tuple[str, ...]]
    interleaved: bool = False
    unused: tuple[str, ...] = (r"rotary_emb\.inv_freq$",)

    def names(self, ours: str) -> list[str]:
        """Their names of the tensors that one of ours is joined of."""
        match = _OURS.fullmatch(ours)
        assert match is not None
        block, module, kind = match.groups(default="")
        if module == "lm_head":
            return [f"{self.heads[0]}.{kind}"]
        return [f"{self.prefix}{block}{name}.{kind}" for name in self.modules[module]]

    def full_name(self, stored: str, shorter: bool) -> str:
        """The name in files of the class with a head, where `shorter` ones are stored that the class without has."""
        head, _, rest = stored.partition(".")
        if head in self.heads:
            return f"{self.heads[0]}.{rest}"
        return self.prefix + stored if shorter else stored

    def join(self, ours: str, parts: list[Tensor], config: ThoughtbubblesConfig) -> Tensor:
        """Our tensor of theirs."""
        if f".{QKV}." not in ours:
            return parts[0]
        if not self.interleaved:
            return torch.cat(parts)
        return _regrouped(parts[0], config.num_attention_heads, 3)

    def split(self, ours: str, tensor: Tensor, config: ThoughtbubblesConfig) -> list[Tensor]:
        """Their tensors of ours: what `join` undoes."""
        if f".{QKV}." not in ours:
            return [tensor]
        if self.interleaved:
            return [_regrouped(tensor, 3, config.num_attention_heads)]
        heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        return list(tensor.split([count * config.head_dim for count in heads]))

    def is_unused(self, theirs: str) -> bool:
        """Whether a tensor is one that their class has no use for by its nature."""
        return any(re.search(pattern, theirs) for pattern in self.unused)


def _regrouped(rows: Tensor, outer: int, inner: int) -> Tensor:
    """Rows [outer inner K, ...] that stand by `outer` first and then by `inner`, the other way round."""
    grouped = rows.reshape(outer, inner, -1, *rows.shape[1:])
    return grouped.transpose(0, 1).reshape(rows.shape).contiguous()


def _gated(config: Any, attention_bias: bool, output_bias: bool, **others: Any) -> dict[str, Any]:
    """The block of the Llamas: RMSNorm, gated MLP, grouped heads."""
    return {
        "norm": "rmsnorm",
        "mlp": "gated",
        "use_bias": False,
        "attention_bias": attention_bias,
        "attention_output_bias": output_bias,
        "layer_norm_eps": config.rms_norm_eps,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        **others,
    }


def _gpt_neox(config: Any) -> dict[str, Any]:
    return {
        "norm": "layernorm",
        "mlp": "plain",
        "use_bias": True,
        "attention_bias": config.attention_bias,
        "attention_output_bias": config.attention_bias,
        "layer_norm_eps": config.layer_norm_eps,
        "hidden_dropout": config.hidden_dropout,
        "parallel_residual": config.use_parallel_residual,
        "head_dim": config.hidden_size // config.num_attention_heads,
    }


_LLAMA_MODULES = {
    "embed_tokens": ("embed_tokens",),
    "norm": ("norm",),
    "attention_norm": ("input_layernorm",),
    QKV: ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.q_norm": ("self_attn.q_norm",),
    "attention.k_norm": ("self_attn.k_norm",),
    "attention.o_proj": ("self_attn.o_proj",),
    "mlp_norm": ("post_attention_layernorm",),
    "mlp.gate_proj": ("mlp.gate_proj",),
    "mlp.up_proj": ("mlp.up_proj",),
    "mlp.down_proj": ("mlp.down_proj",),
}
_NEOX_MODULES = {
    "embed_tokens": ("embed_in",),
    "norm": ("final_layer_norm",),
    "attention_norm": ("input_layernorm",),
    QKV: ("attention.query_key_value",),
    "attention.o_proj": ("attention.dense",),
    "mlp_norm": ("post_attention_layernorm",),
    "mlp.up_proj": ("mlp.dense_h_to_4h",),
    "mlp.down_proj": ("mlp.dense_4h_to_h",),
}


def _llama(fields: Callable[[Any], dict[str, Any]]) -> Family:
    return Family(fields, "model.", ("lm_head",), _LLAMA_MODULES)


FAMILIES = {
    "llama": _llama(lambda c: _gated(c, c.attention_bias, c.attention_bias, mlp_bias=c.mlp_bias)),
    "mistral": _llama(lambda c: _gated(c, False, False)),
    "qwen2": _llama(lambda c: _gated(c, True, False)),
    "qwen3": _llama(lambda c: _gated(c, c.attention_bias, c.attention_bias, qk_norm=True)),
    "gpt_neox": Family(
        _gpt_neox,
        "gpt_neox.",
        ("embed_out", "lm_head"),
        _NEOX_MODULES,
        interleaved=True,
        unused=(r"rotary_emb\.inv_freq$", r"attention\.bias$", r"attention\.masked_bias$"),
    ),
}


def check_supported(said: Mapping[str, Any]) -> None:
    """Check what a configuration says, as it is written or as a class has completed it, for what we do not compute.

    Raises:
        ValueError: naming the field, its value and what was expected.
    """
    kind = said.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(f"model_type={kind!r}: expected one of {', '.join(FAMILIES)}")
    for field in ("quantization_config", "compression_config"):
        if said.get(field) is not None:
            raise ValueError(f"{field}: expected weights that are not quantized")
    if said.get("auto_map"):
        raise ValueError("auto_map: it needs code of its own, which is not run: expected a class of transformers")
    for field, value in said.items():
        if "sink" in field and value:
            raise ValueError(f"{field}={value!r}: expected attention without sinks")


def fields_of(dense: PreTrainedConfig) -> dict[str, Any]:
    """The fields of our configuration that a dense model's decides.

    Raises:
        ValueError: naming what we do not compute.
    """
    check_supported({**dense.to_dict(), "model_type": dense.model_type})
    _check_windows(dense)
    own = FAMILIES[dense.model_type].fields(dense)
    tokens = {name: _in_vocabulary(getattr(dense, name, None), dense.vocab_size) for name in SPECIAL_TOKENS}
    return {**{name: getattr(dense, name) for name in COMMON}, **own, **tokens, "rope_parameters": _rope(dense)}


def _check_windows(dense: PreTrainedConfig) -> None:
    """Refuse attention that does not reach as far back as the longest row."""
    kinds = getattr(dense, "layer_types", None)
    others = {kind for kind in kinds or () if kind != "full_attention"}
    if others - {"sliding_attention"}:
        raise ValueError(f"layer_types: {', '.join(sorted(others))}: expected full_attention")
    window, longest = getattr(dense, "sliding_window", None), dense.max_position_embeddings
    windowed = bool(others) if kinds is not None else dense.model_type == "mistral"
    if windowed and (others or window is not None) and (window is None or window < longest):
        raise ValueError(
            f"sliding_window={window}: expected none, or at least max_position_embeddings={longest}, the longest row"
        )


def _rope(dense: PreTrainedConfig) -> dict[str, Any]:
    """The rotary parameters that the dense model's class reads; which of them there can be is our configuration's."""
    given = {name: value for name, value in (dense.rope_parameters or {}).items() if value is not None}
    if any(isinstance(value, dict) for value in given.values()):
        raise ValueError("rope_parameters: expected one rule for all layers")
    kind = given["rope_type"]
    if kind == "yarn":
        given.setdefault("factor", dense.max_position_embeddings / given["original_max_position_embeddings"])
    if dense.model_type != "gpt_neox" and (share := given.pop("partial_rotary_factor", 1)) != 1 and kind != "default":
        # By default these classes do not read it; by the other types it breaks them.
        raise ValueError(f"partial_rotary_factor={share}: expected 1 for {dense.model_type} with rope_type={kind!r}")
    read = {"rope_type", "rope_theta", "partial_rotary_factor", *REQUIRED.get(kind, given)}
    # Of what is optional, transformers takes 0 for not given.
    read |= {name for name in OPTIONAL.get(kind, {}) if given.get(name) or name == "truncate"}
    return {name: value for name, value in given.items() if name in read}


def _in_vocabulary(ids: Any, size: int) -> Any:
    """The ids that are tokens: others can neither be read nor predicted."""
    if isinstance(ids, list | tuple):
        return [token for token in ids if 0 <= token < size] or None
    return ids if ids is not None and 0 <= ids < size else None
