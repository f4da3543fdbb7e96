"""The slow, obvious version of the whole forward: docs/method.md as code, to test every fast path against.

Everything is float64 and stands in Python lists: rows, tokens and streams are looped over, so there is no
padding, no packing and no mask here. It shares no code with the fast paths, on purpose.

Shape letters: B batch, T tokens, N streams of one row, M = 2N candidates, D hidden size,
H heads, K head size, V vocabulary, L layers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LOG_SCORE_FLOOR = -20.0
GRID = 2.0**-16  # nats between two scores that routing tells apart
IGNORED_LABEL = -100
FORK_CHANNELS = 64  # of the head that attends for the forks
CHOICES = {
    "routing": ("causal", "threshold", "topk", "none", "copy", "pause", "random", "uniform"),
    "fork_content": ("embedding", "attended"),
    "attenuation": ("paper", "released", "none"),
    "merge": ("residual", "residual-normed", "probability", "root"),
    "hidden_act": ("gelu", "gelu_pytorch_tanh", "silu"),
    "norm": ("layernorm", "rmsnorm"),
    "mlp": ("plain", "gated"),
}


@dataclass(frozen=True)
class ReferenceStream:
    """One stream of one row (method: State)."""

    residual: Tensor  # [D]
    log_score: Tensor  # scalar, natural log of the cumulative score
    token: int  # ordinal of its token among the real tokens of the row, from 0
    is_root: bool


@dataclass(frozen=True)
class ReferenceFork:
    """What one fork layer did to one row (method: Gate, Routing)."""

    candidate_scores: Tensor  # [M] log scores, each stream's (fork, keep) where the stream stood
    rivals: list[float]  # [M] what the router ranked them by: these scores, or a hash
    candidate_tokens: list[int]
    optional: list[bool]
    survivors: list[int]  # ascending candidate indices
    threshold: float  # the least score that was eligible, by the rule `threshold`


@dataclass(frozen=True)
class ReferenceOutput:
    """The result of `reference_forward`; state l enters block l (after its gate and routing), L is last.

    Where blocks are applied several times, L counts each time.
    """

    logits: Tensor  # [B, T, V]; zeros at padding columns
    loss: Tensor | None  # scalar: mean over targets; nan where there is none
    states: list[list[list[ReferenceStream]]]  # [row][layer boundary 0..L][stream]
    forks: list[dict[int, ReferenceFork]]  # [row][fork layer]


@dataclass(frozen=True)
class _Model:
    """The configuration and parameters of one run, with what follows from them."""

    config: Any
    parameters: Mapping[str, Tensor]
    budget: Fraction
    fork_layers: frozenset[int]
    copies: dict[int, int]  # at which layer every token becomes how many streams
    routing_step: int
    rotary: tuple[list[float], float]  # angles a position of each pair that turns; the factor on cosines and sines

    def linear(self, name: str, x: Tensor) -> Tensor:
        """Apply the matrix `name`, and its bias where it has one: [in] to [out]."""
        return F.linear(x, self.parameters[f"{name}.weight"], self.parameters.get(f"{name}.bias"))

    def layer_norm(self, name: str, x: Tensor) -> Tensor:
        """Apply the LayerNorm `name`: [D] to [D]."""
        weight, bias = self.parameters[f"{name}.weight"], self.parameters.get(f"{name}.bias")
        return F.layer_norm(x, x.shape, weight, bias, self.config.layer_norm_eps)

    def rms_norm(self, name: str, x: Tensor) -> Tensor:
        """Apply the RMSNorm `name` over the last dimension: [..., D] to [..., D] (method: The block)."""
        size: Tensor = ((x * x).mean(dim=-1, keepdim=True) + self.config.layer_norm_eps).sqrt()
        return self.parameters[f"{name}.weight"] * x / size

    def norm(self, name: str, x: Tensor) -> Tensor:
        """Apply the block's norm `name`: [D] to [D] (method: The block)."""
        return self.rms_norm(name, x) if self.config.norm == "rmsnorm" else self.layer_norm(name, x)


# --- Routing ---


def on_grid(score: float) -> float:
    """Return the nearest multiple of `GRID`, halves to even (method: Routing)."""
    return round(score / GRID) * GRID


