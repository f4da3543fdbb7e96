"""The procedural tasks: every answer is worked out again from the prompt, by other means."""

import json
import random
import re
from itertools import islice
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from thoughtbubbles.data import DataError
from thoughtbubbles.data.procedural.examples import ProceduralExample, ProceduralTask, draw_examples, split_of
from thoughtbubbles.data.procedural.kinship import RELATIONS
from thoughtbubbles.data.procedural.making import make_task
from thoughtbubbles.data.procedural.tasks import TASKS
from thoughtbubbles.data.procedural.vocabulary import word_tokenizer

NAMES = list(TASKS)


def most(name: str, difficulty: int) -> int:
    """A difficulty that a task has, at most this one."""
    return min(difficulty, TASKS[name].max_difficulty)


def draw(name: str, difficulty: int, count: int, split: str = "train", seed: int = 0) -> list[ProceduralExample]:
    return list(islice(draw_examples(TASKS[name], split, difficulty, seed), count))


@pytest.mark.parametrize("difficulty", [1, 2, 5, 30])
def test_arithmetic_is_right(difficulty: int) -> None:
    for example in draw("arithmetic", difficulty, 200):
        assert re.fullmatch(r"[0-9+*()-]+=", example.prompt)
        expression = example.prompt[:-1]
        assert str(eval(expression)) == example.answer
        assert len(re.findall(r"[+*-]", expression)) == difficulty == example.difficulty
        assert len(re.findall(r"\d", expression)) == difficulty + 1
        assert not re.search(r"\d\d|\(\d\)", expression)
        inner = expression
        while bracket := re.search(r"\(([^()]+)\)", inner):
            value = eval(bracket[1].replace("~", "-"))
            assert abs(value) <= 99
            inner = inner.replace(bracket[0], str(value).replace("-", "~"), 1)
        assert abs(int(example.answer)) <= 99


def test_arithmetic_has_all_operators_and_shapes() -> None:
    prompts = [example.prompt for example in draw("arithmetic", 2, 300)]
    assert all(any(f"{operator}" in prompt for prompt in prompts) for operator in "+-*")
    assert {prompt.startswith("(") for prompt in prompts} == {True, False}


@pytest.mark.parametrize("difficulty", [1, 4, 9])
def test_recall_is_right(difficulty: int) -> None:
    for example in draw("recall", difficulty, 200):
        pairs, question = example.prompt.split("?")
        digits = dict(re.findall(r"([a-j])(\d)", pairs))
        assert sorted(digits) == list("abcdefghij")
        assert len(pairs) == 20
        count, first = int(question[0]), question[1]
        assert count == difficulty == example.difficulty
        around = "abcdefghijabcdefghij"
        asked = around[around.index(first) :][:count]
        assert sum(int(digits[key]) for key in asked) == int(example.answer)
        assert str(int(example.answer)) == example.answer


@pytest.mark.parametrize("difficulty", [1, 4, 8])
def test_lookup_is_right(difficulty: int) -> None:
    for example in draw("lookup", difficulty, 200):
        pairs, question = example.prompt.split("?")
        bits = {key: bit for bit, key in re.findall(r"([01])([a-h])", pairs)}
        assert sorted(bits) == list("abcdefgh")
        assert len(pairs) == 16
        assert int(question[0]) == difficulty == example.difficulty
        around = "abcdefghabcdefgh"
        asked = around[around.index(question[1]) :][:difficulty]
        assert example.answer == "".join(bits[key] for key in asked)


@pytest.mark.parametrize("difficulty", [1, 2])
def test_places_are_right(difficulty: int) -> None:
    questions = set()
    for example in draw("places", difficulty, 300):
        letters, question = example.prompt.split("?")
        assert re.fullmatch("[abcd]{8}", letters)
        assert len(set(question)) == len(question) == difficulty == example.difficulty
        assert example.answer.lower() == "".join(letters[int(place) - 1] for place in question)
        assert example.answer.isupper()
        questions.add(question)
    assert len(questions) > 7 * difficulty
    tokenizer = word_tokenizer(TASKS["places"].words)
    assert len(tokenizer.encode(example.prompt, add_special_tokens=False)) == 9
    assert len(tokenizer.encode(example.answer, add_special_tokens=False)) == 1


def test_a_lookup_is_answered_by_one_token_after_ten() -> None:
    tokenizer = word_tokenizer(TASKS["lookup"].words)
    for example in draw("lookup", 8, 50):
        assert len(tokenizer.encode(example.prompt, add_special_tokens=False)) == 10
        assert len(tokenizer.encode(example.answer, add_special_tokens=False)) == 1


