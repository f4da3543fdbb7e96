"""What a configuration costs: parameters, floating-point operations, memory.

Everything is computed from the static widths (method: State), so it is what a batch of any content costs: no weights,
no device. Shape letters: T tokens, N streams, D hidden size, H heads, G heads of keys and values, K head size, I width
of the MLP, V vocabulary.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

from .attention import attenuated_width, shares_keys
from .budget import Budget
from .configuration import ThoughtbubblesConfig
from .content import FORK_CHANNELS
from .loss import ROWS
from .rotary import turning_channels

__all__ = [
    "activation_bytes",
    "cache_bytes",
    "count_parameters",
    "decoding_flops",
    "dense_twin",
    "forward_flops",
    "layer_widths",
    "parameter_counts",
    "process_bytes",
    "state_bytes",
    "tokens_at_equal_flops",
    "training_flops",
]

ITEM_BYTES = {"float32": 4, "bfloat16": 2}
"""Bytes a number, by the name of the type."""
USABLE_MEMORY = 0.9
"""Share of a device's memory that is counted on: libraries and fragmentation take the rest."""
SHARDINGS = ("ddp", "fsdp")
# Log scores and all other state between layers, the masters of the weights, the loss (method: State, Gate).
WIDE = ITEM_BYTES["float32"]


def item_bytes(precision: str) -> int:
    """Bytes a number of the type `precision`.

    Raises:
        ValueError: if it is neither float32 nor bfloat16.
    """
    if precision not in ITEM_BYTES:
        raise ValueError(f"precision={precision!r}: expected one of {', '.join(ITEM_BYTES)}")
    return ITEM_BYTES[precision]