def route_causal(
    scores: Sequence[float], tokens: Sequence[int], optional: Sequence[bool], budget: Fraction
) -> list[bool]:
    """Choose survivors by the causal rule, steps 1 and 2 literally (method: Routing).

    All arguments have length M and describe alive candidates in packed order; so does the result.
    """
    scores = [on_grid(score) for score in scores]

    def allowance(token: int) -> int:
        return math.floor((budget - 1) * (token + 1))

    candidates = [c for c in range(len(scores)) if optional[c]]
    ranked = sorted(candidates, key=lambda c: (-scores[c], c))  # ties: leftmost first
    eligible = []
    for place, c in enumerate(ranked):
        rivals = [other for other in ranked[:place] if tokens[other] <= tokens[c]]
        if len(rivals) < allowance(tokens[c]):
            eligible.append(c)

    survive = [not is_optional for is_optional in optional]
    admitted = 0
    # The sort is stable: within a token the candidates stay in descending order of score.
    for c in sorted(eligible, key=lambda c: tokens[c]):
        if admitted < allowance(tokens[c]):
            survive[c] = True
            admitted += 1
    return survive


def route_threshold(
    scores: Sequence[float], tokens: Sequence[int], optional: Sequence[bool], budget: Fraction, threshold: float
) -> list[bool]:
    """Choose survivors among those who reach the threshold, until the credit is spent (method: Routing).

    Arguments as for `route_causal`; `threshold` is a log score.
    """
    scores = [on_grid(score) for score in scores]
    survive = [not is_optional for is_optional in optional]
    eligible = [c for c in range(len(scores)) if optional[c] and scores[c] >= threshold]
    admitted = 0
    for c in sorted(eligible, key=lambda c: (tokens[c], -scores[c], c)):
        if admitted < math.floor((budget - 1) * (tokens[c] + 1)):
            survive[c] = True
            admitted += 1
    return survive


def calibrated_threshold(reached: Sequence[float], budget: Fraction, forks_before: int) -> float:
    """Return the least score that a fork layer admits, by the running histogram of its scores (method: Routing).

    `reached` [2048] are the shares of the optional candidates with scores above -1/64, -2/64 and so on.
    """
    streams = min(2**forks_before, budget)
    wanted = (budget - 1) / (2 * streams - 1)
    if wanted >= 1:
        return -math.inf
    # Shares are float32, and 1/3 has to equal 1/3.
    wanted_share = torch.tensor(float(wanted), dtype=torch.float32).item()
    return -(1 + sum(share < wanted_share for share in reached)) / 64


def route_topk(
    scores: Sequence[float], tokens: Sequence[int], optional: Sequence[bool], budget: Fraction
) -> list[bool]:
    """Choose survivors by the paper's rule, over the whole row (method: Routing).

    Arguments as for `route_causal`; `tokens` plays no part.
    """
    scores = [on_grid(score) for score in scores]
    survive = [not is_optional for is_optional in optional]
    tokens_in_row = sum(survive)
    room = math.ceil(budget * tokens_in_row) - tokens_in_row
    candidates = [c for c in range(len(scores)) if optional[c]]
    for c in sorted(candidates, key=lambda c: (-scores[c], c))[:room]:
        survive[c] = True
    return survive


def route_uniform(
    scores: Sequence[float], tokens: Sequence[int], optional: Sequence[bool], budget: Fraction
) -> list[bool]:
    """Choose survivors evenly: token t admits a(t) - a(t - 1) of its optional candidates (method: Controls).

    Arguments as for `route_causal`.
    """
    scores = [on_grid(score) for score in scores]
    survive = [not is_optional for is_optional in optional]
    for token in set(tokens):
        share = math.floor((budget - 1) * (token + 1)) - math.floor((budget - 1) * token)
        candidates = [c for c in range(len(scores)) if optional[c] and tokens[c] == token]
        for c in sorted(candidates, key=lambda c: (-scores[c], c))[:share]:
            survive[c] = True
    return survive


ROUTERS = {"causal": route_causal, "topk": route_topk, "uniform": route_uniform}


def route(
    rule: str,
    scores: Sequence[float],
    tokens: Sequence[int],
    optional: Sequence[bool],
    budget: Fraction,
    threshold: float,
) -> list[bool]:
    """Choose survivors by the rule of that name (method: Routing); `threshold` is for the rule `threshold` alone."""
    if rule == "threshold":
        return route_threshold(scores, tokens, optional, budget, threshold)
    return ROUTERS[rule](scores, tokens, optional, budget)


