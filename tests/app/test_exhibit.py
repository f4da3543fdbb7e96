"""What the page shows, without the page: traces, predictions, generation, markup."""

import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from tests.cli.test_commands import fail
from tests.helpers import random_ids, tiny_model
from tests.inspection.test_trace import Letters
from thoughtbubbles import BubbleTrace, trace_bubbles
from thoughtbubbles.app.exhibit import MOST_CHARACTERS, Exhibit
from thoughtbubbles.app.page import _budgets
from thoughtbubbles.app.render import (
    render_legend,
    render_message,
    render_next,
    render_summary,
    render_text,
    render_tokens,
    render_tree,
)
from thoughtbubbles.inspection.trace import to_ids
from thoughtbubbles.model.loading import load_model, load_tokenizer


def exhibit(**rules: object) -> Exhibit:
    return Exhibit("tiny", tiny_model(**rules), Letters())


@pytest.fixture(scope="module")
def trace() -> BubbleTrace:
    return trace_bubbles(tiny_model(budget=2.5), Letters(), random_ids(1, 20)[0])


def elements(markup: str) -> ElementTree.Element:
    return ElementTree.fromstring(f"<body>{markup}</body>")


def test_long_text_is_cut_with_a_message(tiny_run: Path) -> None:
    shown = Exhibit("run", load_model(tiny_run), load_tokenizer(tiny_run))
    whole = to_ids(shown.tokenizer, "the root of " * 50)
    assert shown.read("the root of " * 50) == (whole[:16], "The text is too long: only its first 16 tokens are taken.")
    assert shown.read("the")[1] == ""
    assert "first" in shown.read(" " * (MOST_CHARACTERS + 1))[1]


def test_a_long_prompt_keeps_its_end(tiny_run: Path) -> None:
    shown = Exhibit("run", load_model(tiny_run), load_tokenizer(tiny_run))
    text = "the root of " * 50 + "a gate"
    ids, message = shown.prompt(text, 4)
    assert ids == to_ids(shown.tokenizer, text)[-12:]
    assert message == "The text is too long: only its last 12 tokens are taken."
    assert shown.prompt("x" * 10 * MOST_CHARACTERS + text, 4) == (ids, message)
    assert shown.prompt("the", 4)[1] == ""


def test_next_tokens_with_and_without_forks() -> None:
    shown = exhibit(budget=2.5)
    found = shown.trace(shown.read("abcdefgh")[0], 2.5)
    token = int(found.bubble_sizes()[-1].argmax())
    rows = shown.next_tokens(found, token)
    with_forks = shown.model(torch.tensor([found.ids]), budget=2.5).logits[0, token].softmax(-1)
    assert [p for _, p, _ in rows] == pytest.approx(with_forks.topk(8).values.tolist(), abs=1e-6)
    assert any(abs(p - without) > 1e-4 for _, p, without in rows)
    dense = exhibit(routing="none")
    assert {without for *_, without in dense.next_tokens(dense.trace([0, 1, 2], 1), 1)} == {None}


@pytest.mark.parametrize("rules", [{"routing": "causal", "budget": 2}, {"routing": "none"}, {"routing": "copy"}])
def test_generated_tokens_carry_the_streams_of_the_whole_text(rules: dict[str, object]) -> None:
    shown = exhibit(**rules)
    ids, message = shown.prompt("abc", 6)
    assert message == ""
    steps = list(shown.generate(ids, 2, 6, seed=3))
    last = steps[-1]
    assert [len(step.ids) for step in steps] == list(range(4, 4 + len(steps)))
    assert last.ids == Letters().encode("".join(last.pieces))
    assert last.sizes == trace_bubbles(shown.model, Letters(), last.ids, 2).bubble_sizes()[-1].tolist()
    assert steps == list(shown.generate([0, 0, 1, 2], 2, 6, seed=3))


def test_generation_leaves_room_in_the_longest_row() -> None:
    shown = exhibit(max_position_embeddings=10)
    ids, message = shown.prompt("abcdefghijklmno", 4)
    assert (len(ids), message) == (6, "The text is too long: only its last 6 tokens are taken.")
    assert len(shown.prompt("abcdefghijklmno", 100)[0]) == 5
    steps = list(shown.generate(ids, 2, 100))
    assert [step.row_ended for step in steps] == [False] * 4 + [True]
    assert len(steps[-1].pieces) == len(steps[-1].sizes) == 10
    assert [step.row_ended for step in shown.generate(ids, 2, 4)] == [False] * 5


def test_bad_budgets_say_so() -> None:
    with pytest.raises(ValueError, match="a whole number of streams per token"):
        exhibit(routing="copy", budget=2).trace([0, 1, 2], 1.5)


