"""The procedural tasks by name."""

from thoughtbubbles.data.procedural.arithmetic import ARITHMETIC
from thoughtbubbles.data.procedural.examples import ProceduralTask
from thoughtbubbles.data.procedural.kinship import KINSHIP
from thoughtbubbles.data.procedural.lookup import LOOKUP
from thoughtbubbles.data.procedural.places import PLACES
from thoughtbubbles.data.procedural.recall import RECALL

TASKS: dict[str, ProceduralTask] = {task.name: task for task in (ARITHMETIC, KINSHIP, LOOKUP, PLACES, RECALL)}
