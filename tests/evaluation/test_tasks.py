"""Local tasks ask what the harness's own tasks ask, and count as they count."""

import re
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks.hellaswag.utils import preprocess

from tests.evaluation.benchmark_files import (
    Rows,
    goals,
    harness_task,
    passages,
    problems,
    questions,
    sentence_pairs,
    wikitext,
    write_benchmarks,
    write_rows,
)
from tests.helpers import SHARED
from thoughtbubbles.evaluation.benchmarks import (
    BENCHMARKS,
    LOCAL_TASKS,
    TIERS,
    check_files,
    load_benchmark,
    parse_tasks,
)
from thoughtbubbles.evaluation.localdata import wikitext_pages
from thoughtbubbles.support.errors import InputError
from thoughtbubbles.support.sampling import spread

# Rows as the hub's HellaSwag has them: captions, whose second half starts small, and how-to articles with marks.
CAPTIONS = [
    ("Roof shingle removal", "A man is sitting on a roof.", "he"),
    ("Clean and jerk", "A lady walks to a barbell. She bends down and grabs the pole.", "the lady"),
    ("Playing saxophone", "1 a guy is playing the saxophone. 2", "a guy"),
    ("Layup drill", 'Young men play and "how to do a spin" overlays the video. "', "power dribble"),
    ("Baking cookies", "A female chef in white uniform shows a stack of baking pans!", "the pans"),
    ("Playing lacrosse", "The team appears and run towards the goal.", "two men, one with Bob's hat"),
    ("Family Life", "[header] How to raise your children [title] Guide your children. [step] As a parent, guide.", ""),
    (
        "Home and Garden",
        "[header] How to get rid of fleas [title] Vacuum a lot. [step] Fleas like carpet (it is soft).",
        "",
    ),
    ("Health", "[header] How to cope  with stress [title] Breathe. [step] In and out! Is it good?", ""),
    ("Youth", "[header] How to act [title] Find a script. [step] Read it.", ""),
]
ENDINGS = ["walks away.", "[substeps] sits  down.", "is ripping level tiles off", "starts [x] pulling up roofing."]


def hellaswag_originals() -> list[dict[str, Any]]:
    return [
        {"activity_label": label, "ctx_a": first, "ctx_b": second, "endings": ENDINGS, "label": str(index % 4)}
        for index, (label, first, second) in enumerate(CAPTIONS)
    ]


