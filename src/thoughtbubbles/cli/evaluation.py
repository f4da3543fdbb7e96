"""Commands that measure a model: `perplexity`, `evaluate` and `exact-match`."""

from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from thoughtbubbles.cli.shared import (
    MOST_ROWS,
    BudgetOption,
    BudgetsOption,
    JsonOption,
    ModelArgument,
    QuietOption,
    TextFieldOption,
    bad_input,
    check_budget,
    check_vocabulary,
    open_validation,
    say_written,
)
from thoughtbubbles.support.files import json_text

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from thoughtbubbles.evaluation.perplexity import Perplexity
    from thoughtbubbles.evaluation.records import EvaluationFolder


def perplexity(
    model: ModelArgument,
    data: Annotated[
        Path,
        Argument(
            help="Folder that `thoughtbubbles prepare` wrote, of which the validation split is taken, or a file of "
            "text or rows."
        ),
    ],
    text_field: TextFieldOption = "text",
    mode: Annotated[
        str | None,
        Option(
            help="`blockwise`: one forward over a block. `prefix`: each prediction from its prefix alone, about T / 2 "
            "times the work. They agree but for routing topk, which leaks. If not given, blockwise; both for topk."
        ),
    ] = None,
    budget: BudgetOption = None,
    budget_rule: Annotated[
        str, Option(help="In prefix mode: `proportional` to the prefix or `fixed`, as for a whole block.")
    ] = "proportional",
    blocks: Annotated[int | None, Option(help="Only so many blocks, evenly spaced.", min=1)] = None,
    batch_size: Annotated[int, Option(help="Blocks at a time.", min=1, max=MOST_ROWS)] = 16,
    as_json: JsonOption = False,
) -> None:
    """Measure a model's perplexity on validation blocks, per token, byte and word."""
    from thoughtbubbles.evaluation.perplexity import TextSize, check_options, evaluate_perplexity
    from thoughtbubbles.model.loading import load_model
    from thoughtbubbles.support.progress import stage

    with bad_input():
        check_options(mode or "blockwise", budget_rule)
    check_budget(budget)
    rows, tokenizer = _validation_blocks(data, model, blocks, text_field)
    size = TextSize.of(tokenizer, rows)
    loaded = load_model(model)
    modes = [mode] if mode else ["blockwise"] + ["prefix"] * loaded.config.leaks
    results = []
    for each in modes:
        with stage(each, len(rows) * (rows.shape[1] - 1), enabled=not as_json) as bar:
            on_progress = partial(bar.advance, note="tokens")
            results.append(evaluate_perplexity(loaded, rows, each, budget, budget_rule, batch_size, on_progress, size))
    if as_json:
        typer.echo(json_text([asdict(result) for result in results], indent=2))
    else:
        for result in results:
            typer.echo(describe_perplexity(result))


def _validation_blocks(
    data: Path, model: str, count: int | None, text_field: str
) -> "tuple[Tensor, PreTrainedTokenizerBase]":
    """`count` blocks [n, T] of prepared data or of a file, evenly spaced, and the tokenizer that made them."""
    from thoughtbubbles.evaluation.perplexity import read_blocks
    from thoughtbubbles.model.loading import load_config, load_tokenizer
    from thoughtbubbles.support.sampling import spread

    if data.is_file():
        config, own = load_config(model), load_tokenizer(model)
        check_vocabulary(config.vocab_size, len(own), data)
        found = read_blocks(data, own, config.max_position_embeddings, text_field)
        return found[spread(len(found), count)], own
    _, tokenizer, rows = open_validation(data, model, count)
    return rows, tokenizer


