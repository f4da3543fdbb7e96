"""What commands have in common: arguments and options of one meaning, and checks of them."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import Field, fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from thoughtbubbles.support.errors import InputError

# Of a batch: more than any memory holds.
MOST_ROWS = 1 << 20

ModelArgument = Annotated[
    str,
    typer.Argument(
        help="A trained model: the folder of a run, its model/ folder, one that save_pretrained wrote, or a hub name."
    ),
]
BudgetOption = Annotated[
    str | None,
    typer.Option(help="Streams per token, such as 1, 1.5 or 2; if not given, the model's own.", show_default=False),
]
BudgetsOption = Annotated[
    str | None,
    typer.Option(help="Streams per token, such as 2 or 1,1.5,2; if not given, the model's.", show_default=False),
]
TextFieldOption = Annotated[str, typer.Option(help="Field of rows that holds the text.")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress display.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


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
    return Annotated[field.type, typer.Option(help=field.metadata["help"])]


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


def check_vocabulary(model_size: int, data_size: int, data: Path) -> None:
    """Check that a model has a row for every token of some data."""
    if model_size < data_size:
        raise InputError(f"data {data}: vocabulary of {data_size}, expected at most the model's {model_size}")


def say_written(paths: list[Path], folder: Path) -> None:
    """Name the files that were written, on standard error."""
    typer.echo(f"{', '.join(path.name for path in paths)} in {folder}", err=True)
