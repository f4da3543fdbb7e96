"""The adapter: padding never spends budget, batch size changes nothing, the budget and the cache reach the model."""

import itertools
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from tests.evaluation.benchmark_files import lines, write_benchmarks
from tests.helpers import random_model, tiny_config
from thoughtbubbles import ThoughtbubblesForCausalLM
from thoughtbubbles.data import PreparedData
from thoughtbubbles.evaluation import harness
from thoughtbubbles.evaluation.harness import adapter, cut_left
from thoughtbubbles.support.errors import InputError, UnfinishedError

ROUTINGS = ("causal", "topk", "none", "copy")


def make_model(data: PreparedData, **overrides: Any) -> ThoughtbubblesForCausalLM:
    shape = {"vocab_size": data.manifest.vocab_size, "max_position_embeddings": 64, "budget": 2}
    return random_model(tiny_config(**{**shape, **overrides}))


def wrap(model: ThoughtbubblesForCausalLM, data: PreparedData, batch_size: int = 8, **arguments: Any) -> Any:
    return adapter()(model, tokenizer=data.tokenizer(), batch_size=batch_size, **arguments)


def instances(kind: str, arguments: list[Any]) -> list[Instance]:
    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]


def pairs() -> list[tuple[str, str]]:
    """Contexts and continuations of many lengths, some equal up to the last token, one without a context."""
    texts = lines(12)
    made = [(text, f" {other}") for text, other in itertools.pairwise(texts)]
    return [*made, (texts[0], " a"), (texts[0], " b"), ("", texts[1]), (" ".join(texts), " root")]


@pytest.mark.parametrize("routing", ROUTINGS)
def test_scores_do_not_depend_on_the_batch(tiny_data: PreparedData, routing: str) -> None:
    model, asked = make_model(tiny_data, routing=routing), instances("loglikelihood", pairs())
    alone, together = (wrap(model, tiny_data, size).loglikelihood(asked, disable_tqdm=True) for size in (1, 8))
    assert [score for score, _ in together] == pytest.approx([score for score, _ in alone], abs=1e-4)
    assert [greedy for _, greedy in together] == [greedy for _, greedy in alone]


@pytest.mark.parametrize("routing", ["causal", "topk"])
def test_scores_are_those_of_the_model(tiny_data: PreparedData, routing: str) -> None:
    model, tokenizer = make_model(tiny_data, routing=routing), tiny_data.tokenizer()
    asked = pairs()[:5]
    found = wrap(model, tiny_data).loglikelihood(instances("loglikelihood", asked), disable_tqdm=True)
    for (context, continuation), (score, greedy) in zip(asked, found, strict=True):
        ids, count = [0, *tokenizer.encode(context + continuation)], 1 + len(tokenizer.encode(context))
        row = torch.tensor([ids])
        log_probs = model(row[:, :-1]).logits.log_softmax(-1)[0, count - 1 :]
        expected = log_probs.gather(1, row[0, count:, None]).sum().item()
        assert score == pytest.approx(expected, abs=1e-4)
        assert greedy == bool((log_probs.argmax(-1) == row[0, count:]).all())


def test_token_0_is_scored_like_any_other(tiny_data: PreparedData) -> None:
    """Rows that end with the id that HFLM pads with."""
    model = make_model(tiny_data, routing="topk", budget=1.5)
    asked = [
        (None, [5, 6, 7, 0, 0], [0, 0, 9]),
        (None, [5, 6], [0]),
        (None, [0, 7], [0, 0, 3]),
        (None, [8, 2] * 5, [4, 0]),
    ]
    found = wrap(model, tiny_data)._loglikelihood_tokens(asked, disable_tqdm=True)
    for (_, context, continuation), (score, _) in zip(asked, found, strict=True):
        row = torch.tensor([context + continuation])
        log_probs = model(row[:, :-1]).logits.log_softmax(-1)[0, len(context) - 1 :]
        assert score == pytest.approx(log_probs.gather(1, row[0, len(context) :, None]).sum().item(), abs=1e-4)