def draw(seed: int, step: int, layer: int, token: int, place: int) -> float:
    """Hash the counters of one candidate to a score in [0, 1) (method: Controls)."""
    lanes = []
    for lane in (0x9E3779B9, 0x85EBCA6B):
        for counter in (seed, step, layer, token, place):
            lane ^= counter
            lane = (lane ^ lane >> 16) * 0x21F0AAAD % 2**32
            lane = (lane ^ lane >> 15) * 0x735A2D97 % 2**32
            lane ^= lane >> 15
        lanes.append(lane)
    # A float64 holds 53 of the 64 bits.
    return ((lanes[0] * 2**32 + lanes[1]) >> 11) / 2**53


def _rivals(model: _Model, layer: int, tokens: list[int], scores: list[Tensor]) -> list[float]:
    """Return what the M candidates are ranked by (method: Routing)."""
    if model.config.routing not in ("random", "uniform"):
        return [score.item() for score in scores]
    places = [tokens[:c].count(token) for c, token in enumerate(tokens)]
    seed, step = model.config.routing_seed, model.routing_step
    # Scaled so that each of a draw's 53 bits counts on the grid.
    return [2**53 * GRID * draw(seed, step, layer, token, place) for token, place in zip(tokens, places, strict=True)]


def _threshold(model: _Model, layer: int) -> float:
    """Return the least score that is eligible at a fork layer: any, before training set one (method: Routing)."""
    histogram = f"model.gates.{layer}.histogram"
    if model.parameters[f"{histogram}.updates"] == 0:
        return -math.inf
    forks_before = sum(fork < layer for fork in model.fork_layers)
    return calibrated_threshold(model.parameters[f"{histogram}.reached"].tolist(), model.budget, forks_before)


# --- Gate ---


def _candidate_scores(model: _Model, layer: int, streams: list[ReferenceStream]) -> list[Tensor]:
    """Return the M candidate log scores: of every stream the fork's, then the keep's (method: Gate)."""
    scores: list[Tensor] = []
    for stream in streams:
        if model.config.gate_scores == "fixed":
            scores += [stream.log_score + math.log(0.5)] * 2
            continue
        normed = model.layer_norm(f"model.gates.{layer}.norm", stream.residual)
        fork, keep = model.linear(f"model.gates.{layer}.projection", normed)
        if (start := model.parameters.get(f"model.gates.{layer}.fork_bias")) is not None:
            fork = fork + start[0]
        scores += [stream.log_score + F.logsigmoid(g).clamp(min=LOG_SCORE_FLOOR) for g in (fork, keep)]
        if model.config.gate_scores == "forks" and stream.is_root:
            scores[-1] = stream.log_score
    return scores


