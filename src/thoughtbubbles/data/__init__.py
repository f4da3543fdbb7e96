"""Text to training blocks: corpora, tokenizers, packing (Design 4, 7).

`prepare` reads documents, tokenises them and writes fixed-size blocks of token ids to a folder; `load_prepared`
opens such a folder for training and evaluation. Importing this package is cheap: the heavy libraries are
imported when a function needs them.
"""

from thoughtbubbles.data.errors import DataError
from thoughtbubbles.data.manifest import Manifest, SourceRecord, SplitRecord, TokenizerRecord
from thoughtbubbles.data.preparation import prepare
from thoughtbubbles.data.prepared import PreparedData, load_prepared

__all__ = [
    "DataError",
    "Manifest",
    "PreparedData",
    "SourceRecord",
    "SplitRecord",
    "TokenizerRecord",
    "load_prepared",
    "prepare",
]