@pytest.mark.parametrize("routing", ["causal", "topk"])
def test_rolling_scores_do_not_depend_on_the_batch(tiny_data: PreparedData, routing: str) -> None:
    model = make_model(tiny_data, routing=routing)
    asked = instances("loglikelihood_rolling", [(" ".join(lines(12)),), ("the root",), (" ".join(lines(3)),)])
    alone, together = (wrap(model, tiny_data, size).loglikelihood_rolling(asked, True) for size in (1, 8))
    assert together == pytest.approx(alone, abs=1e-3)
    assert alone[0] < alone[2] < alone[1] < 0


def generate(lm: Any, asked: list[str]) -> list[str]:
    settings = {"until": ["\n"], "max_gen_toks": 8, "temperature": 0.0, "do_sample": False}
    found: list[str] = lm.generate_until(instances("generate_until", [(text, settings) for text in asked]), True)
    return found


@pytest.mark.parametrize("routing", ["causal", "none"])
def test_generations_do_not_depend_on_batch_or_cache(tiny_data: PreparedData, routing: str) -> None:
    model, asked = make_model(tiny_data, routing=routing), lines(6)
    found = {(size, cached): generate(wrap(model, tiny_data, size, use_cache=cached), asked)
             for size in (1, 4) for cached in (True, False)}  # fmt: skip
    assert len(set(map(tuple, found.values()))) == 1
    assert len(set(found[1, True])) > 1


def test_scores_are_those_of_decoding_with_the_cache(tiny_data: PreparedData) -> None:
    model, tokenizer = make_model(tiny_data), tiny_data.tokenizer()
    context, continuation = pairs()[0]
    ((score, _),) = wrap(model, tiny_data).loglikelihood(instances("loglikelihood", [pairs()[0]]), disable_tqdm=True)
    ids, count = [0, *tokenizer.encode(context + continuation)], 1 + len(tokenizer.encode(context))
    cache, total = None, 0.0
    for place, token in enumerate(ids[:-1]):
        with torch.inference_mode():
            out = model(torch.tensor([[token]]), cache=cache, use_cache=True)
        cache = out.cache
        if place >= count - 1:
            total += out.logits[0, -1].log_softmax(-1)[ids[place + 1]].item()
    assert score == pytest.approx(total, abs=1e-3)


def test_the_paper_rule_recomputes_and_differs(tiny_data: PreparedData) -> None:
    """With `topk` the cache routes causally, and recomputing routes the prefix as a whole."""
    model, asked = make_model(tiny_data, routing="topk", budget=1.5), lines(6)
    recomputed = generate(wrap(model, tiny_data, use_cache=False), asked)
    ids = torch.tensor([[0, *tiny_data.tokenizer().encode(asked[0])]])
    for _ in range(8):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert tiny_data.tokenizer().decode(ids[0, 1:]).startswith(asked[0] + recomputed[0])
    assert recomputed != generate(wrap(model, tiny_data), asked)


@pytest.mark.parametrize("kind", ["loglikelihood", "generate_until"])
def test_the_budget_reaches_the_model(tiny_data: PreparedData, kind: str) -> None:
    def answers(model: ThoughtbubblesForCausalLM, **arguments: Any) -> Any:
        lm = wrap(model, tiny_data, **arguments)
        if kind == "generate_until":
            return generate(lm, lines(6))
        return [score for score, _ in lm.loglikelihood(instances(kind, pairs()), disable_tqdm=True)]

    small, large = make_model(tiny_data, budget="5/4"), make_model(tiny_data, budget=3)
    assert answers(large, budget="5/4") == answers(small)
    assert answers(large) != answers(small)
    with pytest.raises(ValueError, match="budget=0: expected"):
        answers(large, budget=0)


def test_sampling_is_left_to_the_task(tiny_data: PreparedData) -> None:
    lm = wrap(make_model(tiny_data), tiny_data)
    settings = {"until": ["\n"], "max_gen_toks": 12, "temperature": 5.0, "do_sample": True}
    asked = instances("generate_until", [(lines(1)[0], settings)])
    found = set()
    for seed in range(4):
        torch.manual_seed(seed)
        found.add(lm.generate_until(asked, True)[0])
    assert len(found) > 1


