"""The task `lookup`: `1c0a1e1b0d0g1f0h?3b` is answered by `110`, the bits of b, c and d.

    prompt = pair x 8 "?" count key
    pair   = bit key
    key    = "a" ... "h"
    bit    = "0" | "1"
    count  = "1" ... "8"

As in `recall`, the pairs are a dictionary in a random order, the question names `count` keys by the first of them, and
the difficulty is the count. The answer is their bits in order, and a single token, as is a pair: nothing but the
look-ups is left to learn, all of them are due at once, and their sum would not do.
"""

import random
from itertools import product

from thoughtbubbles.data.procedural.examples import ProceduralTask

KEYS, BITS = "abcdefgh", "01"


def make_lookup(chooser: random.Random, difficulty: int) -> tuple[str, str]:
    """A random dictionary with a question for `difficulty` keys, and their bits."""
    bits = {key: chooser.choice(BITS) for key in chooser.sample(KEYS, len(KEYS))}
    first = chooser.randrange(len(KEYS))
    asked = [KEYS[(first + place) % len(KEYS)] for place in range(difficulty)]
    pairs = "".join(f"{bit}{key}" for key, bit in bits.items())
    return f"{pairs}?{difficulty}{KEYS[first]}", "".join(bits[key] for key in asked)


_PAIRS = [f"{bit}{key}" for key in KEYS for bit in BITS]
_COUNTS = [f"?{count}" for count in range(1, len(KEYS) + 1)]
_ANSWERS = ["".join(bits) for count in range(1, len(KEYS) + 1) for bits in product(BITS, repeat=count)]
LOOKUP = ProceduralTask("lookup", (*_PAIRS, *_COUNTS, *KEYS, *_ANSWERS), len(KEYS), make_lookup)
