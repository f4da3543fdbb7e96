"""What commands have in common: arguments and options of one meaning, and checks of them."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import Field, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from thoughtbubbles.support.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from thoughtbubbles.data import PreparedData

# Of a batch: more than any memory holds.
MOST_ROWS = 1 << 20

ModelArgument = Annotated[
    str,
    Argument(
        help="A trained model: the folder of a run, its model/ folder, one that save_pretrained wrote, or a hub name."
    ),
]
BudgetOption = Annotated[
    str | None, Option(help="Streams per token, such as 1, 1.5 or 2; if not given, the model's own.")
]
BudgetsOption = Annotated[
    str | None, Option(help="Streams per token, such as 2 or 1,1.5,2; if not given, the model's.")
]
TextFieldOption = Annotated[str, Option(help="Field of rows that holds the text.")]
QuietOption = Annotated[bool, Option("--quiet", help="No progress display.")]
JsonOption = Annotated[bool, Option("--json", help="Print JSON.")]


def with_options(section: type[Any], **hints: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for each field of a dataclass, in place of its parameter `given`.

    There it gets, by name, the values that the user gave. The help of a field is the option's.

    Args:
        section: a dataclass whose fields have defaults and are made by `recipes.options.option`.
        hints: of fields that are something else on a command line than in the dataclass.
    """
    options = [_keyword(each.name, hints.get(each.name, _option_of(each)), each.default) for each in fields(section)]
    names = {each.name for each in options}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def run(ctx: typer.Context, **values: Any) -> None:
            given = {name: values.pop(name) for name in names}
            command(given={name: value for name, value in given.items() if _was_given(ctx, name)}, **values)

        own = [each.replace(kind=each.KEYWORD_ONLY) for each in inspect.signature(command).parameters.values()]
        place = [each.name for each in own].index("given")
        own[place : place + 1] = options
        run.__signature__ = inspect.Signature([_keyword("ctx", typer.Context), *own])  # type: ignore[attr-defined]
        return run

    return decorate


def _option_of(field: Field[Any]) -> Any:
    return Annotated[field.type, Option(help=field.metadata["help"])]


def _keyword(name: str, hint: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)


def _was_given(ctx: typer.Context, name: str) -> bool:
    """Whether the user gave a parameter, as against its default value."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


@contextmanager
def bad_input() -> Iterator[None]:
    """Turn the ValueErrors of the library's argument checks into bad input."""
    try:
        yield
    except InputError:
        raise
    except ValueError as error:
        raise InputError(str(error)) from error


def check_budget(budget: str | None) -> None:
    """Check that a budget that was given is one."""
    from thoughtbubbles.model.budget import parse_budget

    with bad_input():
        parse_budget(budget or 1)


def open_validation(
    data: Path, model: str, count: int | None
) -> "tuple[PreparedData, PreTrainedTokenizerBase, Tensor]":
    """Prepared data that a model can read, their tokenizer, and `count` blocks [n, T] of validation, evenly spaced."""
    from thoughtbubbles.data import load_prepared
    from thoughtbubbles.model.loading import check_start, check_tokenizer, load_config
    from thoughtbubbles.support.sampling import spread

    prepared = load_prepared(data)
    prepared.check_packed(f"data {data}")
    tokenizer = prepared.tokenizer()
    check_vocabulary(load_config(model).vocab_size, prepared.manifest.vocab_size, data)
    check_tokenizer(model, tokenizer, str(data))
    check_start(model, tokenizer, str(data))
    return prepared, tokenizer, prepared.validation[spread(len(prepared.validation), count)]["input_ids"]


def check_vocabulary(model_size: int, data_size: int, data: Path) -> None:
    """Check that a model has a row for every token of some data."""
    if model_size < data_size:
        raise InputError(f"data {data}: vocabulary of {data_size}, expected at most the model's {model_size}")


def say_written(paths: list[Path], folder: Path) -> None:
    """Name the files that were written, on standard error."""
    typer.echo(f"{', '.join(path.name for path in paths)} in {folder}", err=True)
