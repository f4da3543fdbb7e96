from pathlib import Path

import pytest

from thoughtbubbles.support.files import replacing, write_text


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_text_file_appears_and_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    write_text(path, "one")
    write_text(path, "two: ü")
    assert path.read_text(encoding="utf-8") == "two: ü"
    assert names(tmp_path) == {"notes.txt"}


def test_a_folder_replaces_a_folder(tmp_path: Path) -> None:
    for content in ("one", "two"):
        with replacing(tmp_path / "model") as partial:
            partial.mkdir()
            (partial / content).touch()
    assert names(tmp_path) == {"model"}
    assert names(tmp_path / "model") == {"two"}


def write_half(path: Path, kind: str) -> None:
    with replacing(path) as partial:
        if kind == "folder":
            partial.mkdir()
            (partial / "half").touch()
        else:
            partial.write_text("half")
        raise RuntimeError


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_failure_leaves_what_was_there(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "result"
    path.write_text("old")
    with pytest.raises(RuntimeError):
        write_half(path, kind)
    assert (names(tmp_path), path.read_text()) == ({"result"}, "old")


def test_leavings_of_a_killed_process_are_in_nobodys_way(tmp_path: Path) -> None:
    for suffix in ("partial", "old"):
        (tmp_path / f".model.{suffix}").mkdir()
        (tmp_path / f".model.{suffix}" / "half").touch()
    (tmp_path / "model").mkdir()
    with replacing(tmp_path / "model") as partial:
        partial.mkdir()
    assert names(tmp_path) == {"model"}
    assert names(tmp_path / "model") == set()


def test_nothing_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "model"):
        pass
