"""Cutting: the only document of a source becomes one to train on and one to hold out, with a gap between them."""

from collections.abc import Iterator
from itertools import islice

from thoughtbubbles.data.preparation.manifest import Cut
from thoughtbubbles.data.sources.reading import Documents, Position, Reader

# Characters of a token, at least, in a text of few different ones: so that what is held out fills a block.
CHARACTERS = 8
# Of the gap; most tokens have about as many.
GAP_CHARACTERS = 4
# How far before its place a cut looks for the end of a line, or of a word.
REACH = 200


def cut_text(text: str, fraction: float, block_size: int) -> tuple[str, str, str]:
    """Cut a text into what is trained on, the gap, and what is held out, where lines or words end.

    The gap is about a block long, so that no block of one part goes on where one of the other ends.

    Args:
        text: the text.
        fraction: of it to hold out; more where that would not fill a block, up to a quarter.
        block_size: tokens a block.
    """
    held = max(round(fraction * len(text)), min(CHARACTERS * block_size, len(text) // 4))
    second = _border(text, len(text) - held)
    first = _border(text, max(0, second - min(GAP_CHARACTERS * block_size, held)))
    return text[:first], text[first:second], text[second:]


def _border(text: str, place: int) -> int:
    """The nearest place before another where a line begins, or else where a word ends; that place if none is near."""
    start = max(0, place - REACH)
    if (line := text.rfind("\n", start, place)) >= 0:
        return line + 1
    return next((i for i in range(place - 1, start, -1) if text[i].isspace()), place)


def find_cut(reader: Reader, fraction: float, block_size: int) -> Cut | None:
    """How the only document of a source is cut; None where there are more, or it is too short for two."""
    texts = list(islice((text for text in reader.documents() if text is not None), 2))
    if len(texts) != 1:
        return None
    train, gap, validation = cut_text(texts[0], fraction, block_size)
    return Cut(*(len(part.encode()) for part in (train, gap, validation))) if train and validation else None


class CutReader:
    """A reader's only document as two: that to train on, then that to hold out.

    Args:
        reader: of the source.
        fraction: as in `cut_text`.
        block_size: as in `cut_text`.
    """

    def __init__(self, reader: Reader, fraction: float, block_size: int) -> None:
        self._reader = reader
        self._fraction, self._block_size = fraction, block_size
        self._place = 0
        self.undecodable = reader.undecodable

    def documents(self, start: Position | None = None) -> Documents:
        """As of any reader."""
        self._place = 0
        for part in self._parts():
            self._place += 1
            if start is None or self._place > start["part"]:
                yield part
            else:
                self.undecodable.clear()

    def position(self) -> Position:
        """As of any reader."""
        return {"part": self._place}

    def _parts(self) -> Iterator[str | None]:
        for text in self._reader.documents():
            if text is None:
                yield None
            else:
                train, _, validation = cut_text(text, self._fraction, self._block_size)
                yield from (train, validation)
