"""Speed of decoding with a filled context, one token at a time, and the size of the cache.

Variants of one shape and random weights: ours with its cache, the same by the rule `threshold`, ours recomputing the
prefix (one row at a time only), our dense model with its cache, and the GPT-NeoX class of transformers with its own.
They take turns round by round, so that a drifting machine touches all alike.

The last line is JSON: the settings, the machine, and for each variant, context and batch the median milliseconds a
step, tokens per second and bytes of cache per token.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GPTNeoXConfig, GPTNeoXForCausalLM

from thoughtbubbles import ThoughtbubblesConfig, ThoughtbubblesForCausalLM, update_thresholds
from thoughtbubbles.model.cache import StreamCache
from thoughtbubbles.model.generating import CACHE_NAME
from thoughtbubbles.support.files import json_text
from thoughtbubbles.support.machine import describe_machine

VARIANTS = ("ours, cached", "threshold, cached", "dense, cached", "GPT-NeoX, cached", "ours, recomputed")


def main() -> None:
    """Measure every context and batch."""
    arguments = parse_arguments()
    models = build_models(arguments)
    for name in ("ours", "threshold"):
        refuse_wrong_results(models[name], min(arguments.contexts))
    rows: list[dict[str, Any]] = []
    for batch in arguments.batch_sizes:
        for context in arguments.contexts:
            rows += measure(models, context, batch, arguments)
    print(json_text({"settings": vars(arguments), "machine": describe_machine(arguments.device), "rows": rows}))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="micro", help="shape of the models")
    parser.add_argument("--budget", type=float, default=2.0, help="streams per token of ours")
    parser.add_argument("--contexts", type=int, nargs="+", default=[64, 512, 2048], help="tokens before the first step")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8], help="rows decoded together")
    parser.add_argument("--steps", type=int, default=16, help="timed steps of each cached variant")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def build_models(arguments: argparse.Namespace) -> dict[str, Any]:
    """Ours by two rules, dense and GPT-NeoX of one shape."""
    torch.manual_seed(0)
    longest = max(arguments.contexts) + arguments.steps + 8
    shape = {"max_position_embeddings": longest}
    ours = ThoughtbubblesConfig.preset(arguments.preset, budget=arguments.budget, **shape)
    dense = ThoughtbubblesConfig.preset(arguments.preset, routing="none", **shape)
    neox = GPTNeoXConfig(
        vocab_size=ours.vocab_size,
        hidden_size=ours.hidden_size,
        num_hidden_layers=ours.num_hidden_layers,
        num_attention_heads=ours.num_attention_heads,
        intermediate_size=4 * ours.hidden_size,
        max_position_embeddings=longest,
        rope_parameters={"rope_type": "default", "rope_theta": ours.rope_theta, "partial_rotary_factor": 1.0},
        use_parallel_residual=False,
        tie_word_embeddings=True,
    )
    models: dict[str, Any] = {"ours": ThoughtbubblesForCausalLM(ours), "dense": ThoughtbubblesForCausalLM(dense)}
    models["threshold"] = with_thresholds(models["ours"])
    models["GPT-NeoX"] = GPTNeoXForCausalLM(neox)
    return {name: model.to(arguments.device).eval() for name, model in models.items()}


@torch.no_grad()
def with_thresholds(model: ThoughtbubblesForCausalLM) -> ThoughtbubblesForCausalLM:
    """The same weights and the rule `threshold`, with thresholds as random tokens set them."""
    config = ThoughtbubblesConfig.from_dict({**model.config.to_dict(), "routing": "threshold"})
    other = ThoughtbubblesForCausalLM(config)
    other.load_state_dict(model.state_dict(), strict=False)
    other(torch.randint(config.vocab_size, (1, 512)))
    update_thresholds(other)
    return other


@torch.inference_mode()
def refuse_wrong_results(model: Any, context: int) -> None:
    """Exit if a cached step's logits are not those of the full forward: speed would mean nothing."""
    ids = torch.randint(model.config.vocab_size, (1, context + 1), device=model.device)
    full = model(ids, logits_to_keep=1).logits
    cache = StreamCache()
    model(ids[:, :-1], cache=cache, logits_to_keep=1)
    difference = (model(ids[:, -1:], cache=cache).logits - full).abs().max().item()
    if not difference < 1e-3:
        raise SystemExit(f"cached and full logits differ by {difference}: nothing measured")


@torch.inference_mode()
def measure(models: dict[str, Any], context: int, batch: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the result for one context and batch."""
    device = arguments.device
    ids = torch.randint(models["ours"].config.vocab_size, (batch, context + arguments.steps + 2), device=device)
    caches: dict[str, Any] = {
        "ours": StreamCache(),
        "threshold": StreamCache(),
        "dense": StreamCache(),
        "GPT-NeoX": DynamicCache(),
    }
    for name, cache in caches.items():
        models[name](ids[:, :context], **{CACHE_NAME: cache}, use_cache=True, logits_to_keep=1)
    variants = VARIANTS if batch == 1 else VARIANTS[:4]
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    for step in range(arguments.steps + 1):
        for variant in variants:
            name = variant.split(",")[0]
            if variant == "ours, recomputed":
                # Slow and steady: two rounds after the warm-up are enough.
                if step > 2:
                    continue
                taken = clock(device, lambda: models["ours"](ids[:, : context + 1], logits_to_keep=1))
            else:
                token = ids[:, context + step : context + step + 1]
                taken = clock(device, one_step(models[name], caches[name], token))
            if step:
                seconds[variant].append(taken)
    rows = []
    for variant in variants:
        name, median = variant.split(",")[0], statistics.median(seconds[variant])
        row = {"variant": variant, "context": context, "batch": batch, "milliseconds": 1000 * median}
        row |= {"spread": [1000 * min(seconds[variant]), 1000 * max(seconds[variant])]}
        row |= {"tokens_per_second": batch / median}
        if variant.endswith("cached"):
            row["cache_bytes_per_token"] = cache_bytes(caches[name]) / caches[name].get_seq_length() / batch
        rows.append(row)
        print(f"batch {batch} context {context:>5} {variant:<18}{1000 * median:>10.2f} ms a step")
    return rows


def one_step(model: Any, cache: Any, token: Tensor) -> Callable[[], Any]:
    """A step of decoding, to be timed."""
    return lambda: model(token, **{CACHE_NAME: cache}, use_cache=True)


def cache_bytes(cache: Any) -> int:
    """Bytes that a cache of ours or of transformers holds."""
    if isinstance(cache, StreamCache):
        return cache.nbytes
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def clock(device: str, work: Callable[[], Any]) -> float:
    """Seconds that some work takes."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
