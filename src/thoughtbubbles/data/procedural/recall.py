"""The task `recall`: `c4a1e0b7d3j9g2f5i8h6?3b` is answered by `14`, the sum of 7, 4 and 3 under b, c and d.

    prompt = pair x 10 "?" count key
    pair   = key digit
    key    = "a" ... "j"
    count  = "1" ... "9"

The pairs are a dictionary: every key once, in a random order, with a random digit. The question names `count` keys by
the first of them, the others following in the alphabet, "a" after "j". The answer is the sum of their digits, in
decimal. The difficulty is the count: the look-ups that the last token of the prompt, the first to know which keys are
asked for, has to make.
"""

import random

from thoughtbubbles.data.procedural.examples import ProceduralTask

KEYS = "abcdefghij"


def make_recall(chooser: random.Random, difficulty: int) -> tuple[str, str]:
    """A random dictionary with a question for `difficulty` keys, and the sum of their digits."""
    digits = {key: chooser.randrange(10) for key in chooser.sample(KEYS, len(KEYS))}
    first = chooser.randrange(len(KEYS))
    asked = [KEYS[(first + place) % len(KEYS)] for place in range(difficulty)]
    pairs = "".join(f"{key}{digit}" for key, digit in digits.items())
    return f"{pairs}?{difficulty}{KEYS[first]}", str(sum(digits[key] for key in asked))


# The count is one digit.
RECALL = ProceduralTask("recall", (*KEYS, *"0123456789", "?"), 9, make_recall)
