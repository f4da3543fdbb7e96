"""Thoughtbubbles: language models that fork and delete residual streams to think in parallel.

Importing the package registers its models with the Auto classes of transformers. Only the command
`thoughtbubbles`, which is `thoughtbubbles_command` beside it, imports them later, so that its help answers at once.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from thoughtbubbles.support import VERSION, imported

if TYPE_CHECKING:
    from thoughtbubbles.inspection.trace import BubbleTrace, trace_bubbles
    from thoughtbubbles.model.configuration import ThoughtbubblesConfig
    from thoughtbubbles.model.conversion import convert_released_state_dict
    from thoughtbubbles.model.modeling import ThoughtbubblesForCausalLM, ThoughtbubblesModel
    from thoughtbubbles.model.retrofit import retrofit, retrofit_folder, to_dense, to_dense_folder
    from thoughtbubbles.model.streams import Streams
    from thoughtbubbles.model.threshold import update_thresholds

__version__ = VERSION
__all__ = [
    "BubbleTrace",
    "Streams",
    "ThoughtbubblesConfig",
    "ThoughtbubblesForCausalLM",
    "ThoughtbubblesModel",
    "__version__",
    "convert_released_state_dict",
    "retrofit",
    "retrofit_folder",
    "to_dense",
    "to_dense_folder",
    "trace_bubbles",
    "update_thresholds",
]

_HOMES = {
    "BubbleTrace": "inspection.trace",
    "Streams": "model.streams",
    "ThoughtbubblesConfig": "model.configuration",
    "ThoughtbubblesForCausalLM": "model.modeling",
    "ThoughtbubblesModel": "model.modeling",
    "convert_released_state_dict": "model.conversion",
    **dict.fromkeys(("retrofit", "retrofit_folder", "to_dense", "to_dense_folder"), "model.retrofit"),
    "trace_bubbles": "inspection.trace",
    "update_thresholds": "model.threshold",
}


def __getattr__(name: str) -> Any:
    return imported(name, _HOMES, __name__)


# The command imports its models when it needs them.
if "thoughtbubbles_command" not in sys.modules:
    import_module(f"{__name__}.model.modeling")