# What somebody is, and a fact about that person, to what the next one is; by hand, as if all were men.
SEXLESS = {word: men for men, women in RELATIONS for word in (men, women)}
TABLE = {
    "father": {"father": "grandfather", "son": "brother", "brother": "uncle", "husband": "father"},
    "son": {"father": "husband", "son": "grandson", "brother": "son", "husband": "son-in-law"},
    "brother": {"father": "father", "son": "nephew", "brother": "brother", "husband": "brother-in-law"},
    "husband": {"father": "father-in-law", "son": "son", "brother": "brother-in-law"},
    "grandfather": {"son": "uncle", "husband": "grandfather"},
    "grandson": {"father": "son-in-law", "brother": "grandson"},
    "uncle": {"father": "grandfather", "son": "cousin", "husband": "uncle", "brother": "uncle"},
    "nephew": {"father": "brother-in-law", "brother": "nephew"},
    "cousin": {"father": "uncle", "brother": "cousin"},
    "father-in-law": {"son": "brother-in-law", "husband": "father-in-law"},
    "son-in-law": {"son": "grandson"},
    "brother-in-law": {
        "father": "father-in-law",
        "son": "nephew",
        "brother": "brother-in-law",
        "husband": "brother-in-law",
    },
}
FEMALE = {"mother", "daughter", "sister", "wife", "grandmother", "granddaughter", "aunt", "niece"}
FEMALE |= {"mother-in-law", "daughter-in-law", "sister-in-law"}


def solve_kinship(prompt: str) -> tuple[str, int]:
    """The answer found fact by fact, and how many there were."""
    facts = re.findall(r"([A-Z])([a-z]+)([A-Z]);", prompt)
    start, end = prompt[-2], prompt[-1]
    following = {person: (word, other) for person, word, other in facts}
    assert len(following) == len(facts)
    assert "".join(f"{a}{word}{b};" for a, word, b in facts) + f"?{start}{end}" == prompt
    person, own, word = start, "", ""
    seen = [start]
    while person != end:
        word, person = following[person]
        own = SEXLESS[word] if not own else TABLE[own][SEXLESS[word]]
        seen.append(person)
    assert len(set(seen)) == len(facts) + 1
    women = next(women for men, women in RELATIONS if men == own)
    return (women if word in FEMALE else own), len(facts)


@pytest.mark.parametrize("difficulty", [1, 2, 3, 5, 8])
def test_kinship_is_right(difficulty: int) -> None:
    answers = set()
    for example in draw("kinship", difficulty, 300):
        assert solve_kinship(example.prompt) == (example.answer, difficulty)
        assert example.difficulty == difficulty
        answers.add(example.answer)
    assert len(answers) > 6


def test_the_example_of_the_guide_is_right() -> None:
    assert solve_kinship("BsisterC;AmotherB;?AC") == ("aunt", 2)


def test_kinship_has_every_word_and_every_place_of_a_fact() -> None:
    examples = [example for difficulty in (1, 2, 3) for example in draw("kinship", difficulty, 400)]
    assert {example.answer for example in examples} == set(SEXLESS)
    places = {
        re.split("[;?]", example.prompt).index(chain_start(example.prompt)) for example in draw("kinship", 3, 100)
    }
    assert places == {0, 1, 2}


def chain_start(prompt: str) -> str:
    """The fact about the first person of the question."""
    return next(fact for fact in re.split("[;?]", prompt) if fact[0] == prompt[-2])


@pytest.mark.parametrize("name", NAMES)
def test_draws_repeat_for_a_seed_and_differ_between_seeds(name: str) -> None:
    hard = most(name, 3)
    assert draw(name, hard, 50) == draw(name, hard, 50)
    assert draw(name, hard, 50, seed=1) != draw(name, hard, 50)
    assert draw(name, hard, 50, split="test") != draw(name, hard, 50)


def test_what_is_drawn_stays_the_same() -> None:
    """Another draw would move the results of everyone who trained on these."""
    assert [draw(name, most(name, 3), 1, seed=5)[0] for name in NAMES] == [
        ProceduralExample("1-(8*(0*0))=", "1", 3),
        ProceduralExample("WhusbandR;RsisterV;UfatherW;?UV", "aunt", 3),
        ProceduralExample("0g0b0c0d1f1h0a1e?3g", "010", 3),
        ProceduralExample("adbacdab?14", "AA", 2),
        ProceduralExample("e2f0j0b5a4h9g2c4d1i7?3a", "13", 3),
    ]


@pytest.mark.parametrize("name", NAMES)
def test_no_seed_tests_on_what_another_trains_on(name: str) -> None:
    for difficulty in {most(name, each) for each in (1, 2, 4)}:
        train = {example.prompt for seed in (0, 1) for example in draw(name, difficulty, 500, "train", seed)}
        test = {example.prompt for seed in (1, 2) for example in draw(name, difficulty, 100, "test", seed)}
        assert not train & test
        assert {split_of(prompt) for prompt in train} == {"train"}
        assert {split_of(prompt) for prompt in test} == {"test"}


def test_a_tenth_is_for_tests() -> None:
    chooser = random.Random(0)
    prompts = [TASKS["recall"].make(chooser, 3)[0] for _ in range(4000)]
    assert sum(split_of(prompt) == "test" for prompt in prompts) == pytest.approx(400, abs=80)


