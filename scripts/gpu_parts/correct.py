"""The fast paths against the slow reference, on the device.

Each case in float32, tf32 off: by its own routing, whose survivors are those of the reference except where scores all
but tie (docs/method.md, Routing), and with the reference's survivors, logits and all gradients. In bfloat16 with the
reference's survivors, and by its own routing for the share that rounding changes. Token by token with a cache against
all at once, in float64. Three cases are compiled block by block.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from tests.helpers import Case, admission_rule, count_flips, recorded_scores, relative_errors, survivors_of
from torch import Tensor

from gpu_parts.cases import (
    Reference,
    all_cases,
    budget_of,
    checksum_of,
    inputs_of,
    model_of,
    name_of,
    objective,
    read_references,
)
from gpu_parts.driver import FAULTS, Item, Setting, run_part
from gpu_parts.kit import open_references
from thoughtbubbles import ThoughtbubblesForCausalLM
from thoughtbubbles.model.cache import StreamCache
from thoughtbubbles.training.sharding import compile_model

BARS = {"logits": 1e-4, "loss": 1e-4, "gradients": 1e-3, "bfloat16_logits": 5e-2, "cached": 1e-9}
"""What is too much; bfloat16 as ||difference|| / ||logits||."""
PREFILL = 12
COMPILED = ("causal", "topk", "threshold")
PLAIN: Case = {"attenuation": "paper", "merge": "residual", "gate": "learned", "budget": "2", "padding": "none"}


def items(setting: Setting) -> Iterator[Item]:
    """Each case, then those to be compiled."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    references = read_references(open_references(setting.kit))
    cases = {name: case for case in all_cases() if (name := name_of(case)) in references}
    for name, case in cases.items():
        yield Item(name, 2, partial(check, case, references[name], setting.device))
    for routing in COMPILED[: 1 if setting.rehearse else None]:
        backend = "aot_eager" if setting.rehearse else "inductor"
        case = {**PLAIN, "routing": routing}
        yield Item(f"compiled {routing}", 20, partial(check_compiled, case, setting.device, backend))


def check(case: Case, reference: Reference, device: str) -> dict[str, Any]:
    """The figures of a case, and which of them are beyond their bars."""
    model = model_of(case)
    torch.nn.Module.to(model, device)
    if abs(checksum_of(model) / reference.checksum - 1) > 1e-6:
        raise ValueError("the reference is of other weights: pack the kit with this checkout")
    figures: dict[str, Any] = {
        **survivors(model, case, reference),
        **with_given_survivors(model, case, reference),
        **in_bfloat16(model, case, reference),
    }
    if case["routing"] != "topk":  # which decodes by the causal rule
        figures["cached"] = cached_error(model.double(), case)
    return {**figures, FAULTS: beyond(figures)}


def survivors(model: ThoughtbubblesForCausalLM, case: Case, reference: Reference) -> dict[str, int]:
    """How many candidates were routed, and of how many whether they survive was decided otherwise for a near tie.

    Raises:
        AssertionError: if one was that is no near tie. Beyond a layer that differs a row's candidates are others.
    """
    ids, mask, _ = on(model, inputs_of(case))
    with recorded_scores(model) as scores:
        found = survivors_of(model(ids, attention_mask=mask, output_streams=True).streams, model.config.gated_layers)
    flips = candidates = 0
    for row, forks in enumerate(reference.forks):
        for layer, fork in forks.items():
            candidates += len(fork.optional)
            if found[row][layer] != fork.survivors:
                theirs = replace(fork, survivors=found[row][layer])
                flips += count_flips(theirs, scores[layer][row], admission_rule(model.config), budget_of(case))
                break
    return {"candidates": candidates, "flips": flips}


def with_given_survivors(model: ThoughtbubblesForCausalLM, case: Case, reference: Reference) -> dict[str, float]:
    """Errors of logits, loss and gradients in float32."""
    ids, mask, labels = on(model, inputs_of(case))
    with routed_as(model, reference):
        out = model(ids, attention_mask=mask, labels=labels)
    objective(out.logits, out.loss, mask).backward()
    gradients = {name: None if p.grad is None else p.grad.cpu() for name, p in model.named_parameters()}
    expected = {name: reference.gradients.get(name) for name in gradients}
    model.zero_grad()
    return {
        "logits": (real(out.logits, mask) - real(reference.logits, mask)).abs().max().item(),
        "loss": abs(out.loss.item() - reference.loss),
        "gradients": max(relative_errors(gradients, expected).values()),
    }


