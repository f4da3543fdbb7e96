"""The task `places`: `cabdacbb?25` is answered by `AA`, the letters at places 2 and 5.

    prompt = letter x 8 "?" place [place]
    letter = "a" | "b" | "c" | "d"
    place  = "1" ... "8"

The question names one place or two, and the answer is the letters there, in that order and in capitals. A letter is one
token, and so are a question and an answer: the last token of the prompt alone has to read, at as many places as the
question names, and to know which letter stands at which. The difficulty counts the places.
"""

import random
from itertools import permutations, product

from thoughtbubbles.data.procedural.examples import ProceduralTask

LETTERS, COUNTED, MOST = "abcd", "12345678", 2


def make_places(chooser: random.Random, difficulty: int) -> tuple[str, str]:
    """Random letters with a question for `difficulty` places, and what stands there."""
    letters = "".join(chooser.choices(LETTERS, k=len(COUNTED)))
    asked = chooser.sample(range(len(COUNTED)), difficulty)
    question = "".join(COUNTED[place] for place in asked)
    return f"{letters}?{question}", "".join(letters[place] for place in asked).upper()


_DIFFICULTIES = range(1, MOST + 1)
_QUESTIONS = [f"?{''.join(places)}" for count in _DIFFICULTIES for places in permutations(COUNTED, count)]
_ANSWERS = ["".join(letters).upper() for count in _DIFFICULTIES for letters in product(LETTERS, repeat=count)]
PLACES = ProceduralTask("places", (*LETTERS, *_QUESTIONS, *_ANSWERS), MOST, make_places)