@dataclass(frozen=True)
class _Amounts:
    @property
    def total(self) -> int:
        """The sum of all fields."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class ParameterCounts(_Amounts):
    """Numbers that a model learns.

    Attributes:
        embedding: of the tokens, and of the unembedding if it is not tied.
        blocks: attention, MLP and norms, the final norm included.
        gates: norms, projections, fork embeddings and what attends for forks of all gates, or the pause vectors of
            routing `pause`.
    """

    embedding: int
    blocks: int
    gates: int


@dataclass(frozen=True)
class StateBytes(_Amounts):
    """Bytes that a training step needs whatever its rows are.

    Attributes:
        weights: float32 masters, whatever the precision.
        gradients: float32.
        optimizer: the two moments of AdamW, float32.
        casts: the bfloat16 copies of matrices that autocast keeps until the backward pass; 0 in float32.
        loss: the unembedding's gradient, float32, which is formed in the forward pass, its bfloat16 copy and the logits
            of the rows that are at work.
        exchange: what the exchange with other processes takes; 0 on one.
    """

    weights: int
    gradients: int
    optimizer: int
    casts: int
    loss: int
    exchange: int = 0


@dataclass(frozen=True)
class ActivationBytes(_Amounts):
    """Bytes of a training step for each row of a batch.

    Attributes:
        blocks: what autograd saves in the blocks; with gradient checkpointing their inputs alone.
        gates: what it saves in the gates.
        head: the same from the last block to the unembedding.
        loss: the gradient that the loss hands back, float32 whatever the precision.
        passing: held beside these for a while at the peak: a block that gradient checkpointing computes again.
    """

    blocks: int
    gates: int
    head: int
    loss: int
    passing: int

    @property
    def saved(self) -> int:
        """What autograd saves in a forward: all but `passing`."""
        return self.total - self.passing


def layer_widths(config: ThoughtbubblesConfig, length: int, budget: Budget | None = None) -> list[int]:
    """Streams that each block computes for a row of `length` tokens, as often as it is applied.

    It is the static width N' (method: State).
    """
    kappa = config.exact_budget(budget)
    widths: list[int] = []
    width = length
    for layer in range(config.depth):
        if layer in config.gated_layers:
            width = config.rule.width_after(width, length, kappa)
        elif layer in config.copied_layers:
            width *= int(kappa)
        widths.append(width)
    return widths


def dense_twin(config: ThoughtbubblesConfig) -> ThoughtbubblesConfig:
    """The same shape without gates and forks, its blocks applied once: the control."""
    twin = copy.deepcopy(config)
    twin.routing, twin.num_loops = "none", 1
    return twin


def parameter_counts(config: ThoughtbubblesConfig) -> ParameterCounts:
    """Parameters of `ThoughtbubblesForCausalLM(config)` by part, a tied embedding counted once."""
    hidden, norm = config.hidden_size, _norm_parameters(config)
    block = 2 * norm + 2 * config.head_dim * config.qk_norm + _block_matrix(config) + _block_biases(config)
    scored = hidden * (1 + config.use_bias) + 2 * hidden + (config.gate_start is not None)
    content = _content_matrix(config) + hidden * (1 + config.use_bias) * _is_attended(config)
    gate = hidden + (0 if config.gate_scores == "fixed" else scored) + content
    pauses = (int(config.exact_budget()) - 1) * hidden if config.rule.with_vectors else 0
    return ParameterCounts(
        embedding=config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2),
        blocks=config.num_hidden_layers * block + norm,
        gates=len(config.gated_layers) * gate + pauses,
    )


def count_parameters(config: ThoughtbubblesConfig) -> int:
    """Parameters of `ThoughtbubblesForCausalLM(config)`, a tied embedding counted once."""
    return parameter_counts(config).total


def forward_flops(config: ThoughtbubblesConfig, length: int, budget: Budget | None = None) -> int:
    """Floating-point operations of one forward over a row of `length` tokens; a multiply-add counts 2.

    Matrix products alone: projections, MLP, gates, unembedding, and attention over the whole N x N square, as
    FLOP counters and MFU conventions have it, with N the static width of each layer.

    torch's FlopCounterMode finds the same, but for the gates, whose products it does not see as such, and for the
    channels that attenuation `paper` appends to a head of K: they are bookkeeping of ours, 4 H N^2 operations a channel
    and layer, and are left out here. Of the fused attention for
    CPUs it counts nothing: there the plain one has to be asked for.
    """
    hidden, channels = config.hidden_size, config.num_attention_heads * config.head_dim
    entering = [length, *layer_widths(config, length, budget)]
    total = 0
    for layer, width in enumerate(entering[1:]):
        total += 2 * width * _block_matrix(config) + 4 * width * width * channels
        if layer in config.gated_layers and config.gate_scores != "fixed":
            total += 2 * entering[layer] * 2 * hidden
        if layer in config.gated_layers and _is_attended(config):
            total += 2 * (3 * entering[layer] + width) * FORK_CHANNELS * hidden
            total += 4 * entering[layer] ** 2 * FORK_CHANNELS
    decoded = entering[-1] if config.merge == "probability" else length
    return total + 2 * decoded * hidden * config.vocab_size


def training_flops(config: ThoughtbubblesConfig, length: int, budget: Budget | None = None) -> int:
    """Floating-point operations of a forward and backward over a row: the backward costs two forwards."""
    return 3 * forward_flops(config, length, budget)


def tokens_at_equal_flops(
    config: ThoughtbubblesConfig, reference: ThoughtbubblesConfig, length: int, tokens: int
) -> int:
    """Tokens that `reference` may train on for the training FLOPs that `config` spends on `tokens`, rounded down.

    Both train on rows of `length` tokens, each at its own budget. With a reference of routing `none` this is the
    control "dense with the same training FLOPs".
    """
    return tokens * training_flops(config, length) // training_flops(reference, length)


def decoding_flops(config: ThoughtbubblesConfig, context: int, budget: Budget | None = None) -> float:
    """Floating-point operations of one cached step: a new token that makes the context `context` tokens long.

    A mean over tokens: with N_l the streams of layer l for a row of `context` tokens, a token has n_l = N_l / context
    of them (1 before the first fork, about kappa after the last; at most 2^F with F fork layers), and costs

        sum over l of 2 n_l W + 4 n_l N_l H K [+ 4 n_(l-1) D where l has a gate] + 2 D V

    with W the entries of a block's matrices, 4 D^2 + 2 D I in the paper's, since each of its streams sees all N_l; the
    last term n_L times with merge `probability`. Where forks attend, a layer that has a gate costs
    2 C (3 n_(l-1) + n_l) D + 4 C n_(l-1) N_(l-1) more, with C the 64 channels of their head. That is a token's share of
    a forward over the whole context, which counts the whole square of attention. Steps differ, as tokens do; it is less
    where scores leave some of the budget unspent, and more in a batch, whose rows wait for that with the most streams.
    """
    return forward_flops(config, context, budget) / context


def cache_bytes(
    config: ThoughtbubblesConfig,
    context: int,
    budget: Budget | None = None,
    precision: str = "float32",
    device: str = "cuda",
) -> int:
    """Bytes of a `StreamCache` for each row of `context` tokens (method: Cache).

    A layer keeps for each of its streams G keys and values, as wide as they enter the product, and the token's
    ordinal (8 bytes); a fork layer keeps for each optional candidate its log score, ordinal and whether it was admitted
    (13 bytes), or where a threshold chooses the ordinal of each that was admitted. Where forks attend, it keeps a key,
    a value and the ordinal of each stream that enters it too. Memory grows in steps of `memory.BLOCK` entries, which
    may come on top; where scores leave some of the budget unspent, less is held.

    Args:
        precision: of the model's numbers, float32 or bfloat16.
        device: type of device, cuda or cpu: on GPUs heads are padded to a multiple of 8 channels.

    Raises:
        ValueError: for another precision.
    """
    entering = [context, *layer_widths(config, context, budget)]
    total = 0
    for layer, width in enumerate(entering[1:]):
        channels = config.num_key_value_heads * _head_width(config, layer, precision, device, cached=True)
        total += width * (2 * channels * item_bytes(precision) + 8)
        if layer in config.gated_layers:
            total += config.rule.memory.planned_bytes(2 * entering[layer] - context, width - context)
        if layer in config.gated_layers and _is_attended(config):
            channels = _head_width(_fork_head(config), layer - 1, precision, device, cached=True)
            total += entering[layer] * (2 * channels * item_bytes(precision) + 8)
    return total


def state_bytes(
    config: ThoughtbubblesConfig, precision: str = "float32", gradient_checkpointing: bool = False
) -> StateBytes:
    """Bytes of weights, gradients and AdamW's moments in training by one process.

    Args:
        precision: float32, or bfloat16 for float32 weights under autocast.
        gradient_checkpointing: the blocks' matrices are cast anew when the blocks are computed again.

    Raises:
        ValueError: for another precision.
    """
    parameters, item = count_parameters(config), item_bytes(precision)
    blocks = 0 if gradient_checkpointing else config.num_hidden_layers * _block_matrix(config)
    contents = len(config.gated_layers) * _content_matrix(config)
    unembedding = config.vocab_size * config.hidden_size
    narrow = 0 if item == WIDE else item
    return StateBytes(
        weights=WIDE * parameters,
        gradients=WIDE * parameters,
        optimizer=2 * WIDE * parameters,
        casts=narrow * (blocks + contents),
        loss=(WIDE + narrow) * (unembedding + ROWS * config.vocab_size),
    )


def process_bytes(
    config: ThoughtbubblesConfig,
    precision: str = "float32",
    gradient_checkpointing: bool = False,
    processes: int = 1,
    sharding: str = "ddp",
) -> StateBytes:
    """Bytes that one of several processes needs in a training step whatever its rows are.

    With `ddp` every process holds everything, and buckets as large as the gradients, in which they are averaged. With
    `fsdp` (FSDP2, a group for each block and one for the rest) it holds its share of weights, gradients and moments,
    and gathers the rest for the whole step, in float32, and in the precision of training a block while it is at work
    and the next one while it arrives; beside them the gradients of both groups before they are shared out, a block's
    in float32 too. The blocks' bfloat16 numbers are then the gathered ones, and what gates have of casts is kept.

    Args:
        precision: float32 or bfloat16.
        gradient_checkpointing: as in `state_bytes`.
        processes: how many there are; one alone shares nothing, whatever `sharding` is.
        sharding: `ddp` or `fsdp`.

    Raises:
        ValueError: for another precision or sharding.
    """
    if sharding not in SHARDINGS:
        raise ValueError(f"sharding={sharding!r}: expected one of {', '.join(SHARDINGS)}")
    whole = state_bytes(config, precision, gradient_checkpointing)
    if processes == 1:
        return whole
    if sharding == "ddp":
        return replace(whole, exchange=whole.gradients)
    block, rest = _groups(config)
    item = item_bytes(precision)
    return StateBytes(
        weights=-(-whole.weights // processes),
        gradients=-(-whole.gradients // processes),
        optimizer=-(-whole.optimizer // processes),
        casts=state_bytes(config, precision, gradient_checkpointing=True).casts,
        loss=whole.loss,
        exchange=WIDE * rest + item * 2 * block + WIDE * rest + item * block + WIDE * block,
    )


def largest_micro_batch(share: int, total: Callable[[int], int], usable: float) -> int | None:
    """Rows of the largest micro-batch that divides a device's share of the batch and fits; None if not even one does.

    Args:
        share: rows of the batch that one device gets.
        total: bytes of training with so many rows.
        usable: bytes of the device that are counted on.
    """
    divisors = (rows for rows in range(share, 0, -1) if share % rows == 0)
    return next((rows for rows in divisors if total(rows) <= usable), None)


def activation_bytes(
    config: ThoughtbubblesConfig,
    length: int,
    budget: Budget | None = None,
    precision: str = "float32",
    gradient_checkpointing: bool = False,
    device: str = "cuda",
) -> ActivationBytes:
    """Bytes that a training step keeps for the backward pass, for each row of `length` tokens.

    What autograd saves is counted tensor by tensor. It holds for fused attention, whose memory is linear in N, for
    activations that save their input alone, such as gelu, and without dropout and padding; attention in bfloat16 on a
    CPU saves less.

    Args:
        precision: float32, or bfloat16 for autocast, in which residuals, gates and the loss stay float32.
        device: type of device, cuda or cpu: how attention lays out its output, and heads as in `cache_bytes`.

    Raises:
        ValueError: for another precision.
    """
    entering = [length, *layer_widths(config, length, budget)]
    widths = entering[1:]
    blocks = [width * _saved_by_block(config, layer, precision, device) for layer, width in enumerate(widths)]
    # Cosines and sines are shared by the blocks up to the next fork, except for their casts.
    turning = {0, *config.gated_layers} if precision == "float32" or gradient_checkpointing else range(len(widths))
    channels = turning_channels(config) + turning_channels(config) % 2
    angles = sum(widths[layer] * channels * WIDE for layer in turning)
    loss, passing = _saved_by_loss(config, length, widths[-1]), 0
    if gradient_checkpointing:
        # By the time that the blocks are computed again, one after the other, the loss's are gone.
        passing = max(0, max(blocks) - loss)
        # The residual and the weight of updates, and log scores, which blocks share up to the next fork.
        blocks = [
            width * WIDE * (config.hidden_size + _saved_of_weights(config, layer)) for layer, width in enumerate(widths)
        ]
        bearing = [layer for layer in turning if _is_scored(config, layer) or _is_reserved(config)]
        blocks += [widths[layer] * WIDE for layer in bearing]
    return ActivationBytes(
        blocks=sum(blocks) + angles,
        gates=sum(
            _saved_by_gate(config, *entering[layer : layer + 2])
            + _saved_by_content(config, layer, entering, precision, device)
            for layer in config.gated_layers
        ),
        head=_saved_by_head(config, length, widths[-1], device),
        loss=loss,
        passing=passing,
    )


def _saved_by_block(config: ThoughtbubblesConfig, layer: int, precision: str, device: str) -> int:
    """Bytes that autograd saves in a block for each stream, angles apart."""
    hidden, item = config.hidden_size, item_bytes(precision)
    gated = config.mlp == "gated"
    numbers = (3 if gated and item < WIDE else 2) * hidden  # normed, before qkv_proj and up_proj; each casts its own
    numbers += (4 if gated else 2) * _inner(config)  # before and after the activation, what it gates, their product
    wide = (1 if config.parallel_residual else 2) * hidden  # before the norms
    wide += 2 * _saved_of_norm(config, device) + config.num_attention_heads  # of them, attention's logsumexp
    wide += _saved_of_weights(config, layer)
    if _is_scored(config, layer) and _learns_scores(config):
        numbers += (1 if config.parallel_residual else 2) * hidden  # the updates before they are weighed
    heads, heads_wide = _saved_by_heads(config, layer, precision, device)
    if device == "cpu" or _head_width(config, layer, precision, device) > config.head_dim:
        # The output by streams, before o_proj; on GPUs the same memory, if nothing is cut off.
        numbers += config.num_attention_heads * config.head_dim
    return (numbers + heads) * item + (wide + heads_wide) * WIDE


def _saved_by_heads(config: ThoughtbubblesConfig, layer: int, precision: str, device: str) -> tuple[int, int]:
    """Numbers that autograd saves for each stream of heads and their product, and those of them that are float32."""
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    width = _head_width(config, layer, precision, device)
    scored, learned = _is_scored(config, layer), _learns_scores(config)
    weighed = scored or _is_reserved(config)
    copied = groups != heads and not shares_keys(device, item_bytes(precision))
    read = heads if copied else groups  # heads of keys and values that the kernel reads
    numbers = (2 * heads + read) * width  # rotated queries and keys, the output
    if weighed or copied:
        numbers += read * width  # the values, times p
    wide = int(weighed)  # p of the values
    widens = device == "cpu" and item_bytes(precision) < WIDE  # the norm of heads, several steps there
    if (scored and learned) or not (weighed or copied) or (config.qk_norm and not widens):
        numbers += (heads + 2 * groups) * size  # qkv_proj's output, of which the values may be a view
    if config.qk_norm:
        normed = (heads + groups) * size
        numbers += normed * (device == "cpu" or item_bytes(precision) < WIDE)  # before the gain
        wide += heads + groups + normed * widens
    return numbers, wide


def _saved_of_norm(config: ThoughtbubblesConfig, device: str) -> int:
    """Numbers that autograd saves of a norm for each vector beside its input."""
    if config.norm == "layernorm":
        return 2
    return 1 + config.hidden_size * (device == "cpu")  # one kernel on a GPU, several steps on a CPU


def _saved_of_weights(config: ThoughtbubblesConfig, layer: int) -> int:
    """Numbers that autograd saves for each stream to weigh a layer's updates by."""
    if not any(fork <= layer for fork in config.gated_layers):
        return 0
    # p, what is alive, and their product; or the one that takes part.
    return 3 if _is_scored(config, layer) and _learns_scores(config) else 1


