"""Procedural tasks: generated questions with computed answers, by difficulty.

They need several steps or several look-ups for one token, which is what forks claim to give, and small models learn
them on a CPU.
"""

from thoughtbubbles.data.procedural.arithmetic import ARITHMETIC
from thoughtbubbles.data.procedural.examples import ProceduralExample, ProceduralTask, draw_examples, split_of
from thoughtbubbles.data.procedural.kinship import KINSHIP
from thoughtbubbles.data.procedural.lookup import LOOKUP
from thoughtbubbles.data.procedural.making import MadeTask, make_task
from thoughtbubbles.data.procedural.recall import RECALL
from thoughtbubbles.data.procedural.vocabulary import word_tokenizer

TASKS: dict[str, ProceduralTask] = {task.name: task for task in (ARITHMETIC, KINSHIP, LOOKUP, RECALL)}

__all__ = [
    "TASKS",
    "MadeTask",
    "ProceduralExample",
    "ProceduralTask",
    "draw_examples",
    "make_task",
    "split_of",
    "word_tokenizer",
]
