"""Reading checkpoints of the authors' PyTorch release."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from thoughtbubbles.model.budget import Budget
from thoughtbubbles.model.configuration import ThoughtbubblesConfig

_LAYER_NAMES = {
    "ln_1": "layers.{}.attention_norm",
    "attn.c_attn": "layers.{}.attention.qkv_proj",
    "attn.c_proj": "layers.{}.attention.o_proj",
    "ln_2": "layers.{}.mlp_norm",
    "mlp.c_fc": "layers.{}.mlp.up_proj",
    "mlp.c_proj": "layers.{}.mlp.down_proj",
    "forking_ln": "gates.{}.norm",
    "forking_score": "gates.{}.projection",
    "fork_embedding": "gates.{}.fork_embedding",
}
_TOP_NAMES = {
    "transformer.wte.weight": "model.embed_tokens.weight",
    "transformer.ln_f.weight": "model.norm.weight",
    "transformer.ln_f.bias": "model.norm.bias",
    "lm_head.weight": "lm_head.weight",
}


def convert_released_state_dict(
    state_dict: Mapping[str, Tensor], num_attention_heads: int, budget: Budget = 2, **overrides: Any
) -> tuple[ThoughtbubblesConfig, dict[str, Tensor]]:
    """Configuration and weights of ours that compute what a released checkpoint computes.

    Args:
        state_dict: names as in the release (`transformer.h.0.attn.c_attn.weight`, ...), with or without the
            prefixes that `torch.compile` and DDP put in front.
        num_attention_heads: of the released model; no weight's shape tells it.
        budget: its max_block_size / block_size.
        overrides: further configuration fields, such as `merge="root"` for a release run with its `rightmost`
            averaging, or `max_position_embeddings`.

    Returns:
        The configuration (released attenuation, top-k routing, merge `residual-normed`) and the state dict for
        `ThoughtbubblesForCausalLM(config).load_state_dict`.

    Raises:
        ValueError: for a name that the release does not have, or a missing embedding.
    """
    plain = {re.sub(r"^((_orig_mod|module)\.)+", "", name): value for name, value in state_dict.items()}
    weights = {_rename(name): value for name, value in plain.items()}
    embedding = weights.get("model.embed_tokens.weight")
    if embedding is None:
        raise ValueError("state dict without transformer.wte.weight: expected one of the authors' release")
    weights.setdefault("lm_head.weight", embedding)
    gated = sorted({int(name.split(".")[2]) for name in weights if name.startswith("model.gates.")})
    settings = {
        "vocab_size": embedding.shape[0],
        "hidden_size": embedding.shape[1],
        "num_hidden_layers": 1 + max(int(n.split(".")[2]) for n in weights if n.startswith("model.layers.")),
        "num_attention_heads": num_attention_heads,
        "intermediate_size": weights["model.layers.0.mlp.up_proj.weight"].shape[0],
        "use_bias": "model.norm.bias" in weights,
        "fork_layers": gated,
        "budget": budget,
        "routing": "topk" if gated else "none",
        "attenuation": "released",
        "merge": "residual-normed",
    }
    return ThoughtbubblesConfig(**{**settings, **overrides}), weights


def _rename(name: str) -> str:
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    match = re.fullmatch(r"transformer\.h\.(\d+)\.(.+?)(\.weight|\.bias)?", name)
    if match is None or match[2] not in _LAYER_NAMES:
        raise ValueError(f"{name!r}: not a name of the authors' release, such as 'transformer.h.0.attn.c_attn.weight'")
    return "model." + _LAYER_NAMES[match[2]].format(match[1]) + (match[3] or "")
