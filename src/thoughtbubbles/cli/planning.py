"""The command `plan`."""

from dataclasses import asdict
from typing import Annotated, Any

import typer
from typer import Argument

from thoughtbubbles.cli.shared import BudgetOption, JsonOption, with_options
from thoughtbubbles.recipes.options import PlanOptions
from thoughtbubbles.support.files import json_text


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
