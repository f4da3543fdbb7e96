"""The command `thoughtbubbles`.

Commands import what they need when they run, so that help answers at once.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from thoughtbubbles.support.errors import InputError, RunError, ending
from thoughtbubbles.support.files import json_text, user_path

# What the command line itself may get wrong; typer names only its last kind.
UsageError: Any = typer.BadParameter.__base__

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer

    from thoughtbubbles.evaluation.perplexity import Perplexity


class _Command(TyperCommand):
    """A command whose paths may begin with `~`, wherever on the command line they stand."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, args)
        ctx.params = {
            name: user_path(value) if isinstance(value, Path) else value for name, value in ctx.params.items()
        }
        return rest


class _App(typer.Typer):
    """An app whose commands are `_Command`s."""

    def command(self, name: str | None = None, **options: Any) -> Callable[[Any], Any]:
        return super().command(name, **{"cls": _Command, **options})


app = _App(name="thoughtbubbles", add_completion=False, pretty_exceptions_enable=False)

MODEL_HELP = "A trained model: the folder of a run, its model/ folder, one that save_pretrained wrote, or a hub name."
# Of a batch: more than any memory holds.
MOST_ROWS = 1 << 20
VERIFY_HELP = (
    "Check every file of prepared data against its manifest first; without, once after each change, below 20 GB."
)
BUDGET_HELP = "Streams per token, such as 1, 1.5 or 2; if not given, the model's own."


def _say_version(asked: bool) -> None:
    if asked:
        from thoughtbubbles import __version__

        typer.echo(f"thoughtbubbles {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def thoughtbubbles(
    ctx: typer.Context,
    _version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Say the version, and exit.")
    ] = False,
) -> None:
    """Language models that learn to fork and delete residual streams: parallel thinking in latent space."""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())
        raise typer.Exit(InputError.exit_code)


@app.command()
def prepare(
    ctx: typer.Context,
    output: Annotated[Path, typer.Argument(help="Folder to write: train, validation, tokenizer, manifest.json.")],
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            help="Files of text or rows (.parquet, .jsonl, .json, .csv), packed ones (.gz, .zst and others) too; "
            "folders, globs; hf:NAME or hf:NAME?KEY=VALUE&KEY=VALUE, a dataset of the Hugging Face hub or a folder "
            "laid out like one, with the keys config, split (train), field, streaming (true), revision and "
            "data_files; or `python-stdlib`, which is also taken if none is named: the source text of the running "
            "Python's standard library.",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(help="YAML file with these options as keys; what the command line says goes before it."),
    ] = None,
    text_field: Annotated[str, typer.Option(help="Field of rows that holds the text.")] = "text",
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Tokenizer folder, or name on the hub; without, a byte-level BPE is trained on the corpus."),
    ] = None,
    vocab_size: Annotated[int, typer.Option(help="Vocabulary of the trained tokenizer.")] = 4096,
    block_size: Annotated[int, typer.Option(help="Tokens a block.")] = 512,
    validation_fraction: Annotated[float, typer.Option(help="Share of the documents held out.")] = 0.05,
    validation: Annotated[
        list[str] | None, typer.Option(help="Source for validation, instead of held-out documents; repeatable.")
    ] = None,
    limit_tokens: Annotated[
        int | None, typer.Option(help="Tokens to read of each source at most; validation sources are read whole.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the split and of the documents' order.")] = 0,
    num_proc: Annotated[
        int | None, typer.Option(help="Threads that tokenise, by default one a core; the result is the same.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a folder prepared differently.")] = False,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Prepare nothing: check every file of the folder by its manifest, and exit."),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars.")] = False,
) -> None:
    """Turn text into blocks of tokens to train on.

    Documents are separated by the end-of-text token and packed into blocks; attention and credit cross document
    borders inside a block. Validation is held out by document. A call that was interrupted goes on where it stopped
    when it is made again.
    """
    from thoughtbubbles.data import load_preparation, load_prepared
    from thoughtbubbles.data import prepare as prepare_data

    if verify:
        if sources or recipe is not None:
            raise InputError("--verify: expected the prepared folder alone, no sources and no --recipe")
        found = load_prepared(output, verify=True, progress=not quiet)
        typer.echo(f"{len(found.manifest.files)} files in {output} are as they were prepared")
        return
    options: dict[str, Any] = {
        "sources": tuple(sources or ("python-stdlib",)),
        "text_field": text_field,
        "tokenizer": tokenizer,
        "vocab_size": vocab_size,
        "block_size": block_size,
        "validation_fraction": validation_fraction,
        "validation": tuple(validation or ()),
        "limit_tokens": limit_tokens,
        "seed": seed,
    }
    if recipe is not None:
        options |= {key: value for key, value in load_preparation(recipe).items() if not _was_given(ctx, key)}
    manifest = prepare_data(output, **options, num_proc=num_proc, overwrite=overwrite, progress=not quiet)
    for name, split in (("train", manifest.train), ("validation", manifest.validation)):
        typer.echo(f"{name:<11}{split.documents:>9,} documents {split.tokens:>13,} tokens {split.blocks:>9,} blocks")
    typer.echo(f"vocabulary {manifest.vocab_size:>9,} tokens, blocks of {manifest.block_size} in {output}")
    for line in manifest.remarks():
        typer.echo(line)