def _saved_by_gate(config: ThoughtbubblesConfig, before: int, after: int) -> int:
    """Bytes that autograd saves in a gate with so many streams before and after it, in float32 all."""
    # Before the norm, after it, of it; three steps of the log sigmoid and the scores.
    scoring = 2 * config.hidden_size + 2 + 4 * 2
    scored = _teaches_scores(config)
    # A fork's source, and how large it is, before and after a bound.
    sources = config.hidden_size + 2 if config.fork_embedding == "relative" else 0
    roots = before * (config.gate_scores == "forks")
    # An index of 8 bytes for residuals and one for scores, a number for forks, and what is alive.
    return before * scored * scoring * WIDE + roots + after * (8 + scored * 8 + (1 + sources) * WIDE + 1)


def _saved_by_content(
    config: ThoughtbubblesConfig, layer: int, entering: list[int], precision: str, device: str
) -> int:
    """Bytes that autograd saves of what attends for the forks of a layer; `entering` as many streams each has."""
    if not _is_attended(config):
        return 0
    hidden, item = config.hidden_size, item_bytes(precision)
    numbers, wide = _saved_by_heads(_fork_head(config), layer - 1, precision, device)
    numbers += hidden  # normed
    # Of the norm, attention's logsumexp, cosines and sines; before the norm, which a gate that learns saves too.
    wide += 2 + 1 + FORK_CHANNELS + (0 if _teaches_scores(config) else hidden)
    # What of the product belongs to each stream that leaves the layer.
    return entering[layer] * (numbers * item + wide * WIDE) + entering[layer + 1] * FORK_CHANNELS * item


