"""What prepared data hold is checked against their manifest, when they are first opened and when somebody asks."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pytest

from tests.cli.test_commands import fail, run
from tests.data.conftest import make_texts, write_folder
from tests.data.preparation.test_prepare import prepare
from tests.run_fixtures import RECIPE
from thoughtbubbles.data import DataError, Manifest, PreparedData, load_prepared
from thoughtbubbles.data.feed.loading import load_run_data
from thoughtbubbles.data.preparation import verification
from thoughtbubbles.recipes.training import load_recipe


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    prepare(folder / "data", [str(write_folder(folder / "corpus", make_texts(30)))])
    return folder / "data"


@pytest.fixture
def data(tmp_path: Path, made: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "data"))


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are read whole."""
    names = []
    sha256 = verification._sha256

    def noted(path: Path, *arguments: object) -> str:
        names.append(path.name)
        return sha256(path, *arguments)

    monkeypatch.setattr(verification, "_sha256", noted)
    return names


def flip(path: Path, place: int = -1, keep_time: bool = False) -> None:
    """Change one bit of a file."""
    facts, content = path.stat(), bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    if keep_time:
        os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def blocks_of(data: Path, split: str = "train") -> Path:
    (file,) = (data / split).glob("*.arrow")
    return file


def test_the_manifest_has_a_sha256_of_every_other_file(made: Path) -> None:
    files = {path.relative_to(made).as_posix(): path for path in made.rglob("*") if path.is_file()}
    del files["manifest.json"]
    expected = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    assert Manifest.read(made).files == expected
    assert len(expected) >= 7


def test_the_same_text_has_the_same_content_wherever_it_lay(made: Path, tmp_path: Path) -> None:
    contents = []
    for name, texts in (("same", make_texts(30)), ("other", make_texts(29))):
        prepare(tmp_path / name / "data", [str(write_folder(tmp_path / name / "corpus", texts))])
        contents.append(Manifest.read(tmp_path / name / "data").content)
    assert contents[0] == Manifest.read(made).content != contents[1]
    assert Manifest.read(tmp_path / "same" / "data").fingerprint != Manifest.read(made).fingerprint


def test_data_are_read_whole_once(data: Path, read: list[str]) -> None:
    for _ in range(3):
        load_prepared(data)
    assert len(read) == len(Manifest.read(data).files)
    load_prepared(data, verify=True)
    assert len(read) == 2 * len(Manifest.read(data).files)
    (data / "validation" / "state.json").touch()
    load_prepared(data)
    assert read[-1] == "state.json"
    assert len(read) == 2 * len(Manifest.read(data).files) + 1


@pytest.mark.parametrize("opened", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("keep_time", [False, True], ids=["", "with-its-time"])
def test_a_changed_file_is_named(made: Path, data: Path, opened: bool, keep_time: bool) -> None:
    if opened:
        load_prepared(data)
    for name in Manifest.read(data).files:
        if name == "tokenizer/tokenizer.json":  # has a message of its own
            continue
        flip(data / name, 3, keep_time)
        with pytest.raises(DataError) as caught:
            load_prepared(data)
        message = str(caught.value)
        assert message.startswith(f"{data / name} has changed since it was prepared: its sha256 is ")
        assert message.endswith("bring it back, or prepare the data again, with --overwrite")
        shutil.copyfile(made / name, data / name)
    load_prepared(data)


def test_a_missing_file_is_named(data: Path) -> None:
    blocks_of(data).unlink()
    with pytest.raises(DataError, match=r"data is incomplete: train/data-00000-of-00001\.arrow is missing, prepare"):
        load_prepared(data)


def test_large_data_are_checked_for_those_who_ask(
    data: Path, read: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verification, "LARGE_BYTES", blocks_of(data).stat().st_size)
    flip(blocks_of(data), 2000)
    load_prepared(data, progress=True)
    assert read == []
    assert "were not checked; --verify does" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"data-00000-of-00001\.arrow has changed since it was prepared"):
        load_prepared(data, verify=True)


