"""Text to training blocks: corpora, tokenizers, packing.

`prepare` reads documents, tokenises them and writes fixed-size blocks of token ids to a folder; `load_prepared`
opens such a folder for training and evaluation. Importing this package is cheap: the heavy libraries are imported when
a function needs them.
"""

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