@torch.no_grad()
def in_bfloat16(model: ThoughtbubblesForCausalLM, case: Case, reference: Reference) -> dict[str, float]:
    """The error of the logits, and the share of all survivors that rounding changes."""
    ids, mask, _ = on(model, inputs_of(case))
    expected = real(reference.logits, mask)
    with torch.autocast(model.device.type, torch.bfloat16):
        with routed_as(model, reference):
            logits = real(model(ids, attention_mask=mask).logits, mask)
        streams = model(ids, attention_mask=mask, output_streams=True).streams
    found = survivors_of(streams, model.config.gated_layers)
    changed = total = 0
    for row, forks in enumerate(reference.forks):
        for layer, fork in forks.items():
            changed += len(set(found[row][layer]) ^ set(fork.survivors))
            total += len(fork.survivors)
    share = changed / total if total else 0.0
    return {"bfloat16_logits": ((logits - expected).norm() / expected.norm()).item(), "bfloat16_changed": share}


@torch.no_grad()
def cached_error(model: ThoughtbubblesForCausalLM, case: Case) -> float:
    """The largest difference of a logit between a row token by token and all of it at once."""
    ids, mask, _ = on(model, inputs_of(case))
    cache, pieces = StreamCache(), []
    for first, end in [(0, PREFILL), *((t, t + 1) for t in range(PREFILL, ids.shape[1]))]:
        seen = None if mask is None else mask[:, :end]
        pieces.append(model(ids[:, first:end], attention_mask=seen, cache=cache).logits)
    whole = model(ids, attention_mask=mask).logits
    return (real(torch.cat(pieces, dim=1), mask) - real(whole, mask)).abs().max().item()


def check_compiled(case: Case, device: str, backend: str) -> dict[str, Any]:
    """Logits and gradients of a model compiled block by block against those of the model as it is."""
    eager, compiled = (model_of(case) for _ in range(2))
    for model in (eager, compiled):
        torch.nn.Module.to(model, device)
    compile_model(compiled, "blocks", backend=backend)
    ids, _, labels = on(eager, inputs_of(case))
    found = []
    for model in (eager, compiled):
        out = model(ids, labels=labels, output_streams=True)
        objective(out.logits, out.loss, None).backward()
        found.append((out, {name: None if p.grad is None else p.grad.cpu() for name, p in model.named_parameters()}))
    (expected, theirs), (ours, gradients) = found
    alike = survivors_of(ours.streams, eager.config.gated_layers) == survivors_of(
        expected.streams, eager.config.gated_layers
    )
    figures = {
        "logits": (ours.logits - expected.logits).abs().max().item(),
        "gradients": max(relative_errors(gradients, theirs).values()),
    }
    return {**figures, FAULTS: [*([] if alike else ["other survivors"]), *beyond(figures)]}


def beyond(figures: dict[str, Any]) -> list[str]:
    """The figures that are not within their bars."""
    return [f"{name} {figures[name]:.3g}" for name in BARS if name in figures and not figures[name] <= BARS[name]]


@contextmanager
def routed_as(model: ThoughtbubblesForCausalLM, reference: Reference) -> Iterator[None]:
    """The gates let through what the reference did."""
    gates = {int(layer): gate for layer, gate in model.model.gates.items()}
    for layer, gate in gates.items():
        survivors = [row[layer].survivors for row in reference.forks]
        gate._route = partial(_as_given, survivors)
    yield
    for gate in gates.values():
        del gate._route


def _as_given(survivors: list[list[int]], candidates: tuple[Any, ...], _memory: Any) -> Tensor:
    survive = torch.zeros_like(candidates[2])
    for row, kept in enumerate(survivors):
        survive[row, kept] = True
    return survive


def on(model: ThoughtbubblesForCausalLM, tensors: tuple[Tensor, Tensor | None, Tensor]) -> Any:
    """The tensors on the model's device."""
    return tuple(None if each is None else each.to(model.device) for each in tensors)


def real(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Those of real tokens, in float64 on the CPU."""
    wide = logits.double().cpu()
    return wide.flatten(0, 1) if mask is None else wide[mask.bool().cpu()]


if __name__ == "__main__":
    run_part("correct", items, __doc__)
