"""Stop strings and what a template writes around answers, however the text is cut into pieces."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thoughtbubbles.serving.endings import AnswerTrim, StopFinder

TEXTS = st.text("ab< \n", max_size=30)
CUTS = st.lists(st.integers(0, 30))


def pieces(text: str, cuts: list[int]) -> list[str]:
    borders = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    return [text[begin:end] for begin, end in pairwise(borders)]


def found(stops: list[str], parts: list[str]) -> str:
    finder, passed = StopFinder(stops), ""
    for part in parts:
        passed += finder.push(part)
        if finder.found:
            return passed
    return passed + finder.finish()


@given(text=TEXTS, stop=st.text("ab<", min_size=1, max_size=4), cuts=CUTS)
def test_text_ends_before_a_stop_string_wherever_it_is_cut(text: str, stop: str, cuts: list[int]) -> None:
    assert found([stop], pieces(text, cuts)) == text.partition(stop)[0]
    assert found([stop, "never"], pieces(text, cuts)) == text.partition(stop)[0]


@pytest.mark.parametrize(
    ("stops", "parts", "passed"),
    [
        (["cd", "bcde"], ["ab", "cd"], "ab"),
        (["bcde", "cd"], ["abcde"], "a"),
        (["\n\n"], ["a\n", "b\n", "\nc"], "a\nb"),
        ([], ["a", "b"], "ab"),
    ],
)
def test_of_several_stop_strings_the_one_that_is_whole_first_ends(
    stops: list[str], parts: list[str], passed: str
) -> None:
    assert found(stops, parts) == passed


def test_what_may_begin_a_stop_string_is_held() -> None:
    finder = StopFinder(["stop"])
    assert [finder.push(part) for part in ("a s", "t", "art st", "o")] == ["a ", "", "start ", ""]
    assert finder.finish() == "sto"


@given(text=TEXTS, tail=st.sampled_from(["", "<a", "<", "a<b"]), cuts=CUTS)
def test_an_answer_is_trimmed_alike_wherever_it_is_cut(text: str, tail: str, cuts: list[int]) -> None:
    trim = AnswerTrim(tail)
    whole = "".join(trim.push(part) for part in pieces(text, cuts)) + trim.finish()
    assert whole == text.strip().removesuffix(tail).rstrip()