def budgets(*rules: dict[str, object]) -> tuple[float, ...]:
    """Minimum, maximum, value and step of the page's slider."""
    found = _budgets([exhibit(**each) for each in rules])
    return found["minimum"], found["maximum"], found["value"], found["step"]


def test_the_slider_has_the_budgets_that_each_model_can_have() -> None:
    dense: dict[str, object] = {"routing": "none", "budget": 3}
    assert budgets({"budget": 1.5}) == (1, 4, 1.5, 0.25)
    assert budgets(dense, {"budget": 6}) == (1, 6, 6, 0.25)
    assert budgets({"budget": 2.5}, {"routing": "copy", "budget": 2}) == (1, 4, 2, 1)
    assert budgets({"budget": 4}, {"routing": "pause", "budget": 3}) == (1, 3, 3, 1)
    no_layers = exhibit(fork_layers=[])
    assert [each.has_budget for each in (exhibit(**dense), no_layers, exhibit(budget=1))] == [False, False, True]


def test_tokens_are_buttons_with_their_streams(trace: BubbleTrace) -> None:
    buttons = elements(render_tokens(trace, 3)).findall(".//button")
    sizes = trace.bubble_sizes()
    assert [button.get("data-token") for button in buttons] == [str(i) for i in range(20)]
    assert [button.get("aria-pressed") for button in buttons].index("true") == 3
    for token, button in enumerate(buttons):
        assert f"{sizes[-1, token]} stream" in button.get("aria-label", "")
        widths = [int(bar.get("width", "")) for bar in button.findall(".//rect")]
        assert widths == [5 * size for size in sizes[:, token].tolist()]


def test_the_tree_has_a_line_a_stream(trace: BubbleTrace) -> None:
    for token in range(20):
        family = trace.lifetimes(token)
        drawn = elements(render_tree(trace, token)).findall(".//line")
        kinds = [line.get("class") for line in drawn]
        assert kinds.count("tb-root") == 1
        assert kinds.count("tb-fork") == kinds.count("tb-branch") == len(family) - 1
        assert kinds.count("tb-death") == 2 * sum(each.deleted_at is not None for each in family)


def test_summary_and_table_and_text() -> None:
    model = tiny_model(routing="topk", budget=1.5)
    found = trace_bubbles(model, Letters(), "abcd")
    assert re.search(
        r"perplexity [\d.]+ \([\d.]+ nats per token\); budget 1\.5; .* no left-to-right", render_summary(found)
    )
    assert "perplexity" not in render_summary(trace_bubbles(model, Letters(), [1]))
    for rows, cells, titles in (
        ([(" a", 0.5, 0.25), ("b", 0.1, 0.2)], ["50.00%", "25.00%", "10.00%", "20.00%"], 3),
        ([(" a", 0.5, None)], ["50.00%"], 2),
    ):
        table = elements(render_next(rows))
        assert [cell.text for cell in table.findall(".//td")] == cells
        assert len(table.findall("./table/thead/tr/th")) == titles
    text = elements(render_text(["a", " b"], [1, 3], 1))
    assert "".join(text.itertext()) == "a b3"
    assert "".join(text.find(".//*[@class='tb-prompt']").itertext()) == "a"
    assert "".join(elements(render_text(["a\n\n", "b\n"], [2, 1])).itertext()) == "a↵↵2\n\nb\n"


def test_the_summary_of_a_dense_model_has_no_budget() -> None:
    summary = render_summary(trace_bubbles(tiny_model(routing="none"), Letters(), "abcd"))
    assert "one stream per token" in summary
    assert "budget" not in summary


def test_generated_tokens_are_marked(trace: BubbleTrace) -> None:
    buttons = elements(render_tokens(trace, start=18)).findall(".//button")
    assert ["tb-made" in button.get("class", "") for button in buttons] == [False] * 18 + [True] * 2
    assert [", generated" in button.get("aria-label", "") for button in buttons] == [False] * 18 + [True] * 2


def test_the_legend_says_what_shape_number_and_colour_are() -> None:
    legend = "".join(elements(render_legend()).itertext())
    assert all(word in legend for word in ("shape", "number", "Colour", "6 or more"))


def test_nothing_of_a_text_becomes_markup(trace: BubbleTrace) -> None:
    evil = "<script>alert('&\")</script>"
    marked = BubbleTrace(**{**trace.__dict__, "tokens": [evil] * 20})
    for markup in (
        render_tokens(marked),
        render_tree(marked, 0),
        render_next([(evil, 0.1, 0.1)]),
        render_text([evil], [2]),
        render_message(evil),
    ):
        assert "<script" not in markup
        elements(markup)
    assert render_message("") == ""


def test_without_gradio_the_command_says_what_to_install(
    tiny_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "pip install 'thoughtbubbles[demo]'" in fail(capsys, monkeypatch, "demo", tiny_run)