@app.command("make-task")
def make_task(
    task: Annotated[str, typer.Argument(help="`arithmetic`, `kinship`, `lookup` or `recall`.")],
    output: Annotated[Path, typer.Argument(help="New folder to write: train.jsonl, test.jsonl, tokenizer, task.json.")],
    examples: Annotated[int, typer.Option(help="Rows to train on, as many of each difficulty.")] = 100_000,
    max_difficulty: Annotated[
        int, typer.Option(help="The greatest difficulty, the least being 1: operators, facts, or keys.")
    ] = 6,
    test_examples: Annotated[
        int | None,
        typer.Option(
            help="Rows to test on of each difficulty; if not given, 500, and fewer where there are not so many.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the rows; none tests on what another trains on.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Generate a procedural task: questions of graded difficulty whose answers are computed.

    Train on the rows with recipes/tasks, and measure with `exact-match`.
    """
    from thoughtbubbles.data.procedural import TASKS
    from thoughtbubbles.data.procedural import make_task as make
    from thoughtbubbles.recipes.values import check_known

    check_known(task, list(TASKS), "task", InputError)
    made = make(TASKS[task], output, examples, max_difficulty, test_examples, seed, progress=not quiet)
    typer.echo(
        f"{made.examples:,} rows to train on, {made.test_rows:,} to test on, difficulty 1 to {made.max_difficulty}, "
        f"in {output}"
    )


def _was_given(ctx: typer.Context, name: str) -> bool:
    """Whether the user gave a parameter, as against its default value."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _help_recipe(asked: bool) -> None:
    if asked:
        from thoughtbubbles.recipes.training import describe_recipe

        typer.echo(describe_recipe())
        raise typer.Exit


def _help_comparison(asked: bool) -> None:
    if asked:
        from thoughtbubbles.recipes.comparison import describe_comparison

        typer.echo(describe_comparison())
        raise typer.Exit


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="Recipe, a YAML file with the sections model, data and training.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value, such as training.learning_rate=3e-4.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help=VERIFY_HELP)] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress display.")] = False,
    _help: Annotated[
        bool,
        typer.Option(
            "--help-recipe", callback=_help_recipe, is_eager=True, help="Say what a recipe may hold, and exit."
        ),
    ] = False,
) -> None:
    """Train a model as a recipe says, or go on with a run that was interrupted.

    The run's folder gets metrics.jsonl, checkpoints/, model/ and summary.json. Started again, a run goes on from its
    newest sound checkpoint. SIGTERM, SIGUSR1 and Ctrl-C save and stop; a second Ctrl-C stops at once.
    """
    from thoughtbubbles.evaluation.during_training import task_scores
    from thoughtbubbles.recipes.training import load_recipe
    from thoughtbubbles.support.machine import keep_freed_memory
    from thoughtbubbles.training.run import train as run_training

    keep_freed_memory()
    loaded = load_recipe(recipe, overrides or ())
    summary = run_training(loaded, progress=not quiet, callbacks=task_scores(loaded), verify=verify)
    if not _last_word():
        return
    leak = " (leaks: topk sees later tokens)" if summary.eval_leaks else ""
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


