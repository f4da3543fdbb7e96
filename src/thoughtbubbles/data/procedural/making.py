"""Making a procedural task's files: rows for `task: sft`, rows to test on, the tokenizer."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from thoughtbubbles.data.errors import DataError
from thoughtbubbles.data.procedural.examples import ProceduralExample, ProceduralTask, draw_examples
from thoughtbubbles.data.procedural.vocabulary import word_tokenizer
from thoughtbubbles.data.tokenizer import save_tokenizer
from thoughtbubbles.files import replacing
from thoughtbubbles.progress import Stage, stage

TRAIN_NAME, TEST_NAME, TOKENIZER_NAME, FACTS_NAME = "train.jsonl", "test.jsonl", "tokenizer", "task.json"


@dataclass(frozen=True)
class MadeTask:
    """What a folder was made with; task.json in it.

    Attributes:
        task: its name.
        examples: rows of train.jsonl, as many of each difficulty; where a difficulty has few, they repeat.
        max_difficulty: they are from 1 to this.
        test_examples: drawn of each difficulty for test.jsonl.
        seed: of the draws.
        test_rows: of test.jsonl: drawn ones without repeats.
    """

    task: str
    examples: int
    max_difficulty: int
    test_examples: int
    seed: int
    test_rows: int


def make_task(
    task: ProceduralTask,
    output: Path,
    examples: int = 100_000,
    max_difficulty: int = 6,
    test_examples: int = 500,
    seed: int = 0,
    progress: bool = True,
) -> MadeTask:
    """Write train.jsonl, test.jsonl, tokenizer/ and task.json into a folder, whole or not at all.

    A row has `prompt`, `answer` and `difficulty`. No prompt is in both files, whatever their seeds. The test rows of a
    difficulty do not depend on `max_difficulty`.

    Args:
        task: one of `procedural.TASKS`.
        output: a new or empty folder.
        examples, max_difficulty, test_examples, seed: as in `MadeTask`.
        progress: show a bar.

    Raises:
        DataError: a number that is too small or too great, or a folder that holds something.
    """
    for name, count, most in (
        ("--examples", examples, None),
        ("--max-difficulty", max_difficulty, task.max_difficulty),
        ("--test-examples", test_examples, None),
    ):
        if count < 1 or (most is not None and count > most):
            allowed = "at least 1" if most is None else f"1 to {most}, for {task.name}"
            raise DataError(f"{name}={count}: expected {allowed}")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise DataError(f"output {output}: expected a new or empty folder")
    output.parent.mkdir(parents=True, exist_ok=True)
    difficulties = range(1, max_difficulty + 1)
    with replacing(output) as partial:
        partial.mkdir()
        total = examples + test_examples * max_difficulty
        with stage(f"Making {task.name}", total, progress) as bar:
            _write_rows(partial / TRAIN_NAME, islice(_in_turn(task, difficulties, seed), examples), bar)
            tests = [_different(task, each, test_examples, seed) for each in difficulties]
            test_rows = sum(_write_rows(partial / TEST_NAME, rows, bar) for rows in tests)
            bar.show("rows")
        save_tokenizer(word_tokenizer(task.words), partial / TOKENIZER_NAME)
        made = MadeTask(task.name, examples, max_difficulty, test_examples, seed, test_rows)
        (partial / FACTS_NAME).write_text(json.dumps(asdict(made), indent=2) + "\n", encoding="utf-8")
    return made


def _in_turn(task: ProceduralTask, difficulties: range, seed: int) -> Iterator[ProceduralExample]:
    """Examples to train on without end, one of each difficulty after another."""
    draws = [draw_examples(task, "train", each, seed) for each in difficulties]
    while True:
        yield from map(next, draws)


def _different(task: ProceduralTask, difficulty: int, count: int, seed: int) -> list[ProceduralExample]:
    """`count` examples to test on, less those that came before."""
    return list(dict.fromkeys(islice(draw_examples(task, "test", difficulty, seed), count)))


def _write_rows(path: Path, rows: Iterable[ProceduralExample], bar: Stage) -> int:
    """Append rows to a file; how many they were."""
    count = 0
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(asdict(row)) + "\n")
            count += 1
            bar.advance(1, "rows")
    return count
