"""What a configuration costs: parameters and floating-point operations (Design 4)."""

from .budget import Budget
from .configuration import ThoughtbubblesConfig
from .routing import width_after_routing


def layer_widths(config: ThoughtbubblesConfig, length: int, budget: Budget | None = None) -> list[int]:
    """Streams that each block computes for a row of `length` tokens: the static width N' of Design 3.1."""
    kappa = config.exact_budget(budget)
    widths: list[int] = []
    width = length
    for layer in range(config.num_hidden_layers):
        if layer in config.gated_layers:
            width = width_after_routing(config.admission_rule, width, length, kappa)
        elif layer in config.copied_layers:
            width *= int(kappa)
        widths.append(width)
    return widths


def count_parameters(config: ThoughtbubblesConfig) -> int:
    """Parameters of `ThoughtbubblesForCausalLM(config)`, a tied embedding counted once."""
    hidden, inner, bias = config.hidden_size, _inner(config), int(config.use_bias)
    norm = hidden * (1 + bias)
    attention = 4 * hidden * hidden + bias * 4 * hidden
    mlp = 2 * hidden * inner + bias * (inner + hidden)
    gate = norm + 2 * hidden + hidden
    embeddings = config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)
    blocks = config.num_hidden_layers * (2 * norm + attention + mlp)
    pauses = (int(config.exact_budget()) - 1) * hidden if config.routing == "pause" else 0
    return embeddings + blocks + len(config.gated_layers) * gate + pauses + norm


def forward_flops(config: ThoughtbubblesConfig, length: int, budget: Budget | None = None) -> int:
    """Floating-point operations of one forward over a row of `length` tokens; a multiply-add counts 2.

    Matrix products alone: projections, MLP, gates, unembedding, and attention over the whole N x N square, as
    FLOP counters and MFU conventions have it, with N the static width of each layer.
    """
    hidden, inner = config.hidden_size, _inner(config)
    entering = [length, *layer_widths(config, length, budget)]
    total = 0
    for layer, width in enumerate(entering[1:]):
        total += 2 * width * (4 * hidden * hidden + 2 * hidden * inner) + 4 * width * width * hidden
        if layer in config.gated_layers:
            total += 2 * entering[layer] * 2 * hidden
    decoded = entering[-1] if config.merge == "probability" else length
    return total + 2 * decoded * hidden * config.vocab_size


def training_flops(config: ThoughtbubblesConfig, length: int, budget: Budget | None = None) -> int:
    """Floating-point operations of a forward and backward over a row: the backward costs two forwards."""
    return 3 * forward_flops(config, length, budget)


def _inner(config: ThoughtbubblesConfig) -> int:
    return config.intermediate_size or 4 * config.hidden_size
