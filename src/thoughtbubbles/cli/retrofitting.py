"""The command that gives gates to a dense model, or takes them away: `retrofit`."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from thoughtbubbles.cli.shared import bad_input, check_budget, open_validation
from thoughtbubbles.support.errors import InputError


def retrofit(
    source: Annotated[
        str,
        Argument(
            help="Folder or hub name of a dense model: llama, mistral, qwen2, qwen3 or gpt_neox; with --back, the "
            "folder of a retrofitted model or of a run that trained it."
        ),
    ],
    out: Annotated[Path, Argument(help="New folder to write.")],
    fork_layers: Annotated[
        str | None,
        Option(help="0-based layers with a gate, such as 7,15,23; else at a quarter, a half and three quarters."),
    ] = None,
    budget: Annotated[str, Option(help="Streams per token, such as 1.5 or 2.")] = "2",
    gate_start: Annotated[float, Option(help="Score between 0 and 1 that a new gate gives to a fork.")] = 0.02,
    back: Annotated[
        bool, Option("--back", help="The way back: write the dense model, which is SOURCE at budget 1 and no more.")
    ] = False,
    data: Annotated[
        Path | None, Option(help="With --back: prepared data, to measure what the way back costs on.")
    ] = None,
) -> None:
    """Make a dense model that fork streams: its weights under our names, and new gates.

    At budget 1 it computes what the dense model computes; at larger budgets it begins near it, to be trained. Weights
    are read and written a few at a time; tokenizer, chat template and generation settings come along.
    """
    import torch

    from thoughtbubbles.model.accounting import parameter_counts
    from thoughtbubbles.model.retrofit import retrofit_folder

    if back:
        _back(source, out, data, fork_layers)
        return
    if data is not None:
        raise InputError(f"--data={data}: expected it with --back alone")
    check_budget(budget)
    # So that the same call writes the same gates.
    torch.manual_seed(0)
    with bad_input():
        made = retrofit_folder(source, out, fork_layers=_layers(fork_layers), budget=budget, gate_start=gate_start)
    config, counts = made.config, parameter_counts(made.config)
    layers = ", ".join(map(str, config.gated_layers))
    typer.echo(
        f"{made.kind}, {config.num_hidden_layers} layers of width {config.hidden_size}: {counts.total - counts.gates:,}"
        f" parameters; {counts.gates:,} new in gates before layers {layers} (the first is 0); budget "
        f"{config.exact_budget()}, in {out}"
    )
    if made.document_start is not None:
        typer.echo(f"{made.document_start!r} precedes a text, as in the source's tokenizer")
    if made.left_out:
        typer.echo(f"left out, since the source's class has no use for them: {', '.join(made.left_out)}", err=True)


def _layers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(layer) for layer in text.split(",")]
    except ValueError:
        raise InputError(f"--fork-layers={text}: expected layers such as 7,15,23") from None


def _back(folder: str, out: Path, data: Path | None, fork_layers: str | None) -> None:
    from thoughtbubbles.model.loading import load_config
    from thoughtbubbles.model.retrofit import to_dense_folder

    if fork_layers is not None:
        raise InputError(f"--fork-layers={fork_layers}: expected it without --back, a dense model has none")
    losses = None if data is None else _losses(folder, data)
    kind = to_dense_folder(folder, out)
    config = load_config(folder)
    budget = config.exact_budget()
    typer.echo(f"{kind} in {out}: {folder} at budget 1")
    if budget != 1 and not config.rule.is_dense:
        typer.echo(f"It is not {folder} at budget {budget}: what was trained with forks loses them.")
    for kappa, loss in (losses or {}).items():
        typer.echo(f"validation loss at budget {kappa}: {loss:.4f} nats" + (", that of OUT" if kappa == "1" else ""))


def _losses(folder: str, data: Path) -> dict[str, float]:
    """Validation losses in nats, by budget: the model's own and 1."""
    from thoughtbubbles.evaluation.perplexity import evaluate_perplexity
    from thoughtbubbles.model.budget import parse_budget
    from thoughtbubbles.model.loading import load_model

    _, _, blocks = open_validation(data, folder, None)
    model = load_model(folder)
    budgets = dict.fromkeys([str(model.config.exact_budget()), "1"])
    return {kappa: evaluate_perplexity(model, blocks, budget=parse_budget(kappa)).loss for kappa in budgets}
