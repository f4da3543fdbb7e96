"""Commands that show a model at work: `generate`, `inspect` and `demo`."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from thoughtbubbles.cli.shared import (
    BudgetOption,
    JsonOption,
    ModelArgument,
    TextFieldOption,
    bad_input,
    check_budget,
    open_validation,
    say_written,
)
from thoughtbubbles.support.errors import InputError
from thoughtbubbles.support.files import json_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    from thoughtbubbles.evaluation.conversation import Chat
    from thoughtbubbles.evaluation.generation import Decoding, Generation
    from thoughtbubbles.model.modeling import ThoughtbubblesForCausalLM


def generate(
    model: ModelArgument,
    prompt: Annotated[str | None, Option(help="Text to continue; empty starts a new document.")] = None,
    file: Annotated[
        Path | None,
        Option(
            help="File that holds the prompt, or one in each row of .jsonl, .json, .csv or .parquet; without either, "
            "standard input does."
        ),
    ] = None,
    text_field: TextFieldOption = "text",
    interactive: Annotated[bool, Option("--interactive", help="Ask for prompts until end of input.")] = False,
    chat: Annotated[
        bool,
        Option(
            "--chat",
            help="Talk: each line is a message, or --prompt the only one, and the tokenizer's chat template writes "
            "them; /reset begins anew, /exit or the end of input ends.",
        ),
    ] = False,
    system: Annotated[str | None, Option(help="With --chat: what the system says first.")] = None,
    max_new_tokens: Annotated[int, Option(help="Tokens to generate at most.", min=1)] = 100,
    temperature: Annotated[float, Option(help="0 is greedy.", min=0)] = 0.8,
    top_k: Annotated[int, Option(help="Sample among the k likeliest tokens; 0 is all.", min=0)] = 0,
    top_p: Annotated[float, Option(help="Sample among the likeliest tokens of this mass.", min=0, max=1)] = 1.0,
    min_p: Annotated[
        float, Option(help="Sample among tokens of at least this share of the likeliest's.", min=0, max=1)
    ] = 0.0,
    repetition_penalty: Annotated[float, Option(help="Above 1: repeat less.", min=0.01)] = 1.0,
    budget: BudgetOption = None,
    seed: Annotated[int, Option(help="Seed of the sampling.")] = 0,
    show_bubbles: Annotated[
        bool, Option("--show-bubbles", help="Afterwards mark each token with the streams it ended with.")
    ] = False,
    as_json: Annotated[bool, Option("--json", help="Print JSON, not the text as it comes.")] = False,
) -> None:
    """Continue a prompt or talk, printing tokens as they come."""
    from thoughtbubbles.evaluation.generation import Decoding, Sampling
    from thoughtbubbles.inspection.bubbles import final_bubbles
    from thoughtbubbles.model.loading import load_model, load_tokenizer
    from thoughtbubbles.recipes.values import check_seed

    check_seed("--seed", seed, InputError)
    check_budget(budget)
    _check_chat(chat, system, interactive or file is not None)
    with bad_input():
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    settings = Decoding(max_new_tokens, sampling, budget, seed)
    tokenizer, loaded = load_tokenizer(model), load_model(model)
    if chat:
        answers = _answers(_chat(loaded, tokenizer, settings, system), prompt, as_json)
    else:
        prompts = _prompts(prompt, file, text_field, interactive)
        answers = _continued(loaded, tokenizer, settings, prompts, as_json, interactive and sys.stdin.isatty())
    for made in answers:
        sizes = final_bubbles(loaded, made.ids, budget) if show_bubbles else None
        if as_json:
            typer.echo(json_text({**asdict(made), "seed": seed, "bubbles": sizes}))
        elif sizes is not None:
            _print_bubbles(tokenizer, made.ids, sizes)


def _check_chat(chat: bool, system: str | None, other: bool) -> None:
    if (system is not None and not chat) or (chat and other):
        raise InputError("--chat: expected it without --interactive and --file, and --system with it alone")


def _print_bubbles(tokenizer: "PreTrainedTokenizerBase", ids: list[int], sizes: list[int]) -> None:
    from thoughtbubbles.inspection.bubbles import mark_bubbles
    from thoughtbubbles.support.text import token_pieces

    typer.echo(mark_bubbles(token_pieces(tokenizer, ids), sizes))


def _continued(
    model: "ThoughtbubblesForCausalLM",
    tokenizer: "PreTrainedTokenizerFast",
    settings: "Decoding",
    prompts: Iterator[str],
    quiet: bool,
    typed: bool,
) -> "Iterator[Generation]":
    """Prompts with what follows them, which is printed as it comes if not `quiet`."""
    from thoughtbubbles.evaluation.generation import TextPrinter, generate_text
    from thoughtbubbles.support.detokenizer import TokenTable

    table = None if quiet else TokenTable(tokenizer)
    for text in prompts:
        with _told(typed):
            streamer = None if table is None else TextPrinter(table, _print)
            yield generate_text(model, tokenizer, text, **vars(settings), streamer=streamer)


def _chat(
    model: "ThoughtbubblesForCausalLM", tokenizer: "PreTrainedTokenizerFast", settings: "Decoding", system: str | None
) -> "Chat":
    from thoughtbubbles.evaluation.conversation import Chat

    _check_text("--system", system or "")
    return Chat(model, tokenizer, settings, system, warn=partial(typer.echo, err=True))


def _answers(chat: "Chat", prompt: str | None, quiet: bool) -> "Iterator[Generation]":
    """The answers to what a user says."""
    for question in _questions(chat, prompt):
        with _told(prompt is None and sys.stdin.isatty()):
            yield chat.ask(question, None if quiet else chat.printer(_print))


@contextmanager
def _told(typed: bool) -> Iterator[None]:
    """Tell whoever typed it at a terminal what is wrong with an input, and go on; else it is bad input."""
    try:
        with bad_input():
            yield
    except InputError as error:
        if not typed:
            raise
        typer.echo(error, err=True)


def _questions(chat: "Chat", prompt: str | None) -> Iterator[str]:
    """What a user says, without what is said to this command."""
    if prompt is not None:
        _check_text("--prompt", prompt)
        yield prompt
        return
    for line in _typed("> ") if sys.stdin.isatty() else map(_decoded, sys.stdin.buffer):
        match line.strip():
            case "/exit":
                return
            case "/reset":
                chat.reset()
            case "":
                continue
            case text:
                yield text


def _typed(mark: str) -> Iterator[str]:
    """Lines that a user types until the end of input, each after a mark."""
    with suppress(EOFError):
        while True:
            try:
                line = input(mark)
            except UnicodeDecodeError as error:
                raise InputError(f"standard input is not UTF-8: {error}") from None
            _check_text("standard input", line)
            yield line


def _print(text: str) -> None:
    typer.echo(text, nl=False)


def _standard_input() -> str:
    """All of standard input, its line ends as they are."""
    return _decoded(sys.stdin.buffer.read())


def _decoded(text: bytes) -> str:
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is not UTF-8: {error}") from None


def _prompts(prompt: str | None, file: Path | None, text_field: str, interactive: bool) -> Iterator[str]:
    """The prompts of a call: one, as many as a user types, or each document of a file."""
    from thoughtbubbles.data.sources.reading import read_texts

    if sum((prompt is not None, file is not None, interactive)) > 1:
        raise InputError("--prompt, --file, --interactive: expected at most one of them")
    if interactive:
        yield from _typed("> ")
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


def inspect(
    model: ModelArgument,
    text: Annotated[str | None, Option(help="A text to trace.")] = None,
    data: Annotated[
        Path | None,
        Option(help="Or a folder that `thoughtbubbles prepare` wrote: statistics over its validation split."),
    ] = None,
    budget: BudgetOption = None,
    token: Annotated[
        int | None,
        Option(
            help="With --text: the token whose family tree is drawn, counted from 0, which is the separator in front; "
            "if not given, the one with the largest bubble."
        ),
    ] = None,
    blocks: Annotated[int | None, Option(help="With --data: only so many blocks, evenly spaced.", min=1)] = None,
    reference: Annotated[
        str | None, Option(help="With --data: a dense model that measures entropy and surprisal too.")
    ] = None,
    output: Annotated[
        Path | None, Option(help="Folder for pictures (PNG and SVG), JSON and the trace (Parquet).")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """See where a model thinks: in one text, or on average over a corpus."""
    if (text is None) == (data is None):
        raise InputError("--text, --data: expected exactly one of them")
    misplaced = [("--token", token, data), ("--blocks", blocks, text), ("--reference", reference, text)]
    for name, value, other in misplaced:
        if value is not None and other is not None:
            raise InputError(f"{name}={value}: expected it with {'--text' if name == '--token' else '--data'} alone")
    _check_text("--text", text or "")
    check_budget(budget)
    from thoughtbubbles.inspection.report import MARKS
    from thoughtbubbles.support.folders import output_folder

    with bad_input(), nullcontext() if output is None else output_folder(output, MARKS):
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
        say_written(write_report(report, output), output)


def _inspect_data(
    model: str,
    data: Path,
    budget: str | None,
    blocks: int | None,
    reference: str | None,
    output: Path | None,
    as_json: bool,
) -> None:
    from thoughtbubbles.inspection.report import WORD_BLOCKS, check_reference, show_statistics, write_statistics
    from thoughtbubbles.inspection.survey import gather_statistics
    from thoughtbubbles.inspection.words import count_words
    from thoughtbubbles.model.loading import check_tokenizer, load_model
    from thoughtbubbles.support.progress import stage

    prepared, tokenizer, rows = open_validation(data, model, blocks)
    loaded = load_model(model)
    independent = None
    if reference is not None:
        independent = load_model(reference)
        check_reference(loaded, independent, reference)
        check_tokenizer(reference, tokenizer, str(data))
    words = count_words(tokenizer, prepared.train[:WORD_BLOCKS]["input_ids"].tolist())
    with stage("inspecting", rows.numel(), enabled=not as_json) as bar:
        note = partial(bar.advance, note="tokens")
        found = gather_statistics(loaded, tokenizer, rows, words, budget, independent, on_progress=note)
    if as_json:
        typer.echo(json_text(found.to_dict()))
    else:
        show_statistics(found)
    if output is not None:
        say_written(write_statistics(found, output), output)


def demo(
    model: ModelArgument,
    other: Annotated[str | None, Argument(help="A second model, shown beside the first.")] = None,
    port: Annotated[
        int | None,
        Option(help="Port of this machine; if not given, the first free one from 7860 on.", min=1, max=65535),
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
