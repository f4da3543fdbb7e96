import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from thoughtbubbles.data.tokenizer import save_tokenizer, train_tokenizer

WORDS = ["the", "a", "of", "bubble", "stream", "token", "fork", "gate", "root", "budget", "keeps", "deletes"]
WORDS += ["copies", "thinks", "waits", "it's", "née", "思考", "ω"]


def make_texts(count: int, seed: int = 0) -> list[str]:
    """Different documents of 40 to 400 words, with blank lines, tabs and characters of one to three bytes."""
    draw = random.Random(seed)

    def text(number: int) -> str:
        words = [draw.choice(WORDS) + draw.choice(["", "", ".", ",\n", "!\r\n", "\n\n", "\t", " "]) for _ in range(400)]
        return f"Document {seed}/{number}: " + " ".join(words[: draw.randint(40, 400)])

    return [text(number) for number in range(count)]


def write_folder(folder: Path, texts: list[str]) -> Path:
    folder.mkdir(parents=True)
    for number, text in enumerate(texts):
        (folder / f"{number:03}.txt").write_bytes(text.encode())
    return folder


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return make_texts(30)


@pytest.fixture
def corpus(tmp_path: Path, texts: list[str]) -> str:
    return str(write_folder(tmp_path / "corpus", texts))


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """A small tokenizer, as a user would bring one."""
    folder = tmp_path_factory.mktemp("tokenizer") / "tiny"
    save_tokenizer(train_tokenizer(texts, 300), folder)
    return folder


def hub_folder(folder: Path, parts: dict[tuple[str, str, int], list[str | None]], field: str) -> Path:
    """A folder laid out like a dataset of the hub: a parquet file for each configuration, split and number."""
    folder.mkdir(parents=True)
    configs: dict[str, dict[str, list[str]]] = {}
    for (config, split, number), texts in parts.items():
        file = f"{config}-{split}-{number}.parquet"
        table = pa.table({field: pa.array(texts, pa.string()), "number": range(len(texts))})
        pq.write_table(table, folder / file, row_group_size=3)
        configs.setdefault(config, {}).setdefault(split, []).append(file)
    described = [
        {"config_name": config, "data_files": [{"split": split, "path": files} for split, files in splits.items()]}
        for config, splits in configs.items()
    ]
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': described})}---\n")
    return folder
