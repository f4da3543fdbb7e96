"""The command that serves a model over HTTP: `serve`."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from thoughtbubbles.cli.shared import MOST_ROWS, BudgetOption, ModelArgument, bad_input, check_budget


def serve(
    model: ModelArgument,
    slots: Annotated[int, Option(help="Answers that are written at a time.", min=1, max=MOST_ROWS)] = 16,
    host: Annotated[str, Option(help="Address to listen at; 0.0.0.0 is all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, Option(help="Port to listen at; 0 is a free one.", min=0, max=65535)] = 8000,
    api_key_file: Annotated[
        Path | None, Option(help="File with an API key a line, of which a request must have one.")
    ] = None,
    budget: BudgetOption = None,
    max_budget: Annotated[
        str | None,
        Option(help="Streams per token that a request may ask for at most; if not given, the model's own."),
    ] = None,
    max_prompt: Annotated[
        int | None,
        Option(help="Tokens of a prompt at most; if not given, what the model's longest row has room for.", min=1),
    ] = None,
    max_output: Annotated[
        int | None,
        Option(help="Tokens of an answer at most; if not given, what the model's longest row has room for.", min=1),
    ] = None,
    max_queue: Annotated[
        int, Option(help="Answers that may wait for a slot; with more, requests are turned away.", min=0)
    ] = 256,
) -> None:
    """Serve a model over HTTP, in OpenAI's interface: completions and chats, each request at a budget of its own.

    It needs FastAPI and uvicorn: pip install 'thoughtbubbles\\[serve]'.
    """
    from thoughtbubbles.model.loading import load_model, load_tokenizer
    from thoughtbubbles.serving.served import Limits
    from thoughtbubbles.serving.server import ApiServer, read_keys

    check_budget(budget)
    check_budget(max_budget)
    name = model.rstrip("/") or model
    keys = [] if api_key_file is None else read_keys(api_key_file)
    limits = Limits(max_prompt, max_output, max_budget)
    tokenizer, loaded = load_tokenizer(model), load_model(model)
    with bad_input():
        server = ApiServer(name, loaded, tokenizer, slots, host, port, keys, budget, limits, max_queue)
    if not keys and host not in ("127.0.0.1", "::1", "localhost"):
        typer.echo("whoever reaches this machine can use the model: --api-key-file asks for keys", err=True)
    typer.echo(f"{name} is served at {server.address}/v1 (Ctrl-C ends it)")
    server.wait()
