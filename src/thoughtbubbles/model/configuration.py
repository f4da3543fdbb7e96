"""Configuration of a Thoughtbubbles model and its presets."""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .budget import Budget, parse_budget
from .rotary import WITH_FIELDS, settle_rope, turning_channels
from .routing import Rule
from .rules import RULES

RANDOM_RULES = ("causal", "topk")
GATE_SCORES = ("learned", "forks", "fixed")
FORK_EMBEDDINGS = ("absolute", "relative")
FORK_EMBEDDING_INITS = ("uniform", "normal")
FORK_CONTENTS = ("embedding", "attended")
ATTENUATIONS = ("paper", "released", "none")
MERGES = ("residual", "residual-normed", "probability", "root")
NORMS = ("layernorm", "rmsnorm")
MLPS = ("plain", "gated")

Preset = Callable[[], dict[str, Any]]
PRESETS: dict[str, Preset] = {}


class ThoughtbubblesConfig(PreTrainedConfig):
    r"""Shape and rules of a Thoughtbubbles decoder.

    Args:
        vocab_size: tokens in the vocabulary (V).
        hidden_size: width of a residual stream (D).
        num_hidden_layers: number of blocks (L).
        num_attention_heads: heads of every attention (H).
        num_key_value_heads: heads of keys and values (G), each shared by H / G heads of queries; None is H.
        head_dim: size of a head (K); None is D / H, which must be even then.
        intermediate_size: width of the MLP; None is 4 D.
        hidden_act: activation of the MLP, a name that transformers knows; `gelu` is the erf one.
        mlp: `plain`, act(up(x)), or `gated`, act(gate(x)) * up(x), before the projection down (method: The block).
        norm: `layernorm` or `rmsnorm`, of the blocks and the last; the gates' is a LayerNorm (method: The block).
        use_bias: biases in the linear layers of the blocks, where the next three do not say, and in every LayerNorm.
        attention_bias: in the projection to queries, keys and values; None is `use_bias`.
        attention_output_bias: in the projection from heads; None is `use_bias`.
        mlp_bias: in the projections of the MLP; None is `use_bias`.
        layer_norm_eps: added to the variance in every LayerNorm, to the mean square in every RMSNorm.
        qk_norm: RMSNorm of each head's query and key before the rotary embedding.
        parallel_residual: attention and MLP read the same residual, and both updates are added to it.
        hidden_dropout: dropout probability on embeddings and on every residual update.
        rope_theta: base of the rotary frequencies (method: Positions).
        partial_rotary_factor: share of a head's channels, the first, that the rotary embedding turns.
        rope_parameters: of scaled rotary frequencies as transformers has them, such as
            {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, ...}; types `default`, `linear`, `llama3` and
            `yarn`. None is `default`. Its `rope_theta` and `partial_rotary_factor` go before the two fields above.
        max_position_embeddings: the longest row in tokens, padding included; longer input is a ValueError.
        initializer_range: standard deviation of normal initialisation; output projections into the residual
            stream use initializer_range / sqrt(2 L).
        fork_layers: 0-based indices of the layers whose input passes a gate and routing; None is a quarter,
            a half and three quarters of the depth. Without effect when routing is `none`, `copy` or `pause`.
        budget: streams per token that may exist, at least 1, taken as the exact rational of its decimal text
            (method: State). The default at run time; `forward(budget=...)` overrides it. A whole number when routing is
            `copy` or `pause`; no later budget of `pause` may be larger.
        routing: `causal` (exactly left to right), `threshold` (the same with a threshold in the place of ranks, which
            training sets), `topk` (the paper's, whole row) or `none` (dense); or a control that learns no choice:
            `random` and `uniform` (forks by a hash), `copy` (every token is `budget` streams) or `pause` (learned
            vectors follow every token).
        num_loops: how often all blocks are applied, one after the other, with the same weights each time: extra
            computation without extra parameters. 1 unless routing is `none`.
        random_rule: `causal` or `topk`: how `random` routes by its hash. Without effect otherwise.
        routing_seed: of the hash of `random` and `uniform`, from 0 to 2^32 - 1. Without effect otherwise.
        copy_layer: 0-based index of the layer at whose input `copy` makes its streams. Without effect otherwise.
        gate_scores: `learned`; `forks`: as learned, but keeping a root costs nothing, so that no root is ever
            attenuated; or the control `fixed`: every gate scores one half, whatever the stream (method: Gate).
        gate_start: the score in (0, 1) that a new gate gives to a fork, by a learned bias, such as 0.02 where a model
            learned without forks; None is no bias. Without effect where gate_scores is `fixed` (method: Gate).
        fork_embedding: `absolute`, or `relative`: scaled by the root mean square of the residual that it is added to,
            and drawn large, so that a fork is no copy of its source (method: Gate).
        fork_embedding_init: what an absolute one is drawn from: `uniform`, between 0 and 1 / sqrt(D), or `normal`, of
            variance 1 / D around 0 (method: Gate). Without effect where fork_embedding is `relative`.
        fork_content: `embedding`, or `attended`: beside the embedding a fork gets what a head of 64 channels attends to
            among the streams that enter its layer (method: Gate). Without effect where there are no gates, and so no
            forks: routing `none`, `copy` or `pause`, or no fork layers.
        attenuation: `paper`, `released` or `none` (method: Attenuation).
        merge: `residual`, `residual-normed`, `probability` or `root` (method: Merge). For `copy` and `pause`, whose
            streams have no scores, all but `root` take the mean over the streams of a token.
        tie_word_embeddings: the unembedding is the embedding.
        bos_token_id, eos_token_id, pad_token_id: token ids of the vocabulary, or None. eos_token_id may be several.
            A pad_token_id of -1, which some configurations write for none, becomes None.
        use_cache: what `forward` and `generate` do where they are not told; None is no and yes.
        dense_config: the configuration of the dense model that this one was made of, written by `retrofit` and read by
            `to_dense`; None for others.

    Raises:
        ValueError: naming the field, the value and what is allowed.
    """

    model_type = "thoughtbubbles"
    keys_to_ignore_at_inference = ["cache", "past_key_values", "streams"]

    vocab_size: int = 50257
    hidden_size: int = 768
    num_hidden_layers: int = 16
    num_attention_heads: int = 12
    num_key_value_heads: int = None  # type: ignore[assignment]  # None is settled below
    head_dim: int = None  # type: ignore[assignment]
    intermediate_size: int | None = None
    hidden_act: str = "gelu"
    mlp: str = "plain"
    norm: str = "layernorm"
    use_bias: bool = True
    attention_bias: bool | None = None
    attention_output_bias: bool | None = None
    mlp_bias: bool | None = None
    layer_norm_eps: float = 1e-5
    qk_norm: bool = False
    parallel_residual: bool = False
    hidden_dropout: float = 0.0
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 1.0
    rope_parameters: dict[str, Any] | None = None
    max_position_embeddings: int = 1024
    initializer_range: float = 0.02
    fork_layers: list[int] | None = None
    budget: Budget = 2.0
    routing: str = "causal"
    num_loops: int = 1
    random_rule: str = "causal"
    routing_seed: int = 0
    copy_layer: int = 0
    gate_scores: str = "learned"
    gate_start: float | None = None
    fork_embedding: str = "absolute"
    fork_embedding_init: str = "uniform"
    fork_content: str = "embedding"
    attenuation: str = "paper"
    merge: str = "residual"
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    use_cache: bool | None = None
    dense_config: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        _check_integers(
            self,
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
        )
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        for field, settled in (
            ("num_key_value_heads", lambda: self.num_attention_heads),
            ("head_dim", self._divided_width),
        ):
            if getattr(self, field) is None:
                setattr(self, field, settled())
        if self.fork_layers is None:
            self.fork_layers = default_fork_layers(self.num_hidden_layers)
        if isinstance(self.budget, Fraction):
            self.budget = str(self.budget)
        _check_integers(self, "intermediate_size", "num_key_value_heads", "head_dim")
        self._check_shape()
        self._check_rules()
        self._check_numbers()
        self._settle_positions(kwargs)
        self._check_special_tokens()
        super().__post_init__(**kwargs)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "ThoughtbubblesConfig":
        """The configuration of a named size, with any field overridden.

        Raises:
            ValueError: for an unknown name.
        """
        if name not in PRESETS:
            raise _invalid("preset", name, f"one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name](), **overrides})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, which sets the fields among `kwargs` afterwards, where nothing checks them.

        Raises:
            ValueError: as the constructor.
        """
        fields = {name: kwargs.pop(name) for name in list(kwargs) if name in cls.__annotations__}
        stored = config_dict.get("rope_parameters")
        if isinstance(stored, dict):  # what is asked for now goes before it
            kept = {key: value for key, value in stored.items() if key not in WITH_FIELDS or key not in fields}
            config_dict = {**config_dict, "rope_parameters": kept}
        return super().from_dict({**config_dict, **fields}, **kwargs)

    @property
    def depth(self) -> int:
        """The blocks that a token passes: `num_hidden_layers`, `num_loops` times."""
        return self.num_hidden_layers * self.num_loops

    @property
    def rule(self) -> Rule:
        """The routing rule."""
        rule = RULES[self.routing]
        return rule if rule.settled is None else rule.settled(self)

    @property
    def gated_layers(self) -> tuple[int, ...]:
        """The layers that have a gate: the fork layers, none when routing is `none`, `copy` or `pause`."""
        return () if self.rule.router is None else tuple(self.fork_layers or ())

    @property
    def copied_layers(self) -> tuple[int, ...]:
        """The layer at whose input `copy` or `pause` makes its streams, if that is the routing."""
        return () if self.rule.copied_at is None else (self.rule.copied_at(self),)

    @property
    def leaks(self) -> bool:
        """Whether one forward over a text lets predictions depend on later tokens: no left-to-right likelihood."""
        return self.rule.leaks and bool(self.gated_layers)

    @property
    def has_row_budgets(self) -> bool:
        """Whether each row of a batch may have its own budget; the release merges otherwise at budget 1."""
        return self.rule.router is not None and not self.leaks and self.attenuation != "released"

    def exact_budget(self, override: Budget | None = None) -> Fraction:
        """The budget of a call as an exact rational: `override`, or else the configured one.

        Raises:
            ValueError: if it is no budget, or one that routing `copy` or `pause` cannot have.
        """
        given = self.budget if override is None else override
        budget = parse_budget(given)
        if self.copied_layers and budget.denominator != 1:
            raise _invalid("budget", given, f"a whole number of streams per token, since routing is {self.routing}")
        if self.rule.with_vectors and budget > (most := parse_budget(self.budget)):
            raise _invalid("budget", given, f"at most {most}, for which there are pause vectors")
        return budget

    def has_bias(self, part: str) -> bool:
        """Whether there is a bias in `attention`, to queries, keys and values, in `attention_output` or in `mlp`."""
        own: bool | None = getattr(self, f"{part}_bias")
        return self.use_bias if own is None else own

    def convert_rope_params_to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """A step of transformers' own construction; ours settles the rotary parameters."""
        return kwargs

    def _settle_positions(self, kwargs: dict[str, Any]) -> None:
        """Check the rotary parameters; what two of them say that have fields of their own goes there."""
        if (older := kwargs.pop("rope_scaling", None)) is not None:
            raise _invalid("rope_scaling", older, "rope_parameters, its name since transformers 5")
        given = self.rope_parameters
        if given is not None:
            try:
                settled = settle_rope(given, self.max_position_embeddings)
            except ValueError as error:
                raise _invalid("rope_parameters", given, str(error)) from None
            for field in WITH_FIELDS:
                setattr(self, field, settled.setdefault(field, getattr(self, field)))
            self.rope_parameters = None if settled["rope_type"] == "default" else settled
        _check_number(self, "rope_theta", lambda v: v > 0, "a number above 0")
        _check_number(self, "partial_rotary_factor", lambda v: 0 < v <= 1, "a share above 0 and at most 1")
        turning = turning_channels(self)
        if turning == 0:
            allowed = f"a share of at least 1 / {self.head_dim}, one channel of a head (head_dim)"
            raise _invalid("partial_rotary_factor", self.partial_rotary_factor, allowed)
        if turning % 2 and (self.rope_parameters or {}).get("rope_type") == "yarn":
            allowed = f"a share of head_dim={self.head_dim} that is an even number of channels, as yarn needs"
            raise _invalid("partial_rotary_factor", self.partial_rotary_factor, allowed)
        if turning + turning % 2 > self.head_dim:
            raise _invalid("head_dim", self.head_dim, "an even number, since all its channels turn, in pairs")

    def _divided_width(self) -> int:
        if self.hidden_size % (2 * self.num_attention_heads):
            raise _invalid(
                "hidden_size",
                self.hidden_size,
                f"a multiple of 2 * num_attention_heads = {2 * self.num_attention_heads}, or a head_dim",
            )
        return self.hidden_size // self.num_attention_heads

    def _check_shape(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            allowed = f"a divisor of num_attention_heads = {self.num_attention_heads}"
            raise _invalid("num_key_value_heads", self.num_key_value_heads, allowed)
        layers = self.fork_layers
        allowed = f"distinct 0-based layers in ascending order, each below num_hidden_layers={self.num_hidden_layers}"
        if not isinstance(layers, list | tuple) or not all(type(layer) is int for layer in layers):
            raise _invalid("fork_layers", layers, f"a list of {allowed}")
        if list(layers) != sorted(set(layers)) or any(not 0 <= i < self.num_hidden_layers for i in layers):
            raise _invalid("fork_layers", layers, allowed)
        self.fork_layers = list(layers)
        if type(self.copy_layer) is not int or not 0 <= self.copy_layer < self.num_hidden_layers:
            allowed = f"a 0-based layer below num_hidden_layers={self.num_hidden_layers}"
            raise _invalid("copy_layer", self.copy_layer, allowed)

    def _check_numbers(self) -> None:
        _check_number(self, "layer_norm_eps", lambda v: v > 0, "a number above 0")
        _check_number(self, "initializer_range", lambda v: v >= 0, "a number of at least 0")
        _check_number(self, "hidden_dropout", lambda v: 0 <= v < 1, "a probability in [0, 1)")
        if self.gate_start is not None:
            _check_number(self, "gate_start", lambda v: 0 < v < 1, "None or a score above 0 and below 1")
        if type(self.routing_seed) is not int or not 0 <= self.routing_seed < 2**32:
            raise _invalid("routing_seed", self.routing_seed, "a whole number from 0 to 2^32 - 1")
        self.exact_budget()

    def _check_rules(self) -> None:
        for field, allowed in (
            ("routing", tuple(RULES)),
            ("random_rule", RANDOM_RULES),
            ("gate_scores", GATE_SCORES),
            ("fork_embedding", FORK_EMBEDDINGS),
            ("fork_embedding_init", FORK_EMBEDDING_INITS),
            ("fork_content", FORK_CONTENTS),
            ("attenuation", ATTENUATIONS),
            ("merge", MERGES),
            ("norm", NORMS),
            ("mlp", MLPS),
        ):
            if getattr(self, field) not in allowed:
                raise _invalid(field, getattr(self, field), f"one of {', '.join(allowed)}")
        _check_integers(self, "num_loops")
        if self.num_loops > 1 and not self.rule.is_dense:
            raise _invalid("num_loops", self.num_loops, f"1, since routing is {self.routing}")
        for field in ("use_bias", "qk_norm", "parallel_residual", "tie_word_embeddings"):
            if type(getattr(self, field)) is not bool:
                raise _invalid(field, getattr(self, field), "True or False")
        for field in ("use_cache", "attention_bias", "attention_output_bias", "mlp_bias"):
            if getattr(self, field) is not None and type(getattr(self, field)) is not bool:
                raise _invalid(field, getattr(self, field), "True, False or None")
        described = self.dense_config
        if described is not None and not (isinstance(described, dict) and "model_type" in described):
            raise _invalid("dense_config", described, "None, or a configuration with its model_type")
        if not isinstance(self.hidden_act, str) or self.hidden_act not in ACT2FN:
            raise _invalid("hidden_act", self.hidden_act, f"one of {', '.join(sorted(ACT2FN))}")

    def _check_special_tokens(self) -> None:
        if self.pad_token_id == -1:
            self.pad_token_id = None
        for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, field)
            several = field == "eos_token_id" and isinstance(value, list | tuple)
            ids = value if several else [] if value is None else [value]
            if not all(type(token) is int and 0 <= token < self.vocab_size for token in ids):
                raise _invalid(field, value, f"None or a token id from 0 to {self.vocab_size - 1} (vocab_size - 1)")


def default_fork_layers(num_hidden_layers: int) -> list[int]:
    """Fork layers after a quarter, a half and three quarters of the blocks: [3, 7, 11] of 16."""
    layers = {num_hidden_layers * quarter // 4 - 1 for quarter in (1, 2, 3)}
    return sorted(layer for layer in layers if layer >= 0) or [0]


def _invalid(field: str, value: object, allowed: str) -> ValueError:
    return ValueError(f"{field}={value!r}: expected {allowed}")


def _check_integers(config: ThoughtbubblesConfig, *fields: str) -> None:
    for field in fields:
        value = getattr(config, field)
        if type(value) is not int or value < 1:
            raise _invalid(field, value, "a whole number of at least 1")


def _check_number(config: ThoughtbubblesConfig, field: str, valid: Callable[[float], bool], allowed: str) -> None:
    value = getattr(config, field)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not valid(value):
        raise _invalid(field, value, allowed)


def _preset(name: str) -> Callable[[Preset], Preset]:
    def register(preset: Preset) -> Preset:
        PRESETS[name] = preset
        return preset

    return register


def _shape(layers: int, hidden: int, heads: int, forks: list[int], tokens: int = 1024) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "fork_layers": forks,
        "max_position_embeddings": tokens,
    }


@_preset("nano")
def _nano() -> dict[str, Any]:
    """6 layers x 128, the shape of `make demo`: 1,453,952 parameters (vocabulary 2,048)."""
    return {"vocab_size": 2048, **_shape(6, 128, 4, [1, 2, 4], 512)}


@_preset("micro")
def _micro() -> dict[str, Any]:
    """8 layers x 192, trains on a laptop in minutes: 4,348,608 parameters (vocabulary 4,096)."""
    return {"vocab_size": 4096, **_shape(8, 192, 6, [2, 4, 6], 512)}


@_preset("mini")
def _mini() -> dict[str, Any]:
    """8 layers x 512, for one small GPU: 50,959,360 parameters (vocabulary 50,257)."""
    return _shape(8, 512, 8, [2, 4, 6])


@_preset("150m")
def _150m() -> dict[str, Any]:
    """16 layers x 768, the closest shape to the paper's 150M: 152,016,384 parameters."""
    return _shape(16, 768, 12, [3, 7, 11])


@_preset("319m")
def _319m() -> dict[str, Any]:
    """21 layers x 1024, the closest shape to the paper's 319M: 316,001,280 parameters."""
    return _shape(21, 1024, 16, [3, 7, 11])


@_preset("530m")
def _530m() -> dict[str, Any]:
    """38 layers x 1024, the closest shape to the paper's 530M: 530,137,088 parameters."""
    return _shape(38, 1024, 16, [3, 7, 11])


@_preset("772m")
def _772m() -> dict[str, Any]:
    """36 layers x 1280, the released shape: 772,738,560 parameters."""
    return _shape(36, 1280, 20, [3, 7, 11])


@_preset("1.9b")
def _1_9b() -> dict[str, Any]:
    """36 layers x 2048, the released shape: 1,915,858,944 parameters."""
    return _shape(36, 2048, 16, [2, 5, 8])


def _llama(groups: int, inner: int, theta: float = 10000.0) -> dict[str, Any]:
    """The block of today's models: RMSNorm, gated MLP, grouped heads of 64 channels, QK-norm, no biases."""
    return {
        "num_key_value_heads": groups,
        "head_dim": 64,
        "intermediate_size": inner,
        "hidden_act": "silu",
        "mlp": "gated",
        "norm": "rmsnorm",
        "use_bias": False,
        "layer_norm_eps": 1e-6,
        "qk_norm": True,
        "rope_theta": theta,
    }


@_preset("small-llama")
def _small_llama() -> dict[str, Any]:
    """8 layers x 256 with a Llama's block, for a laptop: 7,348,480 parameters (vocabulary 4,096)."""
    return {"vocab_size": 4096, **_shape(8, 256, 4, [2, 4, 6], 512), **_llama(2, 768)}


@_preset("360m-llama")
def _360m_llama() -> dict[str, Any]:
    """32 layers x 960 with a Llama's block, as SmolLM's 360M: 362,897,536 parameters (vocabulary 50,257)."""
    return {**_shape(32, 960, 15, [7, 15, 23], 2048), **_llama(5, 2560)}


@_preset("1b-llama")
def _1b_llama() -> dict[str, Any]:
    """16 layers x 2048 with a Llama's block, as Llama 3.2's 1B: 1,076,099,072 parameters (vocabulary 50,257)."""
    return {**_shape(16, 2048, 32, [3, 7, 11], 4096), **_llama(8, 8192, 500000.0)}


ThoughtbubblesConfig.register_for_auto_class()