def _saved_by_head(config: ThoughtbubblesConfig, length: int, width: int, device: str) -> int:
    """Bytes that autograd saves from the last block to the loss, and the token ids."""
    hidden, ids, of_norm = config.hidden_size, 8 * length, _saved_of_norm(config, device)
    if config.merge == "probability":
        return ids + width * (hidden + of_norm) * WIDE
    normed = width if config.merge == "residual-normed" else length
    saved = ids + (hidden + of_norm) * normed * WIDE  # before the norm, and of it
    if config.gated_layers or config.copied_layers:
        saved += width * (hidden * WIDE + 8)  # what is added up, and where
    if config.copied_layers:
        saved += width  # what is alive
    if config.merge == "root":
        return saved + width + (hidden * WIDE if config.gated_layers or config.copied_layers else 0)
    if config.gated_layers:
        saved += width * WIDE  # the weights
    if config.gated_layers and _learns_scores(config):
        saved += width * hidden * WIDE  # what is weighed
    if _is_shared(config):
        # Ordinals and p of the streams; the bubbles' sums, their logs and which are not 0.
        saved += width * (8 + WIDE) + (length + 1) * (2 * WIDE + 1)
    return saved


def _saved_by_loss(config: ThoughtbubblesConfig, length: int, width: int) -> int:
    """Bytes that autograd saves of the loss beside the unembedding's gradient: those of hidden states and scores."""
    if config.merge != "probability":
        return length * config.hidden_size * WIDE
    return width * (config.hidden_size + 1) * WIDE