@pytest.mark.parametrize("name", NAMES)
def test_each_word_and_each_digit_is_one_token(name: str) -> None:
    task = TASKS[name]
    tokenizer = word_tokenizer(task.words)
    assert tokenizer.get_vocab() == {"<|endoftext|>": 0, "<|unknown|>": 1} | {w: i for i, w in enumerate(task.words, 2)}
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == 0
    known = set(task.words)
    for difficulty in (1, task.max_difficulty):
        for example in draw(name, difficulty, 100):
            row = example.prompt + example.answer
            tokens = tokenizer.encode(row, add_special_tokens=False)
            assert tokenizer.decode(tokens) == row
            assert {tokenizer.decode([token]) for token in tokens} <= known
            assert len(tokens) + 2 <= 128  # with the start and the end of a row


def test_the_longest_word_is_one_token_and_others_are_unknown() -> None:
    tokenizer = word_tokenizer(["father", "A", "father-in-law", "1"])
    assert tokenizer.encode("Afather-in-lawA1\nfatherx", add_special_tokens=False) == [3, 4, 3, 5, 1, 2, 1]


@pytest.mark.parametrize("name", NAMES)
def test_files_of_a_task(tmp_path: Path, name: str) -> None:
    hardest = most(name, 4)
    made = make_task(TASKS[name], tmp_path / "out", 40, hardest, 30, seed=3, progress=False)
    train, test = (read(tmp_path / "out" / f"{split}.jsonl") for split in ("train", "test"))
    assert [row["difficulty"] for row in train] == [*range(1, hardest + 1)] * (40 // hardest)
    assert {tuple(row) for row in train + test} == {("prompt", "answer", "difficulty")}
    assert len({row["prompt"] for row in test}) == len(test) == made.test_rows
    assert {row["difficulty"] for row in test} == {*range(1, hardest + 1)}
    hard = [row for row in test if row["difficulty"] == hardest]
    assert hard == [vars(each) for each in draw(name, hardest, 30, "test", 3)]
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "out" / "tokenizer"))
    assert tokenizer.get_vocab() == word_tokenizer(TASKS[name].words).get_vocab()
    assert json.loads((tmp_path / "out" / "task.json").read_text()) == vars(made)
    make_task(TASKS[name], tmp_path / "again", 40, hardest, 30, seed=3, progress=False)
    make_task(TASKS[name], tmp_path / "other", 40, hardest, 30, seed=4, progress=False)
    assert (tmp_path / "again" / "train.jsonl").read_bytes() == (tmp_path / "out" / "train.jsonl").read_bytes()
    assert (tmp_path / "other" / "train.jsonl").read_bytes() != (tmp_path / "out" / "train.jsonl").read_bytes()


def test_easy_tests_do_not_depend_on_the_hardest(tmp_path: Path) -> None:
    for most in (2, 3):
        make_task(TASKS["recall"], tmp_path / str(most), 6, most, 10, progress=False)
    easy = read(tmp_path / "2" / "test.jsonl")
    assert read(tmp_path / "3" / "test.jsonl")[: len(easy)] == easy


def test_few_different_questions_give_fewer_rows_to_test_on(tmp_path: Path) -> None:
    made = make_task(TASKS["arithmetic"], tmp_path / "out", 1, 1, progress=False)
    assert 10 < made.test_rows < 60
    again = make_task(TASKS["arithmetic"], tmp_path / "again", 1, 1, made.test_rows, progress=False)
    assert again.test_rows == made.test_rows


def test_more_questions_than_there_are_are_refused(tmp_path: Path) -> None:
    there = {digits for digits in all_sums() if split_of(digits) == "test"}
    message = (
        f"--test-examples=400: expected at most {len(there)}, as many different questions to test on as arithmetic"
    )
    with pytest.raises(DataError, match=message):
        make_task(TASKS["arithmetic"], tmp_path / "new" / "out", 1, 1, 400, progress=False)
    assert not list(tmp_path.iterdir())


def all_sums() -> list[str]:
    """Every question of arithmetic with one operator."""
    return [f"{a}{sign}{b}=" for a in range(10) for b in range(10) for sign in "+-*"]


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ((0, 1, 1), "--examples=0: expected 1 to 1000000000"),
        ((10**18, 1, 1), f"--examples={10**18}: expected 1 to 1000000000"),
        ((1, 10, 1), "--max-difficulty=10: expected 1 to 9, for recall"),
        ((1, 0, 1), "--max-difficulty=0: expected 1 to 9, for recall"),
        ((1, 1, 0), "--test-examples=0: expected 1 to 1000000"),
        ((1, 1, 10**12), f"--test-examples={10**12}: expected 1 to 1000000"),
    ],
)
def test_bad_numbers_are_refused(tmp_path: Path, counts: tuple[int, int, int], message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        make_task(TASKS["recall"], tmp_path / "out", *counts, progress=False)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for path in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(DataError, match="expected a new or empty folder"):
            make_task(TASKS["recall"], path, 5, 1, 5, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_killed_call_leaves_nothing(tmp_path: Path) -> None:
    def stop(chooser: random.Random, difficulty: int) -> tuple[str, str]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_task(ProceduralTask("stop", ("a",), 3, stop), tmp_path / "out", 5, 1, 5, progress=False)
    assert not list(tmp_path.iterdir())
