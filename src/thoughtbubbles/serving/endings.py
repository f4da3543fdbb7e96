"""Where an answer ends inside its text: stop strings, and what a chat template writes around answers."""

from collections.abc import Sequence


class StopFinder:
    """Text up to the first of some strings; what may turn out to begin one is held.

    Args:
        stops: the strings, none empty.

    Attributes:
        found: whether one came.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = stops
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """What of the text so far is new and stands before every stop string."""
        held = self._held + text
        places = [place for stop in self._stops if (place := held.find(stop)) >= 0]
        self.found = bool(places)
        end = min(places) if places else len(held) - max((_begun(held, stop) for stop in self._stops), default=0)
        self._held = "" if places else held[end:]
        return held[:end]

    def finish(self) -> str:
        """What was held, when no text follows."""
        held, self._held = self._held, ""
        return held


def _begun(text: str, word: str) -> int:
    """How many characters of a word a text ends with, short of the whole."""
    return next((size for size in range(min(len(word) - 1, len(text)), 0, -1) if text.endswith(word[:size])), 0)


class AnswerTrim:
    """An answer without white space around it, and without the words that a chat template writes behind it.

    Args:
        tail: those words; empty where there are none.
    """

    def __init__(self, tail: str = "") -> None:
        self._tail = tail
        self._held = ""
        self._begun = False

    def push(self, text: str) -> str:
        """What is new of the text so far and belongs to the answer whatever follows."""
        held = self._held + text
        if not self._begun:
            held = held.lstrip()
            self._begun = held != ""
        kept = held.rstrip()
        size = len(self._tail) if self._tail and kept.endswith(self._tail) else _begun(kept, self._tail)
        kept = kept[: len(kept) - size].rstrip()
        self._held = held[len(kept) :]
        return kept

    def finish(self) -> str:
        """What was held and belongs to the answer, when no text follows."""
        held, self._held = self._held.rstrip(), ""
        return held.removesuffix(self._tail).rstrip()