@app.command()
def compare(
    recipe: Annotated[Path, typer.Argument(help="Recipe of a comparison, such as recipes/compare/books.yaml.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="section.key=value or key=value, such as training.steps=100 or 'seeds=[0, 1]'."),
    ] = None,
    jobs: Annotated[int, typer.Option(help="Runs at a time; each has its share of the cores, or a GPU.", min=1)] = 1,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Train nothing: report what is finished so far.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be trained, and exit.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help=VERIFY_HELP)] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress display.")] = False,
    _help: Annotated[
        bool,
        typer.Option(
            "--help-recipe", callback=_help_comparison, is_eager=True, help="Say what a recipe may hold, and exit."
        ),
    ] = False,
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


@app.command()
def perplexity(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    data: Annotated[
        Path,
        typer.Argument(
            help="Folder that `thoughtbubbles prepare` wrote, of which the validation split is taken, or a file of "
            "text or rows."
        ),
    ],
    text_field: Annotated[str, typer.Option(help="Field of a file's rows that holds the text.")] = "text",
    mode: Annotated[
        str | None,
        typer.Option(
            help="`blockwise`: one forward over a block. `prefix`: each prediction from its prefix alone, about T / 2 "
            "times the work. They agree but for routing topk, which leaks. If not given, blockwise; both for topk.",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[str | None, typer.Option(help=BUDGET_HELP, show_default=False)] = None,
    budget_rule: Annotated[
        str, typer.Option(help="In prefix mode: `proportional` to the prefix or `fixed`, as for a whole block.")
    ] = "proportional",
    blocks: Annotated[int | None, typer.Option(help="Only so many blocks, evenly spaced.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(help="Blocks at a time.", min=1, max=MOST_ROWS)] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure a model's perplexity on validation blocks, per token, byte and word."""
    from thoughtbubbles.evaluation.perplexity import TextSize, check_options, evaluate_perplexity
    from thoughtbubbles.model.budget import parse_budget
    from thoughtbubbles.model.loading import load_model
    from thoughtbubbles.support.progress import stage

    with _bad_input():
        check_options(mode or "blockwise", budget_rule)
        parse_budget(budget or 1)
    rows, tokenizer = _validation_blocks(data, model, blocks, text_field)
    size = TextSize.of(tokenizer, rows)
    loaded = load_model(model)
    modes = [mode] if mode else ["blockwise"] + ["prefix"] * (loaded.config.leaks)
    results = []
    for each in modes:
        with stage(each, len(rows) * (rows.shape[1] - 1), enabled=not as_json) as bar:
            on_progress = partial(bar.advance, note="tokens")
            results.append(evaluate_perplexity(loaded, rows, each, budget, budget_rule, batch_size, on_progress, size))
    if as_json:
        typer.echo(json_text([asdict(result) for result in results], indent=2))
    else:
        for result in results:
            typer.echo(_describe(result))


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    prompt: Annotated[str | None, typer.Option(help="Text to continue; empty starts a new document.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            help="File that holds the prompt, or one in each row of .jsonl, .json, .csv or .parquet; without either, "
            "standard input does."
        ),
    ] = None,
    text_field: Annotated[str, typer.Option(help="Field of rows that holds the text.")] = "text",
    interactive: Annotated[bool, typer.Option("--interactive", help="Ask for prompts until end of input.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.", min=1)] = 100,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0)] = 0.8,
    top_k: Annotated[int, typer.Option(help="Sample among the k likeliest tokens; 0 is all.", min=0)] = 0,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest tokens of this mass.", min=0, max=1)] = 1.0,
    min_p: Annotated[
        float, typer.Option(help="Sample among tokens of at least this share of the likeliest's.", min=0, max=1)
    ] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: repeat less.", min=0.01)] = 1.0,
    budget: Annotated[str | None, typer.Option(help=BUDGET_HELP, show_default=False)] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    show_bubbles: Annotated[
        bool, typer.Option("--show-bubbles", help="Afterwards mark each token with the streams it ended with.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, not the text as it comes.")] = False,
) -> None:
    """Continue a prompt, printing tokens as they come."""
    from thoughtbubbles.evaluation.generation import Sampling, generate_text
    from thoughtbubbles.inspection.bubbles import final_bubbles, mark_bubbles
    from thoughtbubbles.model.budget import parse_budget
    from thoughtbubbles.model.loading import load_model, load_tokenizer
    from thoughtbubbles.recipes.values import check_seed
    from thoughtbubbles.support.text import token_pieces

    check_seed("--seed", seed, InputError)
    with _bad_input():
        parse_budget(budget or 1)
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    tokenizer, loaded = load_tokenizer(model), load_model(model)
    for text in _prompts(prompt, file, text_field, interactive):
        with _bad_input():
            streamer = None if as_json else _streamer(tokenizer)
            made = generate_text(loaded, tokenizer, text, max_new_tokens, sampling, budget, seed, streamer)
        sizes = final_bubbles(loaded, made.ids, budget) if show_bubbles else None
        if as_json:
            typer.echo(json_text({**asdict(made), "seed": seed, "bubbles": sizes}))
        elif sizes is not None:
            typer.echo(mark_bubbles(token_pieces(tokenizer, made.ids), sizes))


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    tasks: Annotated[
        str,
        typer.Option(
            help="With commas between: lambada, hellaswag, blimp, piqa, arc_easy, arc_challenge, gsm8k, wikitext."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder of the results; made again, a call goes on where it stopped.")],
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Folder with the files of the tasks; without, the Hugging Face hub.", show_default=False),
    ] = None,
    tier: Annotated[str, typer.Option(help="How many documents: `smoke`, `small` or `full`.")] = "small",
    limit: Annotated[
        int | None,
        typer.Option(help="Documents of each task, evenly spread, in place of the tier's.", min=1, show_default=False),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="Streams per token, such as 2 or 1,1.5,2; if not given, the model's.", show_default=False),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(
            help="Worked examples before each document, in place of the task's own number.", min=0, show_default=False
        ),
    ] = None,
    no_cache: Annotated[
        bool,
        typer.Option("--no-cache", help="Recompute the prefix for every generated token: the paper's rule for topk."),
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Texts at a time; no score depends on it.", min=1, max=MOST_ROWS)] = 8,
    against: Annotated[
        Path | None,
        typer.Option(help="Results of another model to compare with, document by document.", show_default=False),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress display.")] = False,
) -> None:
    """Evaluate a model on benchmarks by lm-evaluation-harness and by the authors' protocol.

    Writes results.json, table.md, documents/ (what every document scored) and, for several budgets, scores.png.
    """
    from thoughtbubbles.evaluation.benchmarks import parse_tasks
    from thoughtbubbles.evaluation.evaluate import Options, parse_budgets
    from thoughtbubbles.evaluation.evaluate import evaluate as run_evaluation
    from thoughtbubbles.evaluation.records import EvaluationFolder
    from thoughtbubbles.evaluation.report import PLOT_NAME, panels_of, rows_of, write_report

    options = Options(
        benchmarks=parse_tasks(tasks),
        data_dir=data_dir,
        tier=tier,
        limit=limit,
        budgets=None if budget is None else parse_budgets(budget),
        num_fewshot=num_fewshot,
        use_cache=not no_cache,
        batch_size=batch_size,
    )
    other = None if against is None else EvaluationFolder(against)
    if other is not None:
        _ = other.settings  # before the work: it may be no evaluation
    folder = run_evaluation(model, output, options, progress=not quiet)
    typer.echo(write_report(folder, other))
    rows = rows_of(folder)
    if len({row.budget for row in rows}) > 1:
        from thoughtbubbles.support.plots import plot_scores

        plot_scores(panels_of(rows), output / PLOT_NAME, _title(model))


@app.command("exact-match")
def exact_match(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    rows: Annotated[
        Path, typer.Argument(help="Questions: a .jsonl or .parquet file of rows with prompt, answer and difficulty.")
    ],
    budget: Annotated[
        str | None,
        typer.Option(help="Streams per token, such as 2 or 1,1.5,2; if not given, the model's.", show_default=False),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Only so many rows of each difficulty, evenly spread.", min=1, show_default=False)
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for exact_match.json, answers.jsonl and exact_match.png.", show_default=False),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(help="Questions at a time; no answer depends on it.", min=1, max=MOST_ROWS)
    ] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure how many questions a model answers exactly, by difficulty and budget.

    It is asked as `task: sft` taught it, and answers greedily, up to the end of text.
    """
    from thoughtbubbles.evaluation.answering import read_questions
    from thoughtbubbles.evaluation.evaluate import parse_budgets
    from thoughtbubbles.evaluation.exact_match import MARKS, PLOT_NAME, lines_of, measure_exact_match
    from thoughtbubbles.support.folders import filling, output_folder

    budgets = None if budget is None else parse_budgets(budget)
    with nullcontext() if output is None else output_folder(output, MARKS):
        questions = read_questions(rows, limit)
        found = measure_exact_match(model, questions, str(rows), budgets, batch_size, progress=not as_json)
        typer.echo(json_text(found.to_dict(), indent=2) if as_json else found.table())
        if output is not None:
            from thoughtbubbles.support.plots import plot_scores

            with filling(output) as files:
                written = [*found.write(files), files / PLOT_NAME]
                asked = f"{_title(model)}: {rows.resolve().parent.name}/{rows.name}"
                plot_scores({"exact match": lines_of(found)}, written[-1], asked, xlabel="difficulty")
            _say_written(written, output)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    text: Annotated[str | None, typer.Option(help="A text to trace.", show_default=False)] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Or a folder that `thoughtbubbles prepare` wrote: statistics over its validation split."),
    ] = None,
    budget: Annotated[str | None, typer.Option(help=BUDGET_HELP, show_default=False)] = None,
    token: Annotated[
        int | None,
        typer.Option(
            help="With --text: the token whose family tree is drawn, counted from 0, which is the separator in front; "
            "if not given, the one with the largest bubble.",
            show_default=False,
        ),
    ] = None,
    blocks: Annotated[
        int | None, typer.Option(help="With --data: only so many blocks, evenly spaced.", min=1, show_default=False)
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(help="With --data: a dense model that measures entropy and surprisal too.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for pictures (PNG and SVG), JSON and the trace (Parquet).", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """See where a model thinks: in one text, or on average over a corpus."""
    from thoughtbubbles.model.budget import parse_budget

    if (text is None) == (data is None):
        raise InputError("--text, --data: expected exactly one of them")
    misplaced = [("--token", token, data), ("--blocks", blocks, text), ("--reference", reference, text)]
    for name, value, other in misplaced:
        if value is not None and other is not None:
            raise InputError(f"{name}={value}: expected it with {'--text' if name == '--token' else '--data'} alone")
    _check_text("--text", text or "")
    with _bad_input():
        parse_budget(budget or 1)
    from thoughtbubbles.inspection.report import MARKS
    from thoughtbubbles.support.folders import output_folder

    with _bad_input(), nullcontext() if output is None else output_folder(output, MARKS):
        if text is not None:
            _inspect_text(model, text, budget, token, output, as_json)
        elif data is not None:
            _inspect_data(model, data, budget, blocks, reference, output, as_json)


def _inspect_text(
    model: str, text: str, budget: str | None, token: int | None, output: Path | None, as_json: bool
) -> None:
    from thoughtbubbles.inspection.report import inspect_text, show_report, write_report
    from thoughtbubbles.model.loading import load_model, load_tokenizer
    from thoughtbubbles.support.progress import stage

    tokenizer, loaded = load_tokenizer(model), load_model(model)
    with stage("deleting bubbles", None, enabled=not as_json) as bar:
        report = inspect_text(loaded, tokenizer, text, budget, token, partial(bar.advance, note="bubbles"))
    if report.tokens_cut:
        kept = len(report.trace.ids)
        typer.echo(f"text of {kept + report.tokens_cut} tokens: cut to the first {kept}, all that fit", err=True)
    if as_json:
        typer.echo(json_text(report.to_dict()))
    else:
        show_report(report)
    if output is not None:
        _say_written(write_report(report, output), output)


def _inspect_data(
    model: str,
    data: Path,
    budget: str | None,
    blocks: int | None,
    reference: str | None,
    output: Path | None,
    as_json: bool,
) -> None:
    from thoughtbubbles.data import load_prepared
    from thoughtbubbles.inspection.report import (
        WORD_BLOCKS,
        check_reference,
        show_statistics,
        write_statistics,
    )
    from thoughtbubbles.inspection.survey import gather_statistics
    from thoughtbubbles.inspection.words import count_words
    from thoughtbubbles.model.loading import check_start, check_tokenizer, load_model
    from thoughtbubbles.support.progress import stage
    from thoughtbubbles.support.sampling import spread

    prepared = load_prepared(data)
    loaded = load_model(model)
    _check_vocabulary(loaded.config.vocab_size, prepared.manifest.vocab_size, data)
    tokenizer = prepared.tokenizer()
    check_tokenizer(model, tokenizer, str(data))
    check_start(model, tokenizer, str(data))
    independent = None
    if reference is not None:
        independent = load_model(reference)
        check_reference(loaded, independent, reference)
        check_tokenizer(reference, tokenizer, str(data))
    rows = prepared.validation[spread(len(prepared.validation), blocks)]["input_ids"]
    words = count_words(tokenizer, prepared.train[:WORD_BLOCKS]["input_ids"].tolist())
    with stage("inspecting", rows.numel(), enabled=not as_json) as bar:
        note = partial(bar.advance, note="tokens")
        found = gather_statistics(loaded, tokenizer, rows, words, budget, independent, on_progress=note)
    if as_json:
        typer.echo(json_text(found.to_dict()))
    else:
        show_statistics(found)
    if output is not None:
        _say_written(write_statistics(found, output), output)


@app.command()
def demo(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    other: Annotated[str | None, typer.Argument(help="A second model, shown beside the first.")] = None,
    port: Annotated[
        int | None,
        typer.Option(
            help="Port of this machine; if not given, the first free one from 7860 on.",
            min=1,
            max=65535,
            show_default=False,
        ),
    ] = None,
) -> None:
    """Open a page that shows a model think: its bubbles, token by token, at any budget.

    The page is served to this machine alone. It needs gradio: pip install 'thoughtbubbles\\[demo]'.
    """
    from thoughtbubbles.app.exhibit import Exhibit
    from thoughtbubbles.app.page import serve
    from thoughtbubbles.model.loading import load_model, load_tokenizer

    names = [model] if other is None else [model, other]
    server = serve([Exhibit(name, load_model(name), load_tokenizer(name)) for name in names], port)
    typer.echo(f"Thoughtbubbles is at {server.address} (Ctrl-C ends it)")
    server.wait()


def _say_written(paths: list[Path], folder: Path) -> None:
    typer.echo(f"{', '.join(path.name for path in paths)} in {folder}", err=True)


@app.command()
def plan(
    config: Annotated[
        str,
        typer.Argument(help="A preset, such as nano, 150m or 1.9b, a recipe (.yaml), or the folder of a model or run."),
    ],
    length: Annotated[
        int | None,
        typer.Option(
            help="Tokens a row; if not given, a block of the recipe's data, or the model's longest row.",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[str | None, typer.Option(help=BUDGET_HELP, show_default=False)] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Rows of a training step; if not given, the recipe's, or 16 a GPU.", show_default=False),
    ] = None,
    tokens: Annotated[
        float | None,
        typer.Option(help="Tokens to train on, such as 2.5e9; if not given, those of the recipe.", show_default=False),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="`float32` or `bfloat16`; if not given, the recipe's, or bfloat16.", show_default=False),
    ] = None,
    device_flops: Annotated[
        float | None,
        typer.Option(
            help="A device's peak in operations per second, such as 989e12 for an H100 in bfloat16: gives times.",
            show_default=False,
        ),
    ] = None,
    mfu: Annotated[
        float | None,
        typer.Option(help="Share of that peak which training reaches; 0.4 if not given.", show_default=False),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="A device's memory, such as 80GB or 24GiB: says what fits.", show_default=False),
    ] = None,
    gpus: Annotated[int, typer.Option(help="Devices that train together.")] = 1,
    sharding: Annotated[
        str | None,
        typer.Option(
            help="How they share weights, gradients and moments: `ddp`, not at all, or `fsdp`; if not given, "
            "the recipe's, or ddp.",
            show_default=False,
        ),
    ] = None,
    variant: Annotated[
        str | None,
        typer.Option(help="Which variant, where the recipe is that of a comparison.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Work out what a model will cost: parameters, operations, memory and time, beside the dense model's."""
    from thoughtbubbles.planning.plan import make_plan
    from thoughtbubbles.planning.table import show_plan

    made = make_plan(
        config,
        length,
        budget,
        batch_size,
        tokens,
        precision,
        device_flops,
        mfu,
        memory,
        gpus,
        sharding,
        variant,
    )
    if as_json:
        typer.echo(json_text(asdict(made), indent=2))
    else:
        show_plan(made)


def _streamer(tokenizer: "PreTrainedTokenizerBase") -> "BaseStreamer":
    from thoughtbubbles.evaluation.generation import TextPrinter

    return TextPrinter(tokenizer, partial(typer.echo, nl=False))


def _standard_input() -> str:
    """All of standard input, its line ends as they are."""
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is not UTF-8: {error}") from None


def _prompts(prompt: str | None, file: Path | None, text_field: str, interactive: bool) -> Iterator[str]:
    """The prompts of a call: one, as many as a user types, or each document of a file."""
    from thoughtbubbles.data.sources.reading import read_texts

    if sum((prompt is not None, file is not None, interactive)) > 1:
        raise InputError("--prompt, --file, --interactive: expected at most one of them")
    if interactive:
        with suppress(EOFError):
            while True:
                yield input("> ")
    elif file is not None:
        yield from read_texts(file, text_field)
    elif prompt is not None:
        _check_text("--prompt", prompt)
        yield prompt
    else:
        yield "" if sys.stdin.isatty() else _standard_input()


def _check_text(name: str, text: str) -> None:
    """Check that what a command line holds is text: it may be any bytes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{name}: expected text in UTF-8: {error}") from None


def _title(model: str) -> str:
    """What a picture calls a model: the name of its run."""
    path = Path(model)
    if not path.is_dir():
        return model
    path = path.resolve()
    return path.parent.name if path.name == "model" else path.name


def _validation_blocks(
    data: Path, model: str, count: int | None, text_field: str
) -> "tuple[Tensor, PreTrainedTokenizerBase]":
    """`count` blocks [n, T] of prepared data or of a file, evenly spaced, and the tokenizer that made them."""
    from thoughtbubbles.data import load_prepared
    from thoughtbubbles.evaluation.perplexity import read_blocks
    from thoughtbubbles.model.loading import check_start, check_tokenizer, load_config, load_tokenizer
    from thoughtbubbles.support.sampling import spread

    if data.is_file():
        config, own = load_config(model), load_tokenizer(model)
        _check_vocabulary(config.vocab_size, len(own), data)
        found = read_blocks(data, own, config.max_position_embeddings, text_field)
        return found[spread(len(found), count)], own
    prepared = load_prepared(data)
    tokenizer = prepared.tokenizer()
    _check_vocabulary(load_config(model).vocab_size, prepared.manifest.vocab_size, data)
    check_tokenizer(model, tokenizer, str(data))
    check_start(model, tokenizer, str(data))
    rows: Tensor = prepared.validation[spread(len(prepared.validation), count)]["input_ids"]
    return rows, tokenizer


def _describe(result: "Perplexity") -> str:
    rule = f", {result.budget_rule} budget rule" if result.budget_rule == "fixed" else ""
    error = "" if result.standard_error is None else f" +- {result.standard_error:.4f}"
    line = (
        f"{result.mode:<10} loss {result.loss:.4f}{error} nats per token, "
        f"perplexity {result.perplexity:.2f} ({result.tokens:,} tokens, budget {result.budget}{rule})"
    )
    if result.byte_perplexity is not None and result.word_perplexity is not None:
        line += f"\n           per byte {result.byte_perplexity:.4f}, per word {result.word_perplexity:,.2f}"
    if result.leaks:
        line += "\n           leaks: topk routing sees later tokens, so this is no left-to-right likelihood"
    return line


def _check_vocabulary(model_size: int, data_size: int, data: Path) -> None:
    if model_size < data_size:
        raise InputError(f"data {data}: vocabulary of {data_size}, expected at most the model's {model_size}")


@contextmanager
def _bad_input() -> Iterator[None]:
    """Turn the ValueErrors of the library's argument checks into bad input."""
    try:
        yield
    except InputError:
        raise
    except ValueError as error:
        raise InputError(str(error)) from error


def main() -> None:
    """Run the command.

    Bad input is one line on standard error and exit code 2; a run that cannot go on, or a disk or a network that
    fails, one line and 1. Any other exception is a fault of the program, and keeps its traceback.
    """
    try:
        code = app(standalone_mode=False)
        _flush()
    except BrokenPipeError:  # nobody reads on, as with `| head`
        code = RunError.exit_code
    except Exception as error:
        end = ending(_ours(error))
        if end is None:
            raise
        typer.echo(f"thoughtbubbles: {end}", err=True)
        code = end.exit_code
    sys.exit(code or 0)


def _flush() -> None:
    """Write what is left of the output; if that fails, throw it away, or the interpreter would try once more."""
    try:
        sys.stdout.flush()
    except OSError:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        raise


def _ours(error: Exception) -> Exception:
    """An error of the command line as bad input, with the option and what was given for it; others as they are."""
    if isinstance(error, typer.Abort):
        return RunError("the input ended")
    if not isinstance(error, UsageError):
        return error
    param = getattr(error, "param", None)
    given = None if param is None else _given(param.opts, sys.argv[1:])
    text = error.format_message() if given is None else f"{given}: {error.message}"
    return InputError(" ".join(text.split()))


def _given(names: Sequence[str], arguments: Sequence[str]) -> str | None:
    """The option of one of these names as it was given, the last time; None if it was not."""
    found = None
    for place, argument in enumerate(arguments):
        if argument in names:
            found = "=".join(arguments[place : place + 2])
        elif argument.partition("=")[0] in names:
            found = argument
    return found
