"""Text to training blocks: corpora, tokenizers, packing (Design 4, 7).

`prepare` reads documents, tokenises them and writes fixed-size blocks of token ids to a folder; `load_prepared`
opens such a folder for training and evaluation; `read_rows` gives the rows of a source, which `resolve_source` finds
by its name. Importing this package is cheap: the heavy libraries are
imported when a function needs them.
"""

from thoughtbubbles.data.corpora import resolve_source
from thoughtbubbles.data.errors import DataError, SourceError, UnfinishedError
from thoughtbubbles.data.manifest import Manifest, SourceRecord, SplitRecord, TokenizerRecord
from thoughtbubbles.data.preparation import prepare
from thoughtbubbles.data.prepared import PreparedData, load_prepared
from thoughtbubbles.data.reading import read_rows
from thoughtbubbles.data.recipe import load_preparation

__all__ = [
    "DataError",
    "Manifest",
    "PreparedData",
    "SourceError",
    "SourceRecord",
    "SplitRecord",
    "TokenizerRecord",
    "UnfinishedError",
    "load_preparation",
    "load_prepared",
    "prepare",
    "read_rows",
    "resolve_source",
]
