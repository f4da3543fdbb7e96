"""Text to training blocks: corpora, tokenizers, packing.

`prepare` reads documents, tokenises them and writes fixed-size blocks of token ids to a folder; `load_prepared`
opens such a folder for training and evaluation.

Importing this package is cheap: what a name needs is imported when it is asked for.
"""

from typing import TYPE_CHECKING, Any

from thoughtbubbles.support import imported

if TYPE_CHECKING:
    from thoughtbubbles.data.preparation.manifest import Manifest
    from thoughtbubbles.data.preparation.prepare import prepare
    from thoughtbubbles.data.preparation.prepared import PreparedData, load_prepared
    from thoughtbubbles.recipes.options import Preparation
    from thoughtbubbles.recipes.preparation import load_preparation
    from thoughtbubbles.support.errors import DataError, SourceError, UnfinishedError

__all__ = [
    "DataError",
    "Manifest",
    "Preparation",
    "PreparedData",
    "SourceError",
    "UnfinishedError",
    "load_preparation",
    "load_prepared",
    "prepare",
]

_HOMES = {
    "DataError": "support.errors",
    "Manifest": "data.preparation.manifest",
    "Preparation": "recipes.options",
    "PreparedData": "data.preparation.prepared",
    "SourceError": "support.errors",
    "UnfinishedError": "support.errors",
    "load_preparation": "recipes.preparation",
    "load_prepared": "data.preparation.prepared",
    "prepare": "data.preparation.prepare",
}


def __getattr__(name: str) -> Any:
    return imported(name, _HOMES, __name__)
