"""Preparation: from sources to a folder of training blocks, complete or absent."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from thoughtbubbles.data.preparation.job import Job, make_job
from thoughtbubbles.data.preparation.manifest import MANIFEST_NAME, Manifest
from thoughtbubbles.data.preparation.prepared import SPLITS, check_complete
from thoughtbubbles.data.preparation.stages import Stages
from thoughtbubbles.data.preparation.verification import verify
from thoughtbubbles.data.preparation.workfolder import discard_work, locked_work, publish, resumable
from thoughtbubbles.recipes.options import PYTHON_STDLIB, Preparation, SourceName
from thoughtbubbles.support.errors import DataError
from thoughtbubbles.support.files import user_path
from thoughtbubbles.support.progress import say

# All that is in a prepared folder.
PARTS = (*SPLITS, "tokenizer", MANIFEST_NAME)
# What waits for a thread fills the memory.
MOST_THREADS = 1024


def prepare(
    output: str | Path,
    sources: Sequence[SourceName] = (PYTHON_STDLIB,),
    *,
    num_proc: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
    **options: Any,
) -> Manifest:
    """Read documents, tokenise them, and write blocks of token ids for training and validation.

    Documents, each after a separator, are concatenated and cut into blocks, those of train in an order
    shuffled by the seed. Attention and routing credit cross document borders inside a block. The tokens left over
    at the end of a split are dropped and counted. Documents that are empty or not UTF-8 are skipped and counted. The
    separator is what the tokenizer has on record, or else its eos token; the folder's tokenizer has it on record, and
    so will every model that is trained on the folder.

    Validation is held out by document: no text of a validation document is in train. The result depends on the
    sources, the options and the seed alone: not on `num_proc`, nor on interruptions.

    The folder appears when it is complete: OUTPUT/train and OUTPUT/validation (Arrow, column `input_ids`, fixed
    length, uint16 or int32), OUTPUT/tokenizer and OUTPUT/manifest.json. If the folder already holds the same sources,
    unchanged, with the same options, nothing is done.

    Until then the work is in a folder `.NAME.partial` beside it. Bad input leaves nothing behind; if something else
    stops the work, the same call goes on after the last `SHARD_BYTES` of text that were done.

    Args:
        output: the folder to write; missing parents are made.
        sources: names of sources, or mappings.
        num_proc: threads that tokenise; None is one a core.
        overwrite: replace a folder prepared with other options.
        progress: show progress bars on standard error.
        options: the other fields of `Preparation`, which says what sources there are.

    Raises:
        DataError: a source, option or tokenizer that cannot be used, too little text for a block, or an output
            that exists and holds something else, or that another process prepares.
        UnfinishedError: the network or the disk stopped the work; the same call goes on.
    """
    if num_proc is not None and not 1 <= num_proc <= MOST_THREADS:
        raise DataError(f"num_proc is {num_proc}: expected at least 1, at most {MOST_THREADS}")
    job = make_job(Preparation(sources, **options))
    return _carry_out(job, user_path(output).resolve(), num_proc or os.cpu_count() or 1, overwrite, progress)


def _carry_out(job: Job, folder: Path, threads: int, overwrite: bool, progress: bool) -> Manifest:
    fingerprint = job.fingerprint()
    if (ready := _already_prepared(folder, fingerprint, overwrite, progress)) is not None:
        discard_work(folder, job.work_fingerprint())
        return ready
    with locked_work(folder) as work:
        # Seen again under the lock: another process may have written it meanwhile.
        if (ready := _already_prepared(folder, fingerprint, overwrite, progress)) is not None:
            return ready
        with resumable(work, folder, job.work_fingerprint(), progress):
            manifest = Stages(job, fingerprint, work, threads, progress).manifest()
            publish(work, folder)
    return manifest


def _already_prepared(folder: Path, fingerprint: str, overwrite: bool, progress: bool) -> Manifest | None:
    """The manifest if the folder holds the result; otherwise check that it may be written."""
    try:
        manifest = Manifest.read(folder)
        if manifest.fingerprint == fingerprint:
            check_complete(folder, manifest)
            verify(folder, manifest, progress=progress)
            say(f"{folder} is already prepared from the same sources with the same options: nothing to do", progress)
            return manifest
    except DataError:
        pass
    _check_output(folder, overwrite)
    return None


def _check_output(folder: Path, overwrite: bool) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not _is_prepared(folder):
        raise DataError(f"output {folder} exists and is not a prepared folder: expected a new path")
    if not overwrite:
        raise DataError(
            f"output {folder} was prepared from other sources or with other options, or is incomplete or "
            "damaged: expected a new path, or overwrite"
        )
    if others := sorted(path.name for path in folder.iterdir() if path.name not in PARTS):
        raise DataError(f"output {folder} also holds {', '.join(others)}: expected a new path, or nothing else in it")


def _is_prepared(folder: Path) -> bool:
    """Whether a manifest of ours is there, of whatever format version: what may be replaced."""
    try:
        values = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(values, dict) and {"format_version", "fingerprint"} <= values.keys()
