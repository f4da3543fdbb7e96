"""Making a procedural task's files: rows for `task: sft`, rows to test on, the tokenizer."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from thoughtbubbles.data.procedural.examples import ProceduralExample, ProceduralTask, draw_examples
from thoughtbubbles.data.procedural.vocabulary import word_tokenizer
from thoughtbubbles.data.tokenizer import save_tokenizer
from thoughtbubbles.recipes.values import check_seed
from thoughtbubbles.support.errors import DataError
from thoughtbubbles.support.files import made_folder, replacing, write_text
from thoughtbubbles.support.folders import writing
from thoughtbubbles.support.progress import Stage, stage

MOST_ROWS, MOST_QUESTIONS = 1_000_000_000, 1_000_000
USUAL_QUESTIONS = 500
# Draws without a new question, for each that was found, after which there is none.
PATIENCE = 20
TRAIN_NAME, TEST_NAME, TOKENIZER_NAME, FACTS_NAME = "train.jsonl", "test.jsonl", "tokenizer", "task.json"


@dataclass(frozen=True)
class MadeTask:
    """What a folder was made with; task.json in it.

    Attributes:
        task: its name.
        examples: rows of train.jsonl, as many of each difficulty; where a difficulty has few, they repeat.
        max_difficulty: they are from 1 to this.
        test_examples: of each difficulty in test.jsonl, where there are so many.
        seed: of the draws.
        test_rows: of test.jsonl.
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
    test_examples: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> MadeTask:
    """Write train.jsonl, test.jsonl, tokenizer/ and task.json into a folder, whole or not at all.

    A row has `prompt`, `answer` and `difficulty`. No prompt is in both files, whatever their seeds. The test rows of a
    difficulty do not depend on `max_difficulty`.

    Args:
        task: one of `TASKS`.
        output: a new or empty folder.
        examples, max_difficulty, seed: as in `MadeTask`.
        test_examples: rows to test on of each difficulty; None is 500, and fewer where there are not so many.
        progress: show a bar.

    Raises:
        DataError: a number that is too small or too great, more questions than a difficulty has, or a folder that
            holds something.
    """
    check_seed("--seed", seed, DataError)
    for name, count, most, whose in (
        ("--examples", examples, MOST_ROWS, ""),
        ("--max-difficulty", max_difficulty, task.max_difficulty, f", for {task.name}"),
        ("--test-examples", test_examples, MOST_QUESTIONS, ""),
    ):
        if count is not None and not 1 <= count <= most:
            raise DataError(f"{name}={count}: expected 1 to {most}{whose}")
    with writing(output, "output"):
        if output.exists() and not (output.is_dir() and not any(output.iterdir())):
            raise DataError(f"output {output}: expected a new or empty folder")
    difficulties = range(1, max_difficulty + 1)
    draw = _different if test_examples is None else _all_different
    wanted = USUAL_QUESTIONS if test_examples is None else test_examples
    with writing(output, "output"), made_folder(output.parent), replacing(output) as partial:
        partial.mkdir()
        with stage(f"Making {task.name}", examples + wanted * max_difficulty, progress) as bar:
            # First, for there may be too few.
            tests = [draw(task, each, wanted, seed) for each in difficulties]
            _write_rows(partial / TRAIN_NAME, islice(_in_turn(task, difficulties, seed), examples), bar)
            test_rows = sum(_write_rows(partial / TEST_NAME, rows, bar) for rows in tests)
            bar.show("rows")
        save_tokenizer(word_tokenizer(task.words), partial / TOKENIZER_NAME)
        made = MadeTask(task.name, examples, max_difficulty, wanted, seed, test_rows)
        write_text(partial / FACTS_NAME, json.dumps(asdict(made), indent=2) + "\n")
    return made


def _in_turn(task: ProceduralTask, difficulties: range, seed: int) -> Iterator[ProceduralExample]:
    """Examples to train on without end, one of each difficulty after another."""
    draws = [draw_examples(task, "train", each, seed) for each in difficulties]
    while True:
        yield from map(next, draws)


def _different(task: ProceduralTask, difficulty: int, count: int, seed: int) -> list[ProceduralExample]:
    """`count` examples to test on, less those that came before."""
    return list(dict.fromkeys(islice(draw_examples(task, "test", difficulty, seed), count)))


def _all_different(task: ProceduralTask, difficulty: int, count: int, seed: int) -> list[ProceduralExample]:
    """`count` different examples to test on.

    Raises:
        DataError: there seem to be no more: the last new one was long ago.
    """
    found: dict[ProceduralExample, None] = {}
    draws = draw_examples(task, "test", difficulty, seed)
    repeats = 0
    while len(found) < count:
        before = len(found)
        found[next(draws)] = None
        repeats = 0 if len(found) > before else repeats + 1
        if repeats > PATIENCE * (len(found) + 100):
            raise DataError(
                f"--test-examples={count}: expected at most {len(found)}, as many different questions to test on as "
                f"{task.name} has of difficulty {difficulty}"
            )
    return list(found)


def _write_rows(path: Path, rows: Iterable[ProceduralExample], bar: Stage) -> int:
    """Append rows to a file; how many they were."""
    count = 0
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(asdict(row)) + "\n")
            count += 1
            bar.advance(1, "rows")
    return count
