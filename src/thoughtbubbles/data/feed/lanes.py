"""A run on streamed data: which process reads which samples, and what a checkpoint keeps of the stream."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch import Tensor

from thoughtbubbles.data.feed.blocks import collate_blocks, load_corpora, validation_of
from thoughtbubbles.data.feed.heldout import HeldOut
from thoughtbubbles.data.feed.rundata import RunData
from thoughtbubbles.data.feed.stream import Packing, StreamMixture, check_readable, merge_records
from thoughtbubbles.data.preparation.job import source_facts
from thoughtbubbles.data.preparation.packing import TokenArray, token_type
from thoughtbubbles.data.sources.corpora import check_different, resolve_source
from thoughtbubbles.data.sources.identity import content_facts
from thoughtbubbles.data.sources.reading import open_shards
from thoughtbubbles.data.tokenizer import Encoder
from thoughtbubbles.recipes.training import Recipe, StreamSection, stream_lanes
from thoughtbubbles.support.files import write_text

STREAM_NAME = "stream.json"


class StreamedBlocks:
    """Blocks of a stream as training samples.

    Args:
        blocks: of the stream.
        lanes: of the stream.
        block_size: tokens a block.
    """

    def __init__(self, blocks: StreamMixture, lanes: int, block_size: int) -> None:
        self._blocks = blocks
        self._lanes = lanes
        self.uniform_length: int | None = block_size

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": _tensor(self._blocks[index])}

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        """Several samples."""
        return [{"input_ids": _tensor(block)} for block in self._blocks.__getitems__(indices)]

    def describe(self, index: int) -> str:
        """The source, the lane and the block."""
        return self._blocks.describe(index)

    def length(self, index: int) -> int:
        """Tokens of a block."""
        assert self.uniform_length is not None
        return self.uniform_length

    def shared(self, samples: range, batch: int, processes: int, micro: int) -> Iterator[int]:
        """The samples of whole batches in the order in which processes, taking turns, take `micro` of them.

        Each batch goes out by lanes, so that a process gets the same lanes of every batch, as few as can be.

        Args:
            samples: to go out, from the beginning of a batch.
            batch: samples of all processes in a step.
            processes: that share a batch.
            micro: samples of one forward pass.
        """
        rows = sorted(range(batch), key=lambda row: row % self._lanes)
        share = batch // processes
        turns = [
            rows[process * share + start + place]
            for start in range(0, share, micro)
            for process in range(processes)
            for place in range(micro)
        ]
        return (first + row for first in samples[::batch] for row in turns)

    def save(self, folder: Path, samples: int, main: bool) -> None:
        """Note in a checkpoint's folder where to go on after so many samples; every process has to call it."""
        record = merge_records(gather_object([self._blocks.record(samples)]))
        if main:
            write_text(folder / STREAM_NAME, json.dumps(record) + "\n")

    def load(self, folder: Path) -> None:
        """Go on where a checkpoint says.

        Raises:
            DataError: a source that cannot be opened any more.
        """
        self._blocks.go_on(json.loads((folder / STREAM_NAME).read_text(encoding="utf-8")))

    def close(self) -> None:
        """Stop reading ahead."""
        self._blocks.close()


def _tensor(block: TokenArray) -> Tensor:
    return torch.from_numpy(block.astype("int64"))


def load_stream(recipe: Recipe, section: StreamSection, verify: bool, progress: bool) -> RunData:
    """Open it, as `loading.load_run_data` does."""
    corpora = load_corpora("validation", section.validation, verify, progress)
    for corpus in corpora:
        corpus.check_packed(f"data.validation: {corpus.path}")
    manifest, tokenizer = corpora[0].manifest, corpora[0].tokenizer()
    sources = [resolve_source(name) for name in section.stream]
    check_different(sources)
    shards = [open_shards(source, section.text_field) for source in sources]
    check_readable(shards)
    settings = recipe.training
    lanes = stream_lanes(section, settings.batch_size)
    separator = manifest.tokenizer.separator_id
    packing = Packing(
        encoder=Encoder(tokenizer, threads=1),
        separator=separator,
        dtype=token_type(manifest.vocab_size),
        block_size=manifest.block_size,
        held_out=HeldOut(corpora, separator),
        seed=settings.seed,
        lanes=lanes,
        window=max(1, section.shuffle_blocks // lanes),
    )
    blocks = StreamMixture(shards, list(section.stream.values()), packing, settings.steps * settings.batch_size)
    facts = json.dumps([source_facts(source, content_facts) for source in sources], sort_keys=True)
    fingerprints = [corpus.manifest.content for corpus in corpora]
    return RunData(
        samples=StreamedBlocks(blocks, lanes, manifest.block_size),
        validation=validation_of(corpora, section.validation),
        eval_rows=section.eval_blocks,
        final_eval_rows=section.final_eval_blocks,
        collate=collate_blocks,
        tokenizer=tokenizer,
        vocab_size=manifest.vocab_size,
        longest=manifest.block_size,
        source=", ".join(section.stream),
        identity=" ".join([hashlib.sha256(facts.encode()).hexdigest(), *fingerprints]),
    )
