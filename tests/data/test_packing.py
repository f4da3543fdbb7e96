from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thoughtbubbles.data import DataError
from thoughtbubbles.data.packing import TokenStore, draw, hold_out, pack, shuffled, token_type


def make_store(path: Path, documents: list[list[int]], dtype: "np.dtype[Any]") -> TokenStore:
    with TokenStore(path, len(documents), dtype) as store:
        for index, tokens in enumerate(documents):
            store.append(index, np.array(tokens[:2]))
            store.append(index, np.array(tokens[2:]))
    return store


def digests(count: int) -> list[bytes]:
    return [index.to_bytes(4) for index in range(count)]


@pytest.mark.parametrize(("vocab_size", "name"), [(65536, "uint16"), (65537, "int32")])
def test_token_type_holds_every_id(vocab_size: int, name: str) -> None:
    assert token_type(vocab_size) == np.dtype(name)
    assert np.iinfo(token_type(vocab_size)).max >= vocab_size - 1


def test_blocks_are_the_documents_each_after_the_separator(tmp_path: Path) -> None:
    store = make_store(tmp_path / "tokens", [[1, 2, 3], [], [70_000, 5]], token_type(70_001))
    packed = pack(store, [2, 0, 1], 9, 3, tmp_path / "packed", "train")
    assert packed.blocks.tolist() == [[9, 70_000, 5], [9, 1, 2]]
    assert (packed.tokens, packed.dropped) == (8, 2)
    assert packed.blocks.dtype == np.int32


def test_too_few_tokens_are_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path / "tokens", [[1, 2], [3]], token_type(10))
    assert len(pack(store, [0, 1], 0, 5, tmp_path / "packed", "train").blocks) == 1
    with pytest.raises(DataError, match="validation has 5 tokens in 2 documents, too few for one block of 6"):
        pack(store, [0, 1], 0, 6, tmp_path / "packed", "validation")


def test_documents_without_tokens_can_be_stored(tmp_path: Path) -> None:
    store = make_store(tmp_path / "tokens", [[], []], token_type(10))
    assert pack(store, [1, 0], 7, 2, tmp_path / "packed", "train").blocks.tolist() == [[7, 7]]


@given(count=st.integers(2, 200), fraction=st.floats(0.01, 0.5), seed=st.integers(0, 99))
def test_about_the_fraction_is_held_out(count: int, fraction: float, seed: int) -> None:
    held_out = hold_out(digests(count), fraction, seed)
    assert held_out == sorted(set(held_out))
    assert len(held_out) == max(1, round(fraction * count))


def test_the_seed_chooses_the_documents_and_their_order() -> None:
    many = digests(1000)
    assert hold_out(many, 0.1, 1) == hold_out(many, 0.1, 1) != hold_out(many, 0.1, 2)
    assert shuffled(range(1000), 1) == shuffled(reversed(range(1000)), 1) != shuffled(range(1000), 2)
    assert sorted(shuffled(range(1000), 1)) == list(range(1000))
    assert np.corrcoef(shuffled(range(1000), 1), range(1000))[0, 1] < 0.15
    assert 300 < np.mean(hold_out(many, 0.2, 3)) < 700


def test_draws_never_change() -> None:
    """A prepared folder must be reproducible by another version, so these values are part of the format."""
    assert draw(0, "order", b"1").hex() == "fb24fe573609759297658cb385a96ccd"
    assert hold_out(digests(50), 0.1, 0) == [12, 15, 34, 40, 48]


def test_equal_documents_fall_on_the_same_side() -> None:
    twice = digests(40) * 2
    held_out = set(hold_out(twice, 0.25, 0))
    assert {(index + 40) % 80 for index in held_out} == held_out
    assert len(held_out) == 20