def hellaswag_rows() -> list[dict[str, Any]]:
    """The same, joined and cleaned, which is the layout of local files."""
    return [
        {
            "ctx": preprocess(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b']}"),
            "endings": [preprocess(ending) for ending in row["endings"]],
            "label": int(row["label"]),
        }
        for row in hellaswag_originals()
    ]


def pages() -> Rows:
    """Those of `wikitext(10)`: the empty line before a title belongs to the page before."""
    text = [f" = Page {page} = \n \n = = Part = = \n \n the gate @-@ root , {page} . \n" for page in range(10)]
    return [{"page": page + " " * (page is not text[-1])} for page in text]


def local_task(name: str, folder: Path) -> ConfigurableTask:
    return next(iter(load_benchmark(BENCHMARKS[name], folder).tasks.values()))


def requests(task: ConfigurableTask) -> list[Any]:
    task.build_all_requests()
    return [(instance.request_type, instance.args) for instance in task.instances]


def fake_results(task: ConfigurableTask, index: int) -> list[Any]:
    """What a model could have answered to a document's requests."""
    if task.OUTPUT_TYPE == "generate_until":
        return ["So 3.\n#### 1,003"]
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return [-12.5 - index]
    count = len([each for each in task.instances if each.doc_id == index])
    return [(-float((3 * place + index) % 5) - 1, place == 1) for place in range(count)]


CASES = {
    "lambada": ("lambada/lambada_openai.yaml", {"test": passages(10)}, passages(10)),
    "hellaswag": ("hellaswag/hellaswag.yaml", {"validation": hellaswag_originals()}, hellaswag_rows()),
    "piqa": ("piqa/piqa.yaml", {"validation": goals(10)}, goals(10)),
    "arc_easy": ("arc/arc_easy.yaml", {"test": questions(10)}, questions(10)),
    "arc_challenge": ("arc/arc_challenge.yaml", {"test": questions(10, "1234")}, questions(10, "1234")),
    "blimp": ("blimp/adjunct_island.yaml", {"train": sentence_pairs(1, 10)}, sentence_pairs(1, 10)),
    "gsm8k": ("gsm8k/gsm8k.yaml", {"train": problems(20), "test": problems(10)}, problems(10)),
    "wikitext": ("wikitext/wikitext.yaml", {"test": pages()}, pages()),
}


@pytest.mark.parametrize("name", CASES)
def test_requests_and_metrics_are_the_harness_own(tmp_path: Path, name: str) -> None:
    path, splits, rows = CASES[name]
    write_benchmarks(tmp_path)
    if name == "gsm8k":
        write_rows(tmp_path, "gsm8k-train", problems(20))
        write_rows(tmp_path, "gsm8k-test", rows)
    elif name != "wikitext":
        write_rows(tmp_path, name, rows)
    ours, theirs = local_task(name, tmp_path), harness_task(path, **splits)
    assert requests(ours) == requests(theirs)
    assert len(ours.eval_docs) == 10
    for index, (one, other) in enumerate(zip(ours.eval_docs, theirs.eval_docs, strict=True)):
        found = ours.process_results(one, fake_results(ours, index))
        assert found == theirs.process_results(other, fake_results(theirs, index))
        assert set(found) == set(ours.aggregation())
    assert ours.aggregation() == theirs.aggregation()
    assert ours.higher_is_better() == theirs.higher_is_better()
    assert [each.name for each in ours._filters] == [each.name for each in theirs._filters]
    if name != "blimp":  # whose version is that of the whole group
        assert ours.VERSION == theirs.VERSION


@pytest.mark.parametrize("strict", ["#### 5", "#### 5.", "#### $5", "it is 5"])
def test_extraction_is_the_harness_own(tmp_path: Path, strict: str) -> None:
    write_benchmarks(tmp_path)
    ours, theirs = local_task("gsm8k", tmp_path), harness_task(CASES["gsm8k"][0], train=problems(10), test=problems(10))
    found = []
    for task in (ours, theirs):
        task.build_all_requests(samples=[2])
        task.instances[0].resps = [f"so many. {strict}"]
        task.apply_filters()
        found.append(task.instances[0].filtered_resps)
    assert found[0] == found[1]
    assert set(found[0]) == {"strict-match", "flexible-extract"}


def test_every_task_has_its_yaml_and_a_headline_that_it_measures(tmp_path: Path) -> None:
    write_benchmarks(tmp_path)
    assert {path.stem for path in LOCAL_TASKS.glob("*.yaml")} == {each.task for each in BENCHMARKS.values()}
    for name, benchmark in BENCHMARKS.items():
        loaded = load_benchmark(benchmark, tmp_path)
        task = next(iter(loaded.tasks.values()))
        assert benchmark.headline.partition(",")[0] in task.aggregation()
        assert re.fullmatch(r"\d\.0", loaded.version), name


def test_worked_examples(tmp_path: Path) -> None:
    write_benchmarks(tmp_path)
    task = next(iter(load_benchmark(BENCHMARKS["gsm8k"], tmp_path, num_fewshot=0).tasks.values()))
    assert requests(task)[3][1][0] == f"Question: {problems(10)[3]['question']}\nAnswer:"
    blimp = load_benchmark(BENCHMARKS["blimp"], tmp_path, num_fewshot=3)
    assert requests(blimp.tasks["blimp"])[0][1][0] == ""  # sentences take no examples, in the harness either
    with pytest.raises(InputError, match="--num-fewshot 2: expected 0, since piqa has no examples to show"):
        load_benchmark(BENCHMARKS["piqa"], tmp_path, num_fewshot=2)


def test_the_bare_question_is_asked_and_a_number_read(tmp_path: Path) -> None:
    write_benchmarks(tmp_path)
    for shots in (None, 5):
        loaded = load_benchmark(BENCHMARKS["gsm8k_bare"], tmp_path, num_fewshot=shots)
        task = loaded.tasks["gsm8k_bare"]
        assert [asked[1][0] for asked in requests(task)] == [f"{row['question']}\n" for row in problems(10)]
    assert task.process_results(task.eval_docs[4], ["1+6=7\nanswer: 7"]) == {"exact_match": 1.0}
    assert task.process_results(task.eval_docs[4], ["1+6=7\nanswer: 8"]) == {"exact_match": 0.0}
    (tmp_path / "gsm8k-train.jsonl").unlink()
    check_files([BENCHMARKS["gsm8k_bare"]], tmp_path)


def test_subsets_are_spread_evenly_over_the_paradigms(tmp_path: Path) -> None:
    assert spread(10, None) == spread(10, 99) == list(range(10))
    assert spread(10, 4) == [0, 2, 5, 7]
    for tier in TIERS[:2]:
        chosen = spread(67_000, BENCHMARKS["blimp"].limit(tier))
        assert len({chosen.count(place) for place in chosen}) == 1
        assert len({sum(place // 1000 == paradigm for place in chosen) for paradigm in range(67)}) == 1
    assert all(each.limit("full") is None for each in BENCHMARKS.values())
    assert all((each.limit("smoke") or 0) < (each.limit("small") or 0) for each in BENCHMARKS.values())
    write_benchmarks(tmp_path)
    assert load_benchmark(BENCHMARKS["blimp"], tmp_path).samples(5) == {"blimp": [0, 2, 4, 6, 8]}


def test_wikitext_is_cut_at_titles(tmp_path: Path) -> None:
    (tmp_path / "text").write_text(wikitext(3))
    found = [str(row["page"]) for row in wikitext_pages(tmp_path / "text")]
    assert [page.split("\n")[0] for page in found] == [" = Page 0 = ", " = Page 1 = ", " = Page 2 = "]
    assert " = = Part = = " in found[1]


@pytest.mark.long
@pytest.mark.data
def test_the_real_files_make_the_known_requests() -> None:
    folder = SHARED / "data" / "evals"
    if not folder.is_dir():
        pytest.skip("no shared data")
    asked = local_task("hellaswag", folder)
    asked.build_all_requests(samples=[0])
    assert asked.instances[0].args[0] == "Roof shingle removal: A man is sitting on a roof. He"
    small = [row for row in asked.eval_docs["query"] if re.search(r"[.!?] [a-z][^.!?]*$", row)]
    assert len(small) < 5
    assert len(local_task("wikitext", folder).eval_docs) == 62
    blimp = local_task("blimp", folder).eval_docs
    assert len(set(blimp["uid"])) == 67
    assert len(blimp) == 67_000
    assert len(local_task("lambada", folder).eval_docs) == 5153


def test_unknown_tasks_suggest_the_nearest() -> None:
    assert [each.name for each in parse_tasks("piqa, lambada,piqa")] == ["piqa", "lambada"]
    with pytest.raises(InputError, match="unknown task helaswag: did you mean hellaswag"):
        parse_tasks("lambada,helaswag")
    with pytest.raises(InputError, match="--tasks ',': expected names with commas between, of lambada, "):
        parse_tasks(",")


def test_missing_files_and_fields_are_named(tmp_path: Path) -> None:
    chosen = parse_tasks("piqa")
    with pytest.raises(InputError, match=r"--data-dir .*/none: expected a folder"):
        check_files(chosen, tmp_path / "none")
    with pytest.raises(InputError, match=r"expected piqa.parquet or piqa.jsonl in it"):
        check_files(chosen, tmp_path)
    write_rows(tmp_path, "piqa", [*goals(2), {"goal": "g", "sol1": "a", "label": 0}])
    check_files(chosen, tmp_path)
    with pytest.raises(InputError, match=r"piqa.jsonl, row 3 has no field 'sol2': it has 'goal', 'sol1', 'label'"):
        load_benchmark(chosen[0], tmp_path)
    write_rows(tmp_path, "piqa", [])
    with pytest.raises(InputError, match=r"piqa.jsonl has no rows"):
        load_benchmark(chosen[0], tmp_path)


def test_hub_tasks_are_asked_for_by_name() -> None:
    """Without network the hub's answer is one clear line, and the name is the harness's own."""
    with pytest.raises(InputError, match=r"task piqa: its documents cannot be had: .*baber/piqa"):
        load_benchmark(BENCHMARKS["piqa"], None)
    with pytest.raises(InputError, match=r"task gsm8k_bare: its documents cannot be had: .*openai/gsm8k"):
        load_benchmark(BENCHMARKS["gsm8k_bare"], None)