def _head_width(config: ThoughtbubblesConfig, layer: int, precision: str, device: str, cached: bool = False) -> int:
    """The channels of a head as it enters the product of attention."""
    width = config.head_dim
    if config.attenuation == "paper" and _is_scored(config, layer):
        width = attenuated_width(width, item_bytes(precision), device, cached)
    return width


def _is_scored(config: ThoughtbubblesConfig, layer: int) -> bool:
    """Whether the log scores of a layer's streams attenuate it (method: Attenuation)."""
    return config.attenuation != "none" and any(fork <= layer for fork in config.gated_layers)


def _is_reserved(config: ThoughtbubblesConfig) -> bool:
    """Whether layers before the first fork have a channel for the log score, as the release does."""
    return config.attenuation == "released" and bool(config.gated_layers)


def _is_shared(config: ThoughtbubblesConfig) -> bool:
    """Whether the merge adds up to 1 what it weighs the streams of a token by."""
    chosen = config.merge == "residual" and config.attenuation != "released"
    return chosen and bool(config.gated_layers) and _learns_scores(config)


def _teaches_scores(config: ThoughtbubblesConfig) -> bool:
    """Whether scores that are learned have an effect that a gradient could pass."""
    return _learns_scores(config) and (config.attenuation != "none" or config.merge != "root")


