"""Made-up benchmarks in the layout of docs/evaluation.md, and the harness's own tasks over the same documents."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval.tasks
from datasets import Dataset, DatasetDict
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

from tests.run_fixtures import sentences

Rows = Sequence[dict[str, Any]]
HARNESS = Path(str(lm_eval.tasks.__file__)).parent


def write_rows(folder: Path, name: str, rows: Rows) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def lines(count: int, seed: int = 0) -> list[str]:
    """Sentences, all different, of several lengths."""
    chooser = random.Random(seed)
    found = [f"{index} {line}" for index, line in enumerate("\n".join(sentences(24)).split("\n"))]
    return [" ".join(line.split()[: chooser.randint(4, 8)]) for line in chooser.sample(found, count)]


def passages(count: int) -> list[dict[str, str]]:
    return [{"text": line} for line in lines(count)]


def captions(count: int, choices: int = 4) -> list[dict[str, Any]]:
    chooser = random.Random(1)
    return [
        {"ctx": f"Forking: {line}.", "endings": lines(choices, seed=index), "label": chooser.randrange(choices)}
        for index, line in enumerate(lines(count))
    ]


def goals(count: int) -> list[dict[str, Any]]:
    chooser = random.Random(2)
    made = [dict(zip(("goal", "sol1", "sol2"), lines(3, seed=index), strict=True)) for index in range(count)]
    return [{**row, "label": chooser.randrange(2)} for row in made]


def questions(count: int, names: Sequence[str] = "ABCD") -> list[dict[str, Any]]:
    chooser = random.Random(3)
    return [
        {
            "question": f"{line}?",
            "choices": {"text": lines(len(names), seed=index), "label": list(names)},
            "answerKey": chooser.choice(names),
        }
        for index, line in enumerate(lines(count))
    ]


def sentence_pairs(paradigms: int, each: int) -> list[dict[str, str]]:
    made = lines(2 * paradigms * each)
    return [
        {"uid": f"paradigm_{index // each}", "sentence_good": good, "sentence_bad": bad}
        for index, (good, bad) in enumerate(zip(made[::2], made[1::2], strict=True))
    ]


def problems(count: int) -> list[dict[str, str]]:
    return [
        {"question": f"{line}: how many?", "answer": f"It has {index}+3=<<{index}+3={index + 3}>>.\n#### {index + 3:,}"}
        for index, line in enumerate(lines(count))
    ]


def wikitext(pages: int) -> str:
    parts = [f" = Page {page} = \n \n = = Part = = \n \n the gate @-@ root , {page} . \n" for page in range(pages)]
    return " \n" + " \n".join(parts)


def write_benchmarks(folder: Path, count: int = 10) -> Path:
    """All benchmarks, `count` documents each; BLiMP of five paradigms."""
    write_rows(folder, "lambada", passages(count))
    write_rows(folder, "hellaswag", captions(count))
    write_rows(folder, "piqa", goals(count))
    write_rows(folder, "arc_easy", questions(count))
    write_rows(folder, "arc_challenge", questions(count, "123"))
    write_rows(folder, "blimp", sentence_pairs(5, count // 5))
    write_rows(folder, "gsm8k-train", problems(count))
    write_rows(folder, "gsm8k-test", problems(count))
    (folder / "wikitext2-test.txt").write_text(wikitext(count))
    return folder


def harness_task(path: str, **splits: Rows) -> ConfigurableTask:
    """The task of a YAML of the harness itself, over documents of ours; splits that it wants too are the first's."""
    config = load_yaml(HARNESS / path)
    wanted = [config[f"{kind}_split"] for kind in ("training", "validation", "test") if config.get(f"{kind}_split")]
    rest = next(iter(splits.values()))
    data = DatasetDict({name: Dataset.from_list(list(splits.get(name, rest))) for name in wanted})
    for key in ("tag", "group", "dataset_path", "dataset_name"):
        config.pop(key, None)
    task = ConfigurableTask(config={**config, "custom_dataset": lambda **_: data})
    task.set_config("num_fewshot", task.config.num_fewshot or 0)
    task.set_fewshot_seed(1234)
    return task
