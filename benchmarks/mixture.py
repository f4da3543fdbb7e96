"""A training step of the merge `probability` beside one of the merge `residual`: time and memory, as ratios in one run.

Both models have the same weights and see the same tokens, in turn, so that a drifting machine touches both alike. The
mixture decodes every stream, so of kappa streams a token its step may take 1 + (kappa - 1) times the head's share of
the residual merge's step; the head is unembedding and loss, forward and backward. Time is the processor's own on a CPU.
Memory is what PyTorch's allocator holds at most in a step beside weights, gradients and the optimizer's moments.

Nothing is measured of a mixture that isn't the reference's.

The last line is JSON: the settings, the machine, and for each preset and budget the ratios of time and memory beside
what the extra decoding explains.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clock import worked
from memory import peak_bytes
from thoughtbubbles import ThoughtbubblesConfig, ThoughtbubblesForCausalLM
from thoughtbubbles.model.loss import chunked_next_token_loss, next_token_targets
from thoughtbubbles.model.reference import reference_forward
from thoughtbubbles.support.machine import describe_machine

MOST_TIME, MOST_MEMORY = 1.05, 1.3
"""What a step may take beyond its decoding, and of memory, in times the residual merge's."""


def main() -> None:
    """Measure every preset at every budget."""
    arguments = parse_arguments()
    refuse_wrong_results()
    rows = [measure(preset, budget, arguments) for preset in arguments.presets for budget in arguments.budgets]
    print(json.dumps({"settings": vars(arguments), "machine": describe_machine(arguments.device), "rows": rows}))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["nano", "micro", "150m"], help="shapes of the models")
    parser.add_argument("--budgets", type=float, nargs="+", default=[2.0])
    parser.add_argument("--length", type=int, default=1024, help="tokens a row")
    parser.add_argument("--batch-size", type=int, default=1, help="rows a step")
    parser.add_argument("--vocab-size", type=int, default=50257, help="0 is the preset's")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each merge")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def refuse_wrong_results() -> None:
    """Loss and gradients of a small model must be the reference's.

    Raises:
        SystemExit: they are not.
    """
    torch.manual_seed(0)
    config = ThoughtbubblesConfig(
        vocab_size=31, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, fork_layers=[1], merge="probability"
    )
    model, ids = ThoughtbubblesForCausalLM(config).double(), torch.randint(31, (2, 9))
    parameters = {name: each.detach().clone().requires_grad_() for name, each in model.named_parameters()}
    expected = reference_forward(config, parameters, ids, labels=ids).loss
    assert expected is not None
    found = model(ids, labels=ids, return_logits=False).loss
    names = list(parameters)
    ours = torch.autograd.grad(found, [model.get_parameter(name) for name in names])
    theirs = torch.autograd.grad(expected, [parameters[name] for name in names])
    pairs = zip((found, *ours), (expected, *theirs), strict=True)
    if not all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in pairs):
        raise SystemExit("the mixture's loss or gradients are not the reference's: nothing measured")


def measure(preset: str, budget: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """A row of the result."""
    device = arguments.device
    shape: dict[str, Any] = {"budget": budget, "max_position_embeddings": arguments.length}
    if arguments.vocab_size:
        shape["vocab_size"] = arguments.vocab_size
    models = {}
    for merge in ("residual", "probability"):
        torch.manual_seed(0)
        config = ThoughtbubblesConfig.preset(preset, merge=merge, **shape)
        models[merge] = ThoughtbubblesForCausalLM(config).to(device).train()
    ids = torch.randint(config.vocab_size, (arguments.batch_size, arguments.length), device=device)
    works = {merge: step_of(model, ids) for merge, model in models.items()}
    works["head"] = head_of(models["residual"], ids)
    for work in works.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(arguments.rounds):
        for name, work in works.items():
            times[name].append(seconds(work, device))
    ratio = statistics.median(a / b for a, b in zip(times["probability"], times["residual"], strict=True))
    share = statistics.median(a / b for a, b in zip(times["head"], times["residual"], strict=True))
    explained = 1 + (budget - 1) * share
    memory = {merge: peak_bytes(works[merge], device) for merge in models}
    times_memory = memory["probability"] / memory["residual"]
    within = ratio <= MOST_TIME * explained and times_memory <= MOST_MEMORY
    print(
        f"{preset:<6} budget {budget:g}: {ratio:.2f} times the residual merge's step, {explained:.2f} explained; "
        f"{times_memory:.2f} times its memory{'' if within else ': TOO MUCH'}"
    )
    return {
        "preset": preset,
        "budget": budget,
        "milliseconds": {name: 1000 * statistics.median(each) for name, each in times.items()},
        "times_residual": ratio,
        "head_share": share,
        "explained": explained,
        "times_explained": ratio / explained,
        "peak_bytes": memory,
        "times_memory": times_memory,
        "within": within,
    }


def step_of(model: ThoughtbubblesForCausalLM, ids: Tensor) -> Callable[[], None]:
    """A training step with AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        model(ids, labels=ids, return_logits=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    return step


def head_of(model: ThoughtbubblesForCausalLM, ids: Tensor) -> Callable[[], None]:
    """Unembedding and loss of a step by themselves."""
    hidden = torch.randn(*ids.shape, model.config.hidden_size, device=ids.device).requires_grad_()
    matrix = model.lm_head.weight.detach().clone().requires_grad_()

    def head() -> None:
        chunked_next_token_loss(hidden, matrix, next_token_targets(ids, None)).backward()
        hidden.grad = matrix.grad = None

    return head


def seconds(work: Callable[[], None], device: str) -> float:
    """Of some work."""
    start = worked(device)
    work()
    return worked(device) - start


if __name__ == "__main__":
    main()