def _learns_scores(config: ThoughtbubblesConfig) -> bool:
    """Whether a gradient reaches the log scores."""
    return config.gate_scores != "fixed"


def _is_attended(config: ThoughtbubblesConfig) -> bool:
    """Whether forks attend for what they bring along (method: Gate)."""
    return config.fork_content == "attended"


def _fork_head(config: ThoughtbubblesConfig) -> ThoughtbubblesConfig:
    """As if the blocks' heads were the one that attends for forks, whose scores are those of the layer before."""
    alike = copy.copy(config)
    alike.num_attention_heads = alike.num_key_value_heads = 1
    alike.head_dim, alike.qk_norm = FORK_CHANNELS, False
    return alike


def _content_matrix(config: ThoughtbubblesConfig) -> int:
    """Entries of the matrices that attend for the forks of a gate."""
    return 4 * FORK_CHANNELS * config.hidden_size * _is_attended(config)


def _block_matrix(config: ThoughtbubblesConfig) -> int:
    """Entries of a block's matrices: qkv_proj, o_proj, perhaps gate_proj, up_proj and down_proj."""
    channels = 2 * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    return config.hidden_size * (channels + (3 if config.mlp == "gated" else 2) * _inner(config))


def _block_biases(config: ThoughtbubblesConfig) -> int:
    """Numbers in the biases of a block's linear layers."""
    hidden, inner = config.hidden_size, _inner(config)
    attention = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    mlp = (2 if config.mlp == "gated" else 1) * inner + hidden
    sizes = {"attention": attention, "attention_output": hidden, "mlp": mlp}
    return sum(size for part, size in sizes.items() if config.has_bias(part))


def _norm_parameters(config: ThoughtbubblesConfig) -> int:
    """Of a block's norm."""
    return config.hidden_size * (1 + (config.norm == "layernorm" and config.use_bias))


def _inner(config: ThoughtbubblesConfig) -> int:
    return config.intermediate_size or 4 * config.hidden_size


def _groups(config: ThoughtbubblesConfig) -> tuple[int, int]:
    """Parameters of a block, and of all that is in no block."""
    parts, layers = parameter_counts(config), config.num_hidden_layers
    block = (parts.blocks - _norm_parameters(config)) // layers
    return block, parts.total - layers * block
