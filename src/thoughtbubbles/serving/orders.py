"""What is asked of the engine, and what it says while it answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from thoughtbubbles.serving.choosing import Choosing, TokenScore


@dataclass(frozen=True)
class Order:
    """One answer that is wanted.

    Attributes:
        ids: the prompt's tokens, at least one.
        budget: streams per token.
        most: tokens to write at most.
        choosing: how each is chosen.
        ends: tokens that end the answer.
        stops: strings that end it, none empty.
        echo: the tokens at the end of the prompt that the answer begins with; 0 is none.
        tail: for a chat's answer, which has no white space around it, what the template writes behind it; None is no
            chat.
    """

    ids: Sequence[int]
    budget: Fraction
    most: int
    choosing: Choosing = field(default_factory=Choosing)
    ends: frozenset[int] = frozenset()
    stops: Sequence[str] = ()
    echo: int = 0
    tail: str | None = None


@dataclass(frozen=True)
class PlacedScore:
    """A token of an answer.

    Attributes:
        score: what the model thought of it.
        offset: characters of the answer before it.
    """

    score: TokenScore
    offset: int


@dataclass(frozen=True)
class Written:
    """More of an answer: text that is final, and the tokens that it is of."""

    text: str
    scores: Sequence[PlacedScore] = ()


@dataclass(frozen=True)
class Finished:
    """The end of an answer.

    Attributes:
        reason: `stop` for an end token or a stop string, `length` where the tokens are used up.
        prompt_tokens: that were read.
        tokens: that were chosen, an end token among them.
        streams: alive after the last layer, of all tokens that were read: the last one chosen is not.
    """

    reason: str
    prompt_tokens: int
    tokens: int
    streams: int


@dataclass(frozen=True)
class Failed:
    """An answer that is not to be had.

    Attributes:
        message: one line that says why.
        again: whether that is for now alone.
    """

    message: str
    again: bool = False


Saying = Written | Finished | Failed


@dataclass(eq=False)
class Ticket:
    """An order on its way.

    Attributes:
        order: what is wanted.
        say: takes what there is to say, in the engine's thread: it must neither wait nor raise.
        cancelled: set by whoever no longer wants it.
    """

    order: Order
    say: Callable[[Saying], None]
    cancelled: bool = False
