"""Tokens per second of the engine that serves many rows, beside `generate` row by row and in one padded batch.

One preset's shape with random weights, answers of equal length to random prompts, greedy. The engine writes them with
1, 4 and 16 slots; each way is warmed up once, and they take turns round by round.

The last line is JSON: the settings, the machine, and for each way tokens per second, median and spread.
"""

import argparse
import statistics
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from threading import Event

import torch
from torch import Tensor

from clock import now
from thoughtbubbles import ThoughtbubblesConfig, ThoughtbubblesForCausalLM
from thoughtbubbles.data.procedural.vocabulary import word_tokenizer
from thoughtbubbles.serving.choosing import Choosing
from thoughtbubbles.serving.engine import Engine
from thoughtbubbles.serving.orders import Order, Saying, Ticket, Written
from thoughtbubbles.serving.rows import make_rows
from thoughtbubbles.support.detokenizer import TokenTable
from thoughtbubbles.support.files import json_text
from thoughtbubbles.support.machine import describe_machine

WORDS = 2000


def main() -> None:
    """Time every way in turn."""
    arguments = parse_arguments()
    torch.manual_seed(0)
    config = ThoughtbubblesConfig.preset(
        arguments.preset,
        budget=arguments.budget,
        vocab_size=WORDS,
        max_position_embeddings=arguments.context + arguments.tokens,
    )
    model = ThoughtbubblesForCausalLM(config).to(arguments.device).eval()
    prompts = torch.randint(2, WORDS, (max(arguments.slots), arguments.context))
    table = TokenTable(word_tokenizer([f"w{number} " for number in range(WORDS - 2)]))
    ways: dict[str, Callable[[], None]] = {
        "generate, row by row": partial(row_by_row, model, prompts, arguments.tokens),
        "generate, one batch": partial(write, model, prompts, arguments.tokens),
    }
    engines = [Engine(make_rows(model, slots, config.exact_budget()), table) for slots in arguments.slots]
    for engine in engines:
        engine.start()
        ways[f"engine, {engine.slots} slots"] = partial(serve, engine, prompts, config, arguments.tokens)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(1 + arguments.rounds):
        for name, way in ways.items():
            start = now(arguments.device)
            way()
            if turn:
                seconds[name].append(now(arguments.device) - start)
    for engine in engines:
        engine.close()
    total = prompts.shape[0] * arguments.tokens
    rows = {name: figures(taken, total) for name, taken in seconds.items()}
    for name, row in rows.items():
        print(f"{name:<24}{row['tokens_per_second']:>9.1f} tokens/s")
    print(json_text({"settings": vars(arguments), "machine": describe_machine(arguments.device), "ways": rows}))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="micro", help="shape of the model")
    parser.add_argument("--budget", type=float, default=2.0, help="streams per token")
    parser.add_argument("--context", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer")
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 4, 16], help="of the engines; as many answers")
    parser.add_argument("--rounds", type=int, default=3, help="timed turns of each way")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def write(model: ThoughtbubblesForCausalLM, prompts: Tensor, tokens: int) -> None:
    """Answers to prompts [B, T] in one batch."""
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    model.generate(prompts.to(model.device), **settings)


def row_by_row(model: ThoughtbubblesForCausalLM, prompts: Tensor, tokens: int) -> None:
    """Answers to prompts [B, T] one after the other."""
    for row in prompts:
        write(model, row[None], tokens)


def serve(engine: Engine, prompts: Tensor, config: ThoughtbubblesConfig, tokens: int) -> None:
    """Answers to prompts [B, T], asked for all at once."""
    ends = [Event() for _ in prompts]

    def listener(end: Event) -> Callable[[Saying], None]:
        return lambda saying: None if isinstance(saying, Written) else end.set()

    budget: Fraction = config.exact_budget()
    orders = [Order(row.tolist(), budget, tokens, Choosing(temperature=0.0)) for row in prompts]
    engine.submit([Ticket(order, listener(end)) for order, end in zip(orders, ends, strict=True)])
    for end in ends:
        end.wait()


def figures(seconds: list[float], tokens: int) -> dict[str, float | list[float]]:
    """Tokens per second: the median of the turns, and their spread."""
    rates = [tokens / each for each in seconds]
    return {"tokens_per_second": statistics.median(rates), "spread": [min(rates), max(rates)]}


if __name__ == "__main__":
    main()
