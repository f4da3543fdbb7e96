"""The cases of the part `correct`, and what the slow reference says of them.

References take minutes on a CPU, so they are made beforehand and carried as arrays. Weights are drawn by NumPy, whose
numbers are the same on every machine, and need not be carried.
"""

import hashlib
import inspect
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tests.helpers import Case, all_pairs, padding_mask, set_thresholds
from torch import Tensor

from thoughtbubbles import ThoughtbubblesConfig, ThoughtbubblesForCausalLM
from thoughtbubbles.model import reference
from thoughtbubbles.model.reference import ReferenceFork, reference_forward
from thoughtbubbles.support.files import replacing

ROWS, LENGTH, VOCAB = 3, 21, 61
IGNORED = -100
REFERENCES_NAME = "references.pt"
GATES: dict[str, dict[str, Any]] = {
    "learned": {},
    "forks": {"gate_scores": "forks"},
    "fixed": {"gate_scores": "fixed"},
    "relative": {"fork_embedding": "relative"},
    "attended": {"fork_content": "attended"},
}
FACTORS: dict[str, list[Any]] = {
    "routing": ["causal", "threshold", "topk", "random", "uniform", "none", "copy", "pause"],
    "attenuation": ["paper", "released", "none"],
    "merge": ["residual", "residual-normed", "probability", "root"],
    "gate": list(GATES),
    "budget": ["1", "1.5", "2", "4"],
    "padding": ["none", "left", "right", "holes"],
}
TOY = 4


@dataclass(frozen=True)
class Reference:
    """What the reference says of a case.

    Attributes:
        checksum: of the weights that it was given.
        logits: [B, T, V] float64, zeros at padding.
        loss: mean over the targets.
        gradients: by parameter, of `objective`.
        forks: by row and fork layer.
    """

    checksum: float
    logits: Tensor
    loss: float
    gradients: dict[str, Tensor]
    forks: list[dict[int, ReferenceFork]]


def all_cases() -> list[Case]:
    """Any two values of any two factors meet."""
    return all_pairs(FACTORS)


def name_of(case: Case) -> str:
    """Readable, of all values."""
    return "-".join(map(str, case.values()))


def config_of(case: Case) -> ThoughtbubblesConfig:
    """A small model; its heads have 16 channels, of which fused kernels can make use."""
    budget = case["budget"]
    return ThoughtbubblesConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        fork_layers=[0, 1] if case["routing"] == "uniform" else [1, 2],
        routing=case["routing"],
        attenuation=case["attenuation"],
        merge=case["merge"],
        # Copies are whole.
        budget="3" if budget == "1.5" and case["routing"] in ("copy", "pause") else budget,
        **GATES[case["gate"]],
    )


def inputs_of(case: Case) -> tuple[Tensor, Tensor | None, Tensor]:
    """Ids, mask and labels [B, T]."""
    draws = np.random.RandomState(zlib.crc32(name_of(case).encode()))
    ids = torch.from_numpy(draws.randint(VOCAB, size=(ROWS, LENGTH)).astype(np.int64))
    return ids, padding_mask(case["padding"], ROWS, LENGTH), ids.masked_fill(torch.arange(LENGTH) % 5 == 3, IGNORED)


def model_of(case: Case) -> ThoughtbubblesForCausalLM:
    """The model of a case, on the CPU, in evaluation."""
    model = ThoughtbubblesForCausalLM(config_of(case))
    for name, parameter in model.named_parameters():
        noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(parameter.shape))
        is_gain = "norm" in name and name.endswith("weight")
        values = 1 + 0.2 * noise if is_gain else (0.5 if "embed" in name else 0.3) * noise
        parameter.data.copy_(torch.from_numpy(np.asarray(values)))
    set_thresholds(model)
    model.eval()
    return model


def checksum_of(model: ThoughtbubblesForCausalLM) -> float:
    """Tells weights of another drawing apart."""
    return float(sum(parameter.detach().double().abs().sum() for parameter in model.parameters()))


def objective(logits: Tensor, loss: Tensor, mask: Tensor | None) -> Tensor:
    """What is differentiated: a fixed weighting of all real logits, and the loss."""
    weights = torch.from_numpy(np.random.RandomState(1).standard_normal(tuple(logits.shape))).to(logits)
    real = torch.ones_like(weights[..., 0], dtype=torch.bool) if mask is None else mask.to(weights.device).bool()
    return (logits * weights)[real].mean() + loss


def make_reference(case: Case) -> Reference:
    """Ask the reference, gradients included."""
    model, (ids, mask, labels) = model_of(case), inputs_of(case)
    parameters = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    state = {name: buffer.double() for name, buffer in model.named_buffers()} | parameters
    out = reference_forward(model.config, state, ids, mask, labels)
    assert out.loss is not None
    objective(out.logits, out.loss, mask).backward()
    gradients = {name: each.grad.float() for name, each in parameters.items() if each.grad is not None}
    forks = [
        {layer: replace(fork, candidate_scores=fork.candidate_scores.detach()) for layer, fork in row.items()}
        for row in out.forks
    ]
    return Reference(checksum_of(model), out.logits.detach(), float(out.loss.detach()), gradients, forks)


def write_references(path: Path, references: Mapping[str, Reference]) -> None:
    """Save references by the name of their case."""
    packed: dict[str, Any] = {}
    for name, said in references.items():
        forks = [{layer: _packed(fork) for layer, fork in row.items()} for row in said.forks]
        packed[name] = {**vars(said), "logits": said.logits.float(), "forks": forks}
    with replacing(path) as partial:
        torch.save({"source": source(), "cases": packed}, partial)


def read_references(path: Path) -> dict[str, Reference]:
    """What `write_references` saved.

    Raises:
        ValueError: if the reference has changed since.
    """
    found, saved = {}, torch.load(path, weights_only=True)
    if saved["source"] != source():
        raise ValueError(f"{path} is of another version of reference.py: pack the kit again")
    for name, values in saved["cases"].items():
        forks = [{layer: ReferenceFork(**fork) for layer, fork in row.items()} for row in values["forks"]]
        found[name] = Reference(**{**values, "logits": values["logits"].double(), "forks": forks})
    return found


def source() -> str:
    """Tells versions of the reference apart."""
    return hashlib.sha256(inspect.getsource(reference).encode()).hexdigest()


def _packed(fork: ReferenceFork) -> dict[str, Any]:
    return {each.name: getattr(fork, each.name) for each in fields(fork)}


def budget_of(case: Case) -> Fraction:
    """Streams a token."""
    return config_of(case).exact_budget()