def test_long_texts_are_cut_and_counted(tiny_data: PreparedData) -> None:
    lm = wrap(make_model(tiny_data), tiny_data)
    assert lm.max_gen_toks == 32
    long = " ".join(lines(12))
    lm.loglikelihood(instances("loglikelihood", [(long, " root"), ("the", " root")]), disable_tqdm=True)
    assert lm.truncated == 1
    generate(lm, [long, "the root"])
    assert lm.truncated == 2


@pytest.mark.parametrize("context", ["the", "", "the root of the gate"])
def test_only_the_end_of_a_text_longer_than_the_row_is_scored(tiny_data: PreparedData, context: str) -> None:
    model = make_model(tiny_data)
    lm, long = wrap(model, tiny_data), " ".join(lines(12))
    ids = torch.tensor([lm.tok_encode(f"{context}{long}")[-65:]])
    assert ids.shape == (1, 65)
    expected = model(ids[:, :-1]).logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).sum().item()
    asked = [(context, long), (context, " root"), ("a", " b")]
    scores = [score for score, _ in lm.loglikelihood(instances("loglikelihood", asked), disable_tqdm=True)]
    assert scores[0] == pytest.approx(expected, abs=1e-3)
    assert lm.truncated == 1
    alone = wrap(model, tiny_data).loglikelihood(instances("loglikelihood", asked[1:]), disable_tqdm=True)
    assert scores[1:] == pytest.approx([score for score, _ in alone], abs=1e-4)


@pytest.mark.parametrize(
    ("context", "continuation", "expected"),
    [
        ([1, 2, 3], [4, 5], ([1, 2, 3], [4, 5])),
        ([1, 2, 3, 4], [5, 6], ([2, 3, 4], [5, 6])),
        ([1, 2], [3, 4, 5, 6], ([2], [3, 4, 5, 6])),
        ([1], [2, 3, 4, 5, 6], ([2], [3, 4, 5, 6])),
        ([1], [2], ([1], [2])),
    ],
    ids=str,
)
def test_what_fits_a_row_of_four(
    context: list[int], continuation: list[int], expected: tuple[list[int], list[int]]
) -> None:
    assert cut_left(context, continuation, 4) == expected


def test_the_class_has_a_name_in_the_harness() -> None:
    assert get_model("thoughtbubbles") is adapter()


def test_without_the_harness_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"not installed: pip install 'thoughtbubbles\[eval\]'"):
        harness.require_harness()


@pytest.mark.long
def test_the_launcher_hands_over_to_the_harness(tmp_path: Path, tiny_data: PreparedData) -> None:
    make_model(tiny_data).save_pretrained(tmp_path / "model")
    tiny_data.tokenizer().save_pretrained(tmp_path / "model")
    data = write_benchmarks(tmp_path / "data")
    tasks = Path(harness.__file__).parent / "tasks"
    command = [sys.executable, "-m", "thoughtbubbles.evaluation.harness", "--model", "thoughtbubbles", "--model_args",
               f"pretrained={tmp_path}/model,budget=1.5", "--tasks", "piqa", "--include_path", str(tasks), "--metadata",
               f"data_dir={data}", "--limit", "4", "--device", "cpu"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "thoughtbubbles ({'pretrained'" in done.stdout
    assert "acc_norm" in done.stdout


def test_the_launcher_registers_before_it_hands_over(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: seen.append(get_model("thoughtbubbles")))
    harness.main()
    assert seen == [adapter()]


def test_bad_input_of_the_launcher_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: adapter()(str(tmp_path)))
    with pytest.raises(SystemExit) as end:
        harness.main()
    assert end.value.code == 2
    assert re.fullmatch(r"thoughtbubbles: model .*: expected a folder with config.json.*\n", capsys.readouterr().err)


def test_a_network_that_fails_the_launcher_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def away() -> None:
        raise UnfinishedError("the hub is away")

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", away)
    with pytest.raises(SystemExit) as end:
        harness.main()
    assert (end.value.code, capsys.readouterr().err) == (1, "thoughtbubbles: the hub is away\n")