def _fork(
    model: _Model, layer: int, streams: list[ReferenceStream], given: Sequence[int] | None
) -> tuple[list[ReferenceStream], ReferenceFork]:
    """Apply gate and routing, or the `given` survivors, to one row (method: Gate, Routing)."""
    scores = _candidate_scores(model, layer, streams)
    tokens = [stream.token for stream in streams for _ in range(2)]
    optional = [choice for stream in streams for choice in (True, not stream.is_root)]
    rivals = _rivals(model, layer, tokens, scores)
    rule = model.config.random_rule if model.config.routing == "random" else model.config.routing
    threshold = _threshold(model, layer) if rule == "threshold" else -math.inf
    if given is None:
        survive = route(rule, rivals, tokens, optional, model.budget, threshold)
        survivors = [c for c in range(len(scores)) if survive[c]]
    else:
        survivors = sorted(set(given))
        if not all(c in survivors or is_optional for c, is_optional in enumerate(optional)):
            raise ValueError(f"survivors of fork layer {layer}: a root's keep is missing from {survivors}")

    embedding = model.parameters[f"model.gates.{layer}.fork_embedding"]
    contents = _attended_contents(model, layer, streams) if model.config.fork_content == "attended" else None
    forked = []
    for c in survivors:
        source = streams[c // 2]
        if c % 2 == 0:
            relative = model.config.fork_embedding == "relative"
            size = source.residual.square().mean().sqrt() if relative else 1.0
            added = size * embedding if contents is None else size * embedding + contents[c // 2]
            forked.append(ReferenceStream(source.residual + added, scores[c], source.token, False))
        else:
            forked.append(replace(source, log_score=scores[c]))
    # A row of padding alone has no candidates, and torch stacks no empty list.
    stacked = torch.stack(scores) if scores else embedding.new_zeros(0)
    return forked, ReferenceFork(stacked, rivals, tokens, optional, survivors, threshold)


def _copy(model: _Model, copies: int, streams: list[ReferenceStream]) -> list[ReferenceStream]:
    """Turn each stream into `copies` of them, or into itself and pauses (method: Controls)."""
    copied = []
    for stream in streams:
        for place in range(copies):
            residual = stream.residual
            if model.config.routing == "pause" and place > 0:
                residual = model.parameters["model.copier.pause_embeddings.weight"][place - 1]
            copied.append(replace(stream, residual=residual, is_root=place == copies - 1))
    return copied


# --- Positions and attention ---


def bubble_positions(tokens: Sequence[int], origin: int = 0) -> list[Fraction]:
    """Return the exact rotary position of every stream, given its token's ordinal (method: Positions)."""
    positions = []
    for index, token in enumerate(tokens):
        place = tokens[: index + 1].count(token)
        positions.append(origin + token - 1 + Fraction(place, tokens.count(token)))
    return positions


def _llama3_frequency(frequency: float, rope: Mapping[str, Any]) -> float:
    """Leave waves that are short beside the rows of pretraining, slow down long ones, go over between."""
    rotations = frequency * rope["original_max_position_embeddings"] / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = min(1.0, max(0.0, (rotations - low) / (high - low)))
    slowed: float = frequency / rope["factor"]
    return float(kept * frequency + (1 - kept) * slowed)


def _yarn_frequency(pair: int, channels: int, theta: float, rope: Mapping[str, Any]) -> float:
    """Leave what turns often within the rows of pretraining, slow down what turns seldom, go over between."""

    def pair_that_turns(times: float) -> float:
        longest = rope["original_max_position_embeddings"]
        return channels * math.log(longest / (times * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_that_turns(rope.get("beta_fast", 32)), pair_that_turns(rope.get("beta_slow", 1))
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, channels - 1)
    kept = 1 - min(1.0, max(0.0, (pair - first) / (last - first or 0.001)))
    frequency: float = theta ** (-2 * pair / channels)
    slowed: float = frequency / rope["factor"]
    return kept * frequency + (1 - kept) * slowed


def _yarn_factor(rope: Mapping[str, Any]) -> float:
    """Return what `yarn` multiplies cosines and sines by."""

    log_factor = math.log(rope["factor"])

    def size(scale: float) -> float:
        return 0.1 * scale * log_factor + 1.0

    if "attention_factor" in rope:
        return float(rope["attention_factor"])
    if "mscale" in rope and "mscale_all_dim" in rope:
        return size(rope["mscale"]) / size(rope["mscale_all_dim"])
    return size(1.0)


def rotary_frequencies(config: Any, channels: int | None = None) -> tuple[list[float], float]:
    """Return angles a position of the pairs that turn, and the factor on cosines and sines (method: The block).

    They are of a head of which so many channels turn; None is as many as of a block's.
    """
    rope, theta = config.rope_parameters or {"rope_type": "default"}, config.rope_theta
    channels = int(config.head_dim * config.partial_rotary_factor) if channels is None else channels
    pairs = range((channels + 1) // 2)
    frequencies = [theta ** (-2 * pair / channels) for pair in pairs]
    if rope["rope_type"] == "linear":
        return [frequency / rope["factor"] for frequency in frequencies], 1.0
    if rope["rope_type"] == "llama3":
        return [_llama3_frequency(frequency, rope) for frequency in frequencies], 1.0
    if rope["rope_type"] == "yarn":
        return [_yarn_frequency(pair, channels, theta, rope) for pair in pairs], _yarn_factor(rope)
    return frequencies, 1.0


def _rotate(x: Tensor, position: Fraction, frequencies: Sequence[float], factor: float = 1.0) -> Tensor:
    """Rotate every head of x [H, K] to a position; of R = 2 len(frequencies) channels j pairs with j + R/2."""
    half = len(frequencies)
    angle = float(position) * torch.tensor(frequencies, dtype=torch.float64, device=x.device)
    first, second, others = x[:, :half], x[:, half : 2 * half], x[:, 2 * half :]
    cos, sin = factor * angle.cos(), factor * angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin, others], dim=-1)


def _with_last_channel(x: Tensor, value: Tensor) -> Tensor:
    """Replace the last channel of every head of x [H, K] by a scalar (method: Attenuation, `released`)."""
    return torch.cat([x[:, :-1], value.expand(x.shape[0], 1)], dim=-1)


def _update_weight(model: _Model, stream: ReferenceStream) -> Tensor:
    """Return p, the weight of a stream's updates and values: a scalar (method: Attenuation)."""
    if model.config.attenuation == "none":
        return torch.ones_like(stream.log_score)
    return stream.log_score.exp()


def _project(model: _Model, layer: int, stream: ReferenceStream, position: Fraction) -> tuple[Tensor, Tensor, Tensor]:
    """Return query [H, K], key and attenuated value [G, K] of one stream (method: Positions, Attenuation)."""
    heads, groups = model.config.num_attention_heads, model.config.num_key_value_heads
    name = f"model.layers.{layer}.attention"
    projected = model.linear(f"{name}.qkv_proj", model.norm(f"{name}_norm", stream.residual))
    q, k, v = projected.view(-1, model.config.head_dim).split([heads, groups, groups])
    if model.config.qk_norm:
        q, k = model.rms_norm(f"{name}.q_norm", q), model.rms_norm(f"{name}.k_norm", k)
    q, k = (_rotate(x, position, *model.rotary) for x in (q, k))
    if model.config.attenuation == "released" and model.fork_layers:
        q = _with_last_channel(q, torch.ones_like(stream.log_score))
        k = _with_last_channel(k, stream.log_score)
    return q, k, v * _update_weight(model, stream)


def _attention(model: _Model, layer: int, streams: list[ReferenceStream]) -> list[Tensor]:
    """Return Attention(LayerNorm(x)) of every stream: N vectors [D] (method: Attenuation)."""
    if not streams:
        return []
    origin = 1 if model.config.attenuation == "released" and model.fork_layers else 0
    positions = bubble_positions([stream.token for stream in streams], origin)
    projected = [_project(model, layer, *each) for each in zip(streams, positions, strict=True)]
    queries, keys, values = (torch.stack(each) for each in zip(*projected, strict=True))
    log_scores = torch.stack([stream.log_score for stream in streams])
    updates = []
    for index in range(len(streams)):
        seen = slice(0, index + 1)
        attended = []
        for head, query in enumerate(queries[index]):
            group = head * model.config.num_key_value_heads // model.config.num_attention_heads
            logits = keys[seen, group] @ query / math.sqrt(len(query))
            if model.config.attenuation == "paper":
                logits = logits + log_scores[seen]
            attended.append(logits.softmax(dim=0) @ values[seen, group])
        updates.append(model.linear(f"model.layers.{layer}.attention.o_proj", torch.cat(attended)))
    return updates


def _attended_contents(model: _Model, layer: int, streams: list[ReferenceStream]) -> list[Tensor]:
    """Return what a fork of each stream would bring along beside its embedding: N vectors [D] (method: Gate)."""
    name, attenuation = f"model.gates.{layer}.content", model.config.attenuation
    rotary = rotary_frequencies(model.config, FORK_CHANNELS)
    positions = bubble_positions([stream.token for stream in streams], 1 if attenuation == "released" else 0)
    keys: list[Tensor] = []
    values: list[Tensor] = []
    biases: list[Tensor] = []
    contents = []
    for stream, position in zip(streams, positions, strict=True):
        projected = model.linear(f"{name}.qkv", model.layer_norm(f"{name}.norm", stream.residual))
        q, k, v = projected.view(3, 1, FORK_CHANNELS)
        q, k = (_rotate(x, position, *rotary) for x in (q, k))
        if attenuation == "released":
            q = _with_last_channel(q, torch.ones_like(stream.log_score))
            k = _with_last_channel(k, stream.log_score)
        keys.append(k[0])
        values.append(v[0] * _update_weight(model, stream))
        biases.append(stream.log_score if attenuation == "paper" else torch.zeros_like(stream.log_score))
        weights = (torch.stack(keys) @ q[0] / math.sqrt(FORK_CHANNELS) + torch.stack(biases)).softmax(dim=0)
        contents.append(model.linear(f"{name}.output", weights @ torch.stack(values)))
    return contents


def _mlp(model: _Model, layer: int, stream: ReferenceStream) -> Tensor:
    """Return MLP(LayerNorm(x)) of one stream: [D] (method: Attenuation)."""
    normed = model.norm(f"model.layers.{layer}.mlp_norm", stream.residual)
    hidden = model.linear(f"model.layers.{layer}.mlp.up_proj", normed)
    if model.config.mlp == "gated":
        hidden = _act(model, model.linear(f"model.layers.{layer}.mlp.gate_proj", normed)) * hidden
    else:
        hidden = _act(model, hidden)
    return model.linear(f"model.layers.{layer}.mlp.down_proj", hidden)


def _act(model: _Model, x: Tensor) -> Tensor:
    """Return the activation of a vector (method: The block)."""
    if model.config.hidden_act == "silu":
        return F.silu(x)
    if model.config.hidden_act == "gelu":
        return F.gelu(x)
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _updated(model: _Model, stream: ReferenceStream, update: Tensor) -> ReferenceStream:
    """Return the stream with x + p * update as its residual (method: Attenuation)."""
    return replace(stream, residual=stream.residual + _update_weight(model, stream) * update)


def _block(model: _Model, layer: int, streams: list[ReferenceStream]) -> list[ReferenceStream]:
    """Apply one transformer block to the streams of one row (method: Attenuation)."""
    updates = _attention(model, layer, streams)
    if model.config.parallel_residual:
        updates = [update + _mlp(model, layer, stream) for stream, update in zip(streams, updates, strict=True)]
    streams = [_updated(model, stream, update) for stream, update in zip(streams, updates, strict=True)]
    if model.config.parallel_residual:
        return streams
    return [_updated(model, stream, _mlp(model, layer, stream)) for stream in streams]


# --- Merge ---


def _merge(model: _Model, bubble: list[ReferenceStream], weighted: bool) -> Tensor:
    """Turn the streams of one token into its logits [V] (method: Merge)."""
    embedding = model.parameters["model.embed_tokens.weight"]
    unembedding = model.parameters.get("lm_head.weight", embedding)
    # Where the released code skips the weighting, every stream counts as if its log score were 0.
    log_scores = torch.stack([stream.log_score * int(weighted) for stream in bubble])
    residuals = torch.stack([stream.residual for stream in bubble])
    normed = torch.stack([model.norm("model.norm", x) for x in residuals])

    if model.config.merge == "root":
        return unembedding @ normed[[stream.is_root for stream in bubble].index(True)]
    # Streams without scores, of which no choice was made, are averaged.
    weights = log_scores.exp() / (len(bubble) if model.copies else 1)
    if model.config.merge == "residual":
        if model.config.attenuation != "released":
            weights = log_scores.softmax(dim=0)
        return unembedding @ model.norm("model.norm", weights @ residuals)
    if model.config.merge == "residual-normed":
        return unembedding @ (weights @ normed)
    log_probabilities = torch.stack([(unembedding @ x).log_softmax(dim=0) for x in normed])
    return (log_scores.log_softmax(dim=0)[:, None] + log_probabilities).logsumexp(dim=0)


# --- The whole forward ---


def _row_forward(
    model: _Model, token_ids: list[int], given: Mapping[int, Sequence[int]] | None, weighted: bool
) -> tuple[list[Tensor], list[list[ReferenceStream]], dict[int, ReferenceFork]]:
    """Run one row of n real tokens: n logits [V], the states around each of the L blocks, the forks (method: State)."""
    embedding = model.parameters["model.embed_tokens.weight"]
    streams = [
        ReferenceStream(embedding[token_id], embedding.new_zeros(()), ordinal, True)
        for ordinal, token_id in enumerate(token_ids)
    ]
    states, forks = [], {}
    for layer in [*range(model.config.num_hidden_layers)] * model.config.num_loops:
        if layer in model.fork_layers:
            streams, forks[layer] = _fork(model, layer, streams, None if given is None else given[layer])
        if layer in model.copies:
            streams = _copy(model, model.copies[layer], streams)
        states.append(streams)
        streams = _block(model, layer, streams)
    states.append(streams)
    bubbles = [[s for s in streams if s.token == ordinal] for ordinal in range(len(token_ids))]
    return [_merge(model, bubble, weighted) for bubble in bubbles], states, forks


def _row_losses(logits: list[Tensor], labels: list[int]) -> list[Tensor]:
    """Score the logits of each real token against the label of the next one (method: Padding)."""
    return [
        F.cross_entropy(token_logits, torch.tensor(label, device=token_logits.device))
        for token_logits, label in zip(logits[:-1], labels[1:], strict=True)
        if label != IGNORED_LABEL
    ]


def _model(config: Any, parameters: Mapping[str, Tensor], budget: Any, routing_step: int) -> _Model:
    """Check the values that this file branches on and gather what a run needs."""
    for name, allowed in CHOICES.items():
        if getattr(config, name) not in allowed:
            raise ValueError(f"{name}: expected one of {allowed}, got {getattr(config, name)!r}")
    # The decimal text makes 1.2 exactly 6/5, which the float is not (method: State).
    exact_budget = Fraction(str(config.budget if budget is None else budget))
    if exact_budget < 1:
        raise ValueError(f"budget: expected a ratio of at least 1, got {exact_budget}")
    fork_layers = frozenset() if config.routing in ("none", "copy", "pause") else frozenset(config.fork_layers)
    copies = {}
    if config.routing in ("copy", "pause"):
        if exact_budget.denominator != 1:
            raise ValueError(f"budget: expected a whole number for routing {config.routing}, got {exact_budget}")
        copies[config.copy_layer if config.routing == "copy" else 0] = int(exact_budget)
    wide = {name: parameter.to(torch.float64) for name, parameter in parameters.items()}
    return _Model(config, wide, exact_budget, fork_layers, copies, routing_step, rotary_frequencies(config))


def reference_forward(
    config: Any,
    parameters: Mapping[str, Tensor],
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    budget: int | float | str | Fraction | None = None,
    survivors: Sequence[Mapping[int, Sequence[int]]] | None = None,
    routing_step: int = 0,
) -> ReferenceOutput:
    """Run the forward on [B, T] token ids, slowly and in float64; differentiable.

    Args:
        config: any object with the attributes of `ThoughtbubblesConfig`.
        parameters: a state dict by name; gradients flow to whatever in it requires them.
        input_ids: [B, T] token ids.
        attention_mask: [B, T], nonzero at real tokens, anywhere in the row; all real where None.
        labels: [B, T], the token ids themselves: the shift happens here (method: Padding).
        budget: used instead of `config.budget` (method: Budget at test time).
        survivors: per row and fork layer the candidate indices that survive, instead of the router's
            decision (method: Near ties); then every row and fork layer needs its entry.
        routing_step: the optimizer step by which `random` and `uniform` draw; 0 is evaluation.
    """
    model = _model(config, parameters, budget, routing_step)
    rows, length = input_ids.shape
    # The released code skips the weighting where the width stays that of the input. Under its own rule, ceil(kappa T)
    # streams, that is the case at budget 1 alone; so decided, no logit depends on the padding (method: Merge, Padding).
    weighted = config.attenuation != "released" or model.budget != 1
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    padding = model.parameters["model.embed_tokens.weight"].new_zeros(config.vocab_size)

    logits, losses, states, forks = [], [], [], []
    for row in range(rows):
        columns = [column for column in range(length) if mask[row, column]]
        token_ids = [int(input_ids[row, column]) for column in columns]
        given = None if survivors is None else survivors[row]
        row_logits, row_states, row_forks = _row_forward(model, token_ids, given, weighted)
        if labels is not None:
            losses += _row_losses(row_logits, [int(labels[row, column]) for column in columns])
        at_column = dict(zip(columns, row_logits, strict=True))
        logits.append(torch.stack([at_column.get(column, padding) for column in range(length)]))
        states.append(row_states)
        forks.append(row_forks)

    loss = None
    if labels is not None:
        loss = torch.stack(losses).mean() if losses else padding.new_tensor(math.nan)
    return ReferenceOutput(torch.stack(logits), loss, states, forks)