@pytest.mark.parametrize("size", [100, 65])
def test_ids_that_the_vocabulary_lacks_are_refused(data: Path, size: int) -> None:
    load_prepared(data)  # what is remembered does not help a manifest that was changed
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["vocab_size"] = size
    (data / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=rf"arrow holds token ids from 0 to \d+, expected some below {size}, the manif"):
        load_prepared(data)


def test_negative_ids_are_refused(data: Path) -> None:
    path, manifest = blocks_of(data), json.loads((data / "manifest.json").read_text())
    column = pa.FixedSizeListArray.from_arrays(pa.array([1, 2, -3, 4], pa.int32()), 2)
    table = pa.table({"input_ids": column})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    manifest["files"][f"train/{path.name}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (data / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="holds token ids from -3 to 4, expected some below 300"):
        load_prepared(data)


def test_nothing_is_written_into_the_data_and_nothing_need_be_remembered(
    data: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.stat().st_mtime_ns for path in (data, *data.rglob("*"))}
    monkeypatch.setenv("THOUGHTBUBBLES_CACHE", "/proc/nowhere")
    for _ in range(2):
        load_prepared(data)
    assert len(read) == 2 * len(Manifest.read(data).files)
    assert {path: path.stat().st_mtime_ns for path in (data, *data.rglob("*"))} == before


@pytest.mark.parametrize("memory", ["", "{", "[]", '{"train/state.json": 1}', '{"a": {"size": 1}}', "null"])
def test_a_broken_memory_is_no_memory(data: Path, read: list[str], memory: str) -> None:
    load_prepared(data)
    verification._memory(data).write_text(memory)
    load_prepared(data)
    assert len(read) == 2 * len(Manifest.read(data).files)


def test_a_run_refuses_data_that_have_changed(tmp_path: Path, tiny_data: PreparedData) -> None:
    data = Path(shutil.copytree(tiny_data.path, tmp_path / "data"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(data=data, output=tmp_path / "run"))
    load_run_data(load_recipe(recipe, []), progress=False)
    flip(blocks_of(data), 2000)
    with pytest.raises(DataError, match=r"train/data-00000-of-00001\.arrow has changed since it was prepared"):
        load_run_data(load_recipe(recipe, []), progress=False)


@pytest.mark.parametrize("command", ["train", "compare", "prepare"])
def test_verify_reads_everything(
    tmp_path: Path,
    tiny_data: PreparedData,
    read: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    data = Path(shutil.copytree(tiny_data.path, tmp_path / "data"))
    load_prepared(data)
    monkeypatch.setattr(verification, "LARGE_BYTES", 1)
    flip(blocks_of(data), 2000)
    recipe = tmp_path / "recipe.yaml"
    text = RECIPE.format(data=data, output=tmp_path / "run")
    if command == "compare":
        text = text.replace(f"  output: {tmp_path / 'run'}\n", "") + f"output: {tmp_path / 'run'}\n"
        text += "variants: {dense: {}, causal: {}}\n"
    recipe.write_text(text)
    line = fail(capsys, monkeypatch, command, data if command == "prepare" else recipe, "--verify", "--quiet")
    assert "data-00000-of-00001.arrow has changed since it was prepared" in line
    assert not (tmp_path / "run").exists()


def test_prepare_verifies_a_folder_that_is_whole(data: Path, read: list[str]) -> None:
    assert run("prepare", data, "--verify", "--quiet") == f"{len(read)} files in {data} are as they were prepared\n"
    assert len(read) == len(Manifest.read(data).files)


def test_prepare_verifies_nothing_but_a_folder(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "--verify: expected the prepared folder alone" in fail(
        capsys, monkeypatch, "prepare", data, "python-stdlib", "--verify"
    )


def test_damaged_data_are_prepared_again(tmp_path: Path) -> None:
    corpus = str(write_folder(tmp_path / "corpus", make_texts(30)))
    prepare(tmp_path / "data", [corpus])
    before = blocks_of(tmp_path / "data").read_bytes()
    flip(blocks_of(tmp_path / "data"), 2000)
    with pytest.raises(DataError, match="or is incomplete or damaged: expected a new path, or overwrite"):
        prepare(tmp_path / "data", [corpus])
    prepare(tmp_path / "data", [corpus], overwrite=True)
    assert blocks_of(tmp_path / "data").read_bytes() == before
