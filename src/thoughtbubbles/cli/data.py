"""Commands that make data: `prepare` and `make-task`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from thoughtbubbles.cli.shared import QuietOption, with_options
from thoughtbubbles.recipes.options import Preparation
from thoughtbubbles.support.errors import InputError

SourcesArgument = Annotated[
    list[str],
    Argument(
        help="Files of text or rows (.parquet, .jsonl, .json, .csv), packed ones (.gz, .zst and others) too; "
        "folders, globs; hf:NAME or hf:NAME?KEY=VALUE&KEY=VALUE, a dataset of the Hugging Face hub or a folder "
        "laid out like one, with the keys config, split (train), field, streaming (true), revision and "
        "data_files; or `python-stdlib`, which is also taken if none is named: the source text of the running "
        "Python's standard library.",
        show_default=False,
    ),
]
ValidationOption = Annotated[
    list[str], Option(help="Source for validation, instead of held-out documents; repeatable.", show_default=False)
]


@with_options(Preparation, sources=SourcesArgument, validation=ValidationOption)
def prepare(
    output: Annotated[Path, Argument(help="Folder to write: train, validation, tokenizer, manifest.json.")],
    given: dict[str, Any],
    recipe: Annotated[
        Path | None, Option(help="YAML file with these options as keys; what the command line says goes before it.")
    ] = None,
    num_proc: Annotated[
        int | None, Option(help="Threads that tokenise, by default one a core; the result is the same.")
    ] = None,
    overwrite: Annotated[bool, Option(help="Replace a folder prepared differently.")] = False,
    verify: Annotated[
        bool, Option("--verify", help="Prepare nothing: check every file of the folder by its manifest, and exit.")
    ] = False,
    quiet: QuietOption = False,
) -> None:
    """Turn text into blocks of tokens to train on.

    Documents are separated by the end-of-text token and packed into blocks; attention and credit cross document
    borders inside a block. Validation is held out by document. A call that was interrupted goes on where it stopped
    when it is made again.
    """
    from thoughtbubbles.data import load_preparation
    from thoughtbubbles.data import prepare as prepare_data

    if verify:
        if "sources" in given or recipe is not None:
            raise InputError("--verify: expected the prepared folder alone, no sources and no --recipe")
        _verify(output, quiet)
        return
    options = replace(Preparation() if recipe is None else load_preparation(recipe), **given)
    manifest = prepare_data(output, **vars(options), num_proc=num_proc, overwrite=overwrite, progress=not quiet)
    for name, split in (("train", manifest.train), ("validation", manifest.validation)):
        typer.echo(f"{name:<11}{split.documents:>9,} documents {split.tokens:>13,} tokens {split.blocks:>9,} blocks")
    typer.echo(f"vocabulary {manifest.vocab_size:>9,} tokens, blocks of {manifest.block_size} in {output}")
    for line in manifest.remarks():
        typer.echo(line)


def _verify(folder: Path, quiet: bool) -> None:
    from thoughtbubbles.data import load_prepared

    found = load_prepared(folder, verify=True, progress=not quiet)
    typer.echo(f"{len(found.manifest.files)} files in {folder} are as they were prepared")


def make_task(
    task: Annotated[str, Argument(help="`arithmetic`, `kinship`, `lookup`, `places` or `recall`.")],
    output: Annotated[Path, Argument(help="New folder to write: train.jsonl, test.jsonl, tokenizer, task.json.")],
    examples: Annotated[int, Option(help="Rows to train on, as many of each difficulty.")] = 100_000,
    max_difficulty: Annotated[
        int, Option(help="The greatest difficulty, the least being 1: operators, facts, or keys.")
    ] = 6,
    test_examples: Annotated[
        int | None,
        Option(help="Rows to test on of each difficulty; if not given, 500, and fewer where there are not so many."),
    ] = None,
    seed: Annotated[int, Option(help="Seed of the rows; none tests on what another trains on.")] = 0,
    quiet: QuietOption = False,
) -> None:
    """Generate a procedural task: questions of graded difficulty whose answers are computed.

    Train on the rows with recipes/tasks, and measure with `exact-match`.
    """
    from thoughtbubbles.data.procedural.making import make_task as make
    from thoughtbubbles.data.procedural.tasks import TASKS
    from thoughtbubbles.recipes.values import check_known

    check_known(task, list(TASKS), "task", InputError)
    made = make(TASKS[task], output, examples, max_difficulty, test_examples, seed, progress=not quiet)
    typer.echo(
        f"{made.examples:,} rows to train on, {made.test_rows:,} to test on, difficulty 1 to {made.max_difficulty}, "
        f"in {output}"
    )
