"""Speed of a training step, forward and backward with the optimizer, and where its time goes; as ratios in one run.

The baselines are the dense model of the same length, transformers' GPT-NeoX class of the same shape, its Llama class
beside our dense model with a Llama's block, and for each budget the dense model whose blocks compute as many positions
as the Thoughtbubbles model's: what is left over that is gate, routing, gather and merge. The share of the machine's
peak is that of the fastest matrix product found.

With `--against CHECKOUT` it is the whole command that is timed instead: `thoughtbubbles train` with the demo's recipe,
of this checkout and of another one, in pairs.

The last line is JSON: the settings, the machine, the peak, and for each variant tokens per second, the median step in
milliseconds, the share of the peak and, where parts are timed, the milliseconds of each part by itself.
"""

import argparse
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from against import compare_checkouts
from clock import now
from parts import part_seconds
from thoughtbubbles import ThoughtbubblesConfig, ThoughtbubblesForCausalLM
from thoughtbubbles.model.accounting import dense_twin, layer_widths, training_flops
from thoughtbubbles.model.attention import rotary_angles
from thoughtbubbles.model.loss import chunked_next_token_loss, next_token_targets
from thoughtbubbles.model.streams import Streams
from thoughtbubbles.support.files import json_text
from thoughtbubbles.support.machine import describe_machine, keep_freed_memory, measured_peak
from thoughtbubbles.training.meter import peak_memory


def main() -> None:
    """Time every variant in turn, round by round, so that a drifting machine touches all alike."""
    arguments = parse_arguments()
    if arguments.against is not None:
        found = compare_checkouts(arguments)
        settings = {name: getattr(arguments, name) for name in ("against", "pairs", "steps")}
        print(json_text({"settings": settings, "machine": describe_machine(arguments.device), **found}))
        return
    keep_freed_memory()  # as `thoughtbubbles train` does
    steps = make_steps(arguments)
    peak = arguments.peak or measured_peak(torch.device(arguments.device), arguments.precision == "bfloat16")
    for step in steps.values():
        step.run()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(arguments.rounds):
        for name, step in steps.items():
            seconds[name].append(step.run())
    dense = statistics.median(seconds["dense"])
    rows = {}
    for name, step in steps.items():
        median = statistics.median(seconds[name])
        rows[name] = {
            "milliseconds": 1000 * median,
            "spread": [1000 * min(seconds[name]), 1000 * max(seconds[name])],
            "tokens_per_second": arguments.batch_size * arguments.length / median,
            "flops_per_second": step.flops / median,
            "share_of_peak": step.flops / median / peak,
            "times_dense": median / dense,
        }
        if step.twin is not None:
            rows[name]["times_same_positions"] = median / statistics.median(seconds[step.twin])
            rows[name]["parts"] = timed_parts(step, median, arguments)
        share = step.flops / median / peak
        print(f"{name:<32}{1000 * median:>9.1f} ms {median / dense:>6.2f} x dense {share:>6.0%} of peak")
    result = {
        "settings": vars(arguments),
        "machine": describe_machine(arguments.device),
        "matmul_peak": peak,
        "peak_memory": peak_memory(torch.device(arguments.device)),
        "variants": rows,
    }
    print(json_text(result))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="micro", help="shape of the models")
    parser.add_argument("--length", type=int, default=512, help="tokens a row")
    parser.add_argument("--batch-size", type=int, default=4, help="rows a step")
    parser.add_argument("--budgets", type=float, nargs="+", default=[2.0, 4.0], help="of causal and topk")
    parser.add_argument("--vocab-size", type=int, default=50257)
    parser.add_argument("--key-value-heads", type=int, help="of a Llama's block, ours and theirs; by default its heads")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each variant")
    parser.add_argument("--only", nargs="+", help="names of variants; dense is always there")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32", help="bfloat16 is autocast")
    parser.add_argument("--compile", action="store_true", help="torch.compile the models")
    parser.add_argument("--peak", type=float, help="FLOP/s of the device; by default that of the fastest product found")
    parser.add_argument("--against", help="another checkout: instead of all this, `train` of both in pairs")
    parser.add_argument("--pairs", type=int, default=7, help="with --against")
    parser.add_argument("--steps", type=int, default=24, help="of a run, with --against")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


class Step:
    """A training step on random tokens.

    Attributes:
        model: what is trained.
        flops: of a step, by accounting.
        twin: name of the dense variant with as many positions in each block; None for the dense ones.
    """

    def __init__(self, model: nn.Module, flops: int, arguments: argparse.Namespace, twin: str | None = None) -> None:
        self.model, self.flops, self.twin = model.to(arguments.device).train(), flops, twin
        self._call: Callable[..., Any] = torch.compile(self.model) if arguments.compile else self.model
        self._optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        size = (arguments.batch_size, arguments.length)
        self._ids = torch.randint(arguments.vocab_size, size, device=arguments.device)
        self._autocast = autocast(arguments)
        self._device = arguments.device

    def run(self) -> float:
        """One step; its seconds."""
        start = now(self._device)
        with self._autocast:
            loss = self._call(self._ids, labels=self._ids)[0]
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return now(self._device) - start


