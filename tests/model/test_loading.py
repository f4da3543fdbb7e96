import json
import shutil
from pathlib import Path

import pytest

from thoughtbubbles.data import PreparedData
from thoughtbubbles.model.loading import find_model, load_model, load_tokenizer
from thoughtbubbles.support.errors import InputError


def test_a_run_and_its_model_folder_are_the_same_model(tiny_run: Path) -> None:
    assert find_model(tiny_run) == find_model(tiny_run / "model") == str(tiny_run / "model")


def test_loaded_tokenizer_is_that_of_the_data(tiny_run: Path, tiny_data: PreparedData) -> None:
    assert load_tokenizer(tiny_run).get_vocab() == tiny_data.tokenizer().get_vocab()


@pytest.fixture
def copy(tiny_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_run / "model", tmp_path / "copy"))


def test_no_model_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected a folder with config\.json"):
        find_model(tmp_path)


def test_no_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(InputError, match="expected weights"):
        load_model(copy)


def test_another_kind_of_model(copy: Path) -> None:
    (copy / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(InputError, match="model_type is 'gpt2', expected 'thoughtbubbles'"):
        load_model(copy)


def test_broken_configuration(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json is not a configuration"):
        load_model(copy)


def test_truncated_weights(copy: Path) -> None:
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(InputError, match="copy") as error:
        load_model(copy)
    assert "\n" not in str(error.value)


def test_no_tokenizer(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"expected tokenizer\.json"):
        load_tokenizer(copy)
