"""What the procedural tasks share: examples, the split between training and test, and endless draws of either."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from thoughtbubbles.support.sampling import digest

SPLITS = ("train", "test")
# Of so many different prompts one is for tests.
TEST_SHARE = 10


@dataclass(frozen=True)
class ProceduralExample:
    """A question whose answer was computed.

    Attributes:
        prompt: the question.
        answer: what follows it at once.
        difficulty: from 1; the task says what it counts.
    """

    prompt: str
    answer: str
    difficulty: int


@dataclass(frozen=True)
class ProceduralTask:
    """A generator of examples.

    Attributes:
        name: of the task.
        words: each is one token, and prompts and answers are made of nothing else.
        max_difficulty: the greatest there is.
        make: a random prompt and its answer at a difficulty from 1 to `max_difficulty`.
    """

    name: str
    words: tuple[str, ...]
    max_difficulty: int
    make: Callable[[random.Random, int], tuple[str, str]]


def split_of(prompt: str) -> str:
    """`train` or `test`, by the prompt alone: what one seed tests on no other trains on."""
    return "test" if int.from_bytes(digest(prompt.encode())[:8]) % TEST_SHARE == 0 else "train"


def draw_examples(task: ProceduralTask, split: str, difficulty: int, seed: int) -> Iterator[ProceduralExample]:
    """Independent draws without end; the same for the same arguments. Those that are few come again."""
    chooser = random.Random(f"{task.name}/{split}/{difficulty}/{seed}")
    while True:
        prompt, answer = task.make(chooser, difficulty)
        if split_of(prompt) == split:
            yield ProceduralExample(prompt, answer, difficulty)