class SamePositions(nn.Module):
    """A dense model whose blocks compute as many positions as those of a Thoughtbubbles model of `config`.

    Where that model forks, positions are repeated at the right end; at the end they are cut off.
    """

    def __init__(self, config: ThoughtbubblesConfig, length: int) -> None:
        super().__init__()
        self.dense = ThoughtbubblesForCausalLM(dense_twin(config))
        self.widths = layer_widths(config, length)

    def forward(self, ids: Tensor, labels: Tensor) -> tuple[Tensor]:
        """The loss of [B, T] ids, which means nothing."""
        body, length = self.dense.model, ids.shape[1]
        x, angles = body.embed_tokens(ids), None
        for block, width in zip(body.layers, self.widths, strict=True):
            if angles is None or width > x.shape[1]:
                x = torch.cat([x, x[:, : width - x.shape[1]]], dim=1)
                angles = rotary_angles(Streams.from_embeddings(x).positions(), body.rotary)
            x = block(x, *angles, None, None)
        targets = next_token_targets(labels, None)
        return (chunked_next_token_loss(body.norm(x[:, :length]), self.dense.lm_head.weight, targets),)


class LossAlone(nn.Module):
    """A model of ours as its Trainer calls it."""

    def __init__(self, model: ThoughtbubblesForCausalLM) -> None:
        super().__init__()
        self.inner = model

    def forward(self, ids: Tensor, labels: Tensor) -> tuple[Tensor]:
        """The loss of [B, T] ids."""
        return (self.inner(ids, labels=labels, return_logits=False).loss,)


def make_steps(arguments: argparse.Namespace) -> dict[str, Step]:
    """The variants by name, dense first."""
    torch.manual_seed(0)

    def config(routing: str, budget: float = 1.0, **others: Any) -> ThoughtbubblesConfig:
        return ThoughtbubblesConfig.preset(
            arguments.preset,
            routing=routing,
            budget=budget,
            vocab_size=arguments.vocab_size,
            max_position_embeddings=arguments.length,
            **others,
        )

    def flops(shape: ThoughtbubblesConfig) -> int:
        return int(arguments.batch_size) * training_flops(shape, arguments.length)

    def ours(shape: ThoughtbubblesConfig, twin: str | None = None) -> Callable[[], Step]:
        return lambda: Step(LossAlone(ThoughtbubblesForCausalLM(shape)), flops(shape), arguments, twin)

    def same_positions(shape: ThoughtbubblesConfig) -> Callable[[], Step]:
        return lambda: Step(SamePositions(shape, arguments.length), flops(shape), arguments)

    makers = {"dense": ours(config("none")), "budget 1": ours(config("causal"), "dense")}
    makers["GPT-NeoX"] = lambda: Step(neox(config("none")), flops(config("none")), arguments)
    as_llama = with_llama_block(config("none"), arguments.key_value_heads)
    makers["dense, Llama's block"] = ours(as_llama)
    makers["Llama"] = lambda: Step(llama(as_llama), flops(as_llama), arguments)
    for budget in arguments.budgets:
        for routing in ("causal", "topk"):
            twin = f"dense, positions of {routing} {budget:g}"
            makers[f"{routing} {budget:g}"] = ours(config(routing, budget), twin)
            makers[twin] = same_positions(config(routing, budget))
        attended = config("causal", budget, fork_content="attended")
        makers[f"causal {budget:g}, attended"] = ours(attended, f"dense, positions of causal {budget:g}")
    wanted = {"dense", *(arguments.only or makers)}
    if unknown := wanted - makers.keys():
        raise SystemExit(f"--only {', '.join(unknown)}: expected some of {', '.join(makers)}")
    made = {name: make() for name, make in makers.items() if name in wanted}
    for step in made.values():
        step.twin = step.twin if step.twin in made else None
    return made


def with_llama_block(shape: ThoughtbubblesConfig, key_value_heads: int | None) -> ThoughtbubblesConfig:
    """The shape with a Llama's block, and so many heads of keys and values; None is as many as heads."""
    changes = {**LLAMA, "num_key_value_heads": key_value_heads or shape.num_attention_heads}
    config: ThoughtbubblesConfig = ThoughtbubblesConfig.from_dict({**shape.to_dict(), **changes})
    return config


def neox(shape: ThoughtbubblesConfig) -> GPTNeoXForCausalLM:
    """transformers' dense decoder of the same shape."""
    config = GPTNeoXConfig(  # type: ignore[call-arg]  # the share of turned channels is not among its typed fields
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        intermediate_size=shape.intermediate_size or 4 * shape.hidden_size,
        max_position_embeddings=shape.max_position_embeddings,
        rotary_pct=1.0,
        use_parallel_residual=False,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return GPTNeoXForCausalLM(config)


LLAMA = {
    "norm": "rmsnorm",
    "mlp": "gated",
    "hidden_act": "silu",
    "use_bias": False,
    "qk_norm": False,
}
"""What makes a block that of a Llama."""


def llama(shape: ThoughtbubblesConfig) -> LlamaForCausalLM:
    """transformers' Llama of the same shape."""
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate_size or 4 * shape.hidden_size,
        max_position_embeddings=shape.max_position_embeddings,
        tie_word_embeddings=True,
        use_cache=False,
    )
    config._attn_implementation = "sdpa"
    return LlamaForCausalLM(config)


def timed_parts(step: Step, whole: float, arguments: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of each part by itself, forward and backward, and their share of the step of `whole` seconds."""
    assert isinstance(step.model, LossAlone)
    size = (arguments.batch_size, arguments.length)
    found = part_seconds(step.model.inner, *size, autocast(arguments), lambda: now(arguments.device))
    shares = ", ".join(f"{name} {seconds / whole:.1%}" for name, seconds in found.items())
    print(f"  {shares}, rest {1 - sum(found.values()) / whole:.1%}")
    return {name: 1000 * seconds for name, seconds in found.items()}


def autocast(arguments: argparse.Namespace) -> AbstractContextManager[Any]:
    """As in training in the precision asked for."""
    return torch.autocast(arguments.device, torch.bfloat16, enabled=arguments.precision == "bfloat16")


if __name__ == "__main__":
    main()