def describe_perplexity(result: "Perplexity") -> str:
    """A measurement in words, of one to three lines."""
    from thoughtbubbles.model.routing import LEAK

    rule = f", {result.budget_rule} budget rule" if result.budget_rule == "fixed" else ""
    error = "" if result.standard_error is None else f" +- {result.standard_error:.4f}"
    line = (
        f"{result.mode:<10} loss {result.loss:.4f}{error} nats per token, "
        f"perplexity {result.perplexity:.2f} ({result.tokens:,} tokens, budget {result.budget}{rule})"
    )
    if result.byte_perplexity is not None and result.word_perplexity is not None:
        line += f"\n           per byte {result.byte_perplexity:.4f}, per word {result.word_perplexity:,.2f}"
    if result.leaks:
        line += f"\n           leaks: {LEAK}, so this is no left-to-right likelihood"
    return line


def evaluate(
    model: ModelArgument,
    tasks: Annotated[
        str,
        Option(
            help="With commas between: lambada, hellaswag, blimp, piqa, arc_easy, arc_challenge, gsm8k, gsm8k_bare, "
            "wikitext."
        ),
    ],
    output: Annotated[Path, Option(help="Folder of the results; made again, a call goes on where it stopped.")],
    data_dir: Annotated[
        Path | None, Option(help="Folder with the files of the tasks; without, the Hugging Face hub.")
    ] = None,
    tier: Annotated[str, Option(help="How many documents: `smoke`, `small` or `full`.")] = "small",
    limit: Annotated[
        int | None, Option(help="Documents of each task, evenly spread, in place of the tier's.", min=1)
    ] = None,
    budget: BudgetsOption = None,
    num_fewshot: Annotated[
        int | None, Option(help="Worked examples before each document, in place of the task's own number.", min=0)
    ] = None,
    no_cache: Annotated[
        bool, Option("--no-cache", help="Recompute the prefix for every generated token: the paper's rule for topk.")
    ] = False,
    batch_size: Annotated[int, Option(help="Texts at a time; no score depends on it.", min=1, max=MOST_ROWS)] = 8,
    against: Annotated[
        Path | None, Option(help="Results of another model to compare with, document by document.")
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """Evaluate a model on benchmarks by lm-evaluation-harness and by the authors' protocol.

    Writes results.json, table.md, documents/ (what every document scored) and, for several budgets, scores.png.
    """
    from thoughtbubbles.evaluation.benchmarks import parse_tasks
    from thoughtbubbles.evaluation.evaluate import Options, parse_budgets
    from thoughtbubbles.evaluation.evaluate import evaluate as run_evaluation
    from thoughtbubbles.evaluation.report import write_report

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
    other = None if against is None else _read_evaluation(against)
    folder = run_evaluation(model, output, options, progress=not quiet)
    typer.echo(write_report(folder, other))
    _plot_budgets(folder, output, _title(model))


def _read_evaluation(path: Path) -> "EvaluationFolder":
    """The evaluation in a folder, which may be none: that shows before the work."""
    from thoughtbubbles.evaluation.records import EvaluationFolder

    folder = EvaluationFolder(path)
    _ = folder.settings
    return folder


def _plot_budgets(folder: "EvaluationFolder", output: Path, title: str) -> None:
    from thoughtbubbles.evaluation.report import PLOT_NAME, panels_of, rows_of
    from thoughtbubbles.support.plots import plot_scores

    rows = rows_of(folder)
    if len({row.budget for row in rows}) > 1:
        plot_scores(panels_of(rows), output / PLOT_NAME, title)


def exact_match(
    model: ModelArgument,
    rows: Annotated[
        Path, Argument(help="Questions: a .jsonl or .parquet file of rows with prompt, answer and difficulty.")
    ],
    budget: BudgetsOption = None,
    limit: Annotated[int | None, Option(help="Only so many rows of each difficulty, evenly spread.", min=1)] = None,
    output: Annotated[
        Path | None, Option(help="Folder for exact_match.json, answers.jsonl and exact_match.png.")
    ] = None,
    batch_size: Annotated[int, Option(help="Questions at a time; no answer depends on it.", min=1, max=MOST_ROWS)] = 64,
    as_json: JsonOption = False,
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
            say_written(written, output)


def _title(model: str) -> str:
    """What a picture calls a model: the name of its run."""
    path = Path(model)
    if not path.is_dir():
        return model
    path = path.resolve()
    return path.parent.name if path.name == "model" else path.name
