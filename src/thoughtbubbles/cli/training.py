"""Commands that train, `train` and `compare`, and what a training costs, `plan`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from thoughtbubbles.cli.shared import BudgetOption, JsonOption, QuietOption, with_options
from thoughtbubbles.recipes.options import PlanOptions
from thoughtbubbles.support.errors import RunError
from thoughtbubbles.support.files import json_text

if TYPE_CHECKING:
    from thoughtbubbles.recipes.training import Recipe
    from thoughtbubbles.training.session import Callback

VerifyOption = Annotated[
    bool,
    Option(
        "--verify",
        help="Check every file of prepared data against its manifest first; without, once after each change, below "
        "20 GB.",
    ),
]


def _help_recipe(describe: Callable[[], str]) -> Any:
    """An option that says what a recipe may hold, and exits."""

    def say(asked: bool) -> None:
        if asked:
            typer.echo(describe())
            raise typer.Exit

    return Option("--help-recipe", callback=say, is_eager=True, help="Say what a recipe may hold, and exit.")


def _describe_recipe() -> str:
    from thoughtbubbles.recipes.training import describe_recipe

    return describe_recipe()


def _describe_comparison() -> str:
    from thoughtbubbles.recipes.comparison import describe_comparison

    return describe_comparison()


def train(
    recipe: Annotated[Path, Argument(help="Recipe, a YAML file with the sections model, data and training.")],
    overrides: Annotated[
        list[str] | None, Argument(help="section.key=value, such as training.learning_rate=3e-4.")
    ] = None,
    verify: VerifyOption = False,
    quiet: QuietOption = False,
    _help: Annotated[bool, _help_recipe(_describe_recipe)] = False,
) -> None:
    """Train a model as a recipe says, or go on with a run that was interrupted.

    The run's folder gets metrics.jsonl, checkpoints/, model/ and summary.json. Started again, a run goes on from its
    newest sound checkpoint. SIGTERM, SIGUSR1 and Ctrl-C save and stop; a second Ctrl-C stops at once.
    """
    from thoughtbubbles.model.routing import LEAK
    from thoughtbubbles.recipes.training import load_recipe
    from thoughtbubbles.support.machine import keep_freed_memory
    from thoughtbubbles.training.run import train as run_training

    keep_freed_memory()
    loaded = load_recipe(recipe, overrides or ())
    summary = run_training(loaded, progress=not quiet, callbacks=_scores(loaded), verify=verify)
    if not _last_word():
        return
    leak = f" (leaks: {LEAK})" if summary.eval_leaks else ""
    typer.echo(
        f"{summary.tokens:,} tokens at {summary.tokens_per_second:,.0f} tokens/s; "
        f"validation loss {summary.eval_loss:.4f}, perplexity {summary.eval_perplexity:.2f}{leak}; "
        f"model in {Path(loaded.training.output) / 'model'}"
    )


def _last_word() -> bool:
    """Part from the other processes that torchrun started; whether this is the one that speaks for all."""
    import torch.distributed as processes

    if not (processes.is_available() and processes.is_initialized()):
        return True
    main = processes.get_rank() == 0
    # One that left while others still talk to it would abort them.
    processes.barrier()
    processes.destroy_process_group()
    return main


def compare(
    recipe: Annotated[Path, Argument(help="Recipe of a comparison, such as recipes/compare/books.yaml.")],
    overrides: Annotated[
        list[str] | None, Argument(help="section.key=value or key=value, such as training.steps=100 or 'seeds=[0, 1]'.")
    ] = None,
    jobs: Annotated[int, Option(help="Runs at a time; each has its share of the cores, or a GPU.", min=1)] = 1,
    report_only: Annotated[
        bool, Option("--report-only", help="Train nothing: report what is finished so far.")
    ] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Say what would be trained, and exit.")] = False,
    verify: VerifyOption = False,
    quiet: QuietOption = False,
    _help: Annotated[bool, _help_recipe(_describe_comparison)] = False,
) -> None:
    """Train variants of a model on the same data, measure them alike, and report.

    Writes report.md, report.json, report.html and plots/ into the recipe's output folder, beside the runs. Finished
    runs are not done again: started again after whatever stopped it, a comparison goes on where it was.
    """
    from thoughtbubbles.comparison.compare import carry_out, look
    from thoughtbubbles.comparison.control import control_lines
    from thoughtbubbles.comparison.pages import write_report
    from thoughtbubbles.comparison.results import build_report
    from thoughtbubbles.comparison.runs import RunPlanner
    from thoughtbubbles.recipes.comparison import load_comparison

    planner = RunPlanner(load_comparison(recipe, overrides or ()), verify)
    if dry_run:
        for line in planner.describe():
            typer.echo(line)
        return
    found = look(planner) if report_only else carry_out(planner, jobs, progress=not quiet)
    output = planner.comparison.output
    if not found.finished:
        raise RunError(f"{output}: no run is finished: {_reasons(found.failed) or 'start without --report-only'}")
    report = build_report(planner, found)
    write_report(report, output)
    for line in control_lines(report.trials):
        typer.echo(line)
    typer.echo(f"{len(found.finished)} runs, {len(found.missing)} missing; report in {output / 'report.html'}")
    if found.failed:
        raise RunError(f"{len(found.failed)} runs cannot go on: {_reasons(found.failed)}")


def _reasons(failed: Mapping[str, str]) -> str:
    return "; ".join(f"{label}: {reason}" for label, reason in failed.items())


def _scores(recipe: "Recipe") -> Sequence["Callback"]:
    """What scores benchmarks on the way, for a recipe that wants any."""
    if recipe.training.eval_tasks is None:
        return []
    from thoughtbubbles.evaluation.during_training import task_scores

    return task_scores(recipe)


@with_options(PlanOptions, budget=BudgetOption)
def plan(
    config: Annotated[
        str, Argument(help="A preset, such as nano, 150m or 1.9b, a recipe (.yaml), or the folder of a model or run.")
    ],
    given: dict[str, Any],
    as_json: JsonOption = False,
) -> None:
    """Work out what a model will cost: parameters, operations, memory and time, beside the dense model's."""
    from thoughtbubbles.planning.plan import make_plan
    from thoughtbubbles.planning.table import show_plan

    made = make_plan(config, **given)
    if as_json:
        typer.echo(json_text(asdict(made), indent=2))
    else:
        show_plan(made)
