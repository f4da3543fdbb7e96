from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.data.conftest import hub_folder, write_folder
from thoughtbubbles.cli import app
from thoughtbubbles.data import DataError, Manifest, Preparation, load_preparation, prepare
from thoughtbubbles.data.sources.corpora import resolve_source
from thoughtbubbles.data.sources.hub import HubSource

SHIPPED = sorted((Path(__file__).parents[2] / "recipes" / "data").glob("*.yaml"))
LIMITS = {
    "fineweb": 28_000_000_000,
    "gsm8k-aug-usual": None,
    "gsm8k-aug": None,
    "mmlu": None,
    "openwebtext": 2_500_000_000,
    "pes2o": 2_500_000_000,
    "smoltalk": None,
}

ROWS = {"gsm8k-aug-usual", "gsm8k-aug", "mmlu", "smoltalk"}
"""Of which a document has a row of its own."""


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def run(*arguments: object) -> None:
    result = CliRunner().invoke(app, ["prepare", "--quiet", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_can_be_used(path: Path) -> None:
    options = load_preparation(path)
    (source,) = map(resolve_source, options.sources)
    assert isinstance(source, HubSource)
    assert source.streaming
    assert options.tokenizer == "openai-community/gpt2"
    assert options.block_size == 512
    assert options.limit_tokens == LIMITS[path.stem]
    assert options.packing == ("padded" if path.stem in ROWS else "packed")
    assert f"thoughtbubbles prepare runs/{path.stem} --recipe recipes/data/{path.name}" in path.read_text()


def test_there_is_a_recipe_for_each_corpus_of_the_paper() -> None:
    assert [path.stem for path in SHIPPED] == list(LIMITS)


def test_every_key_has_its_effect(tmp_path: Path, texts: list[str], tokenizer_folder: Path) -> None:
    parts: dict[tuple[str, str, int], list[str | None]] = {
        ("c", "train", 0): [*texts[:20]],
        ("c", "test", 0): [*texts[20:25]],
    }
    hub = hub_folder(tmp_path / "hub", parts, "body")
    files = write_folder(tmp_path / "files", texts[25:])
    recipe = write(
        tmp_path / "recipe.yaml",
        f"""
        sources:
          - {{hub: {hub}, config: c, field: body}}
          - {files}
        validation: ["hf:{hub}?split=test&field=body"]
        text_field: unused
        tokenizer: {tokenizer_folder}
        block_size: 16
        limit_tokens: 1_000
        seed: 3
        packing: padded
        """,
    )
    run(tmp_path / "out", "--recipe", recipe)
    manifest = Manifest.read(tmp_path / "out")
    first, second = manifest.sources
    assert (first.name, first.kind, first.config, first.split) == (f"hf:{hub}?config=c&field=body", "hub", "c", "train")
    assert (first.field, first.streaming, first.files, first.revision) == ("body", True, None, None)
    assert first.reached_limit
    assert (second.kind, second.files) == ("text", 5)
    assert manifest.validation_sources[0].documents == 5
    assert (manifest.text_field, manifest.block_size, manifest.seed) == ("unused", 16, 3)
    assert manifest.packing == "padded"
    assert manifest.tokenizer.name == str(tokenizer_folder)
    assert manifest == prepare(tmp_path / "again", **vars(load_preparation(recipe)), progress=False)


def test_the_command_line_goes_before_the_recipe(tmp_path: Path, corpus: str) -> None:
    recipe = write(
        tmp_path / "recipe.yaml",
        f"sources: [no/such]\nvocab_size: 280\nblock_size: 16\nseed: 1\nvalidation: [{corpus}]",
    )
    # 4096 is the default of --vocab-size, and still goes before the recipe when it is given.
    run(
        tmp_path / "out",
        corpus,
        "--recipe",
        recipe,
        "--vocab-size",
        4096,
        "--block-size",
        8,
        "--validation",
        corpus + "/000.txt",
    )
    manifest = Manifest.read(tmp_path / "out")
    assert [source.name for source in manifest.sources] == [corpus]
    assert [source.name for source in manifest.validation_sources] == [corpus + "/000.txt"]
    assert (manifest.block_size, manifest.seed) == (8, 1)
    assert 280 < manifest.vocab_size < 4096


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("block_siz: 3", r"recipe .*x.yaml: unknown key block_siz: did you mean block_size\?"),
        ("num_proc: 3", "unknown key num_proc: expected one of sources, text_field"),
        ("block_size: large", "block_size='large': expected a whole number"),
        ("block_size: 1.5", "block_size=1.5: expected a whole number"),
        ("limit_tokens: yes", "limit_tokens=True: expected a whole number or null"),
        (
            "sources: python-stdlib",
            "sources='python-stdlib': expected a list of names, or of mappings with the key hub",
        ),
        ("sources: [3]", r"sources=\[3\]: expected a list of names"),
        ("- a", "x.yaml: expected keys and values, of sources, text_field"),
        ("a: [", "x.yaml: while parsing"),
    ],
)
def test_bad_recipes_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load_preparation(write(tmp_path / "x.yaml", text))
    assert "\n" not in str(caught.value)


def test_a_recipe_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.yaml: no such file"):
        load_preparation(tmp_path / "none.yaml")


def test_empty_lists_and_null_are_as_if_not_named(tmp_path: Path) -> None:
    options = load_preparation(write(tmp_path / "x.yaml", "tokenizer: null\nvalidation: []\nseed: 2"))
    assert options == Preparation(seed=2)


def test_a_fraction_without_a_point_is_a_number(tmp_path: Path) -> None:
    options = load_preparation(write(tmp_path / "x.yaml", "validation_fraction: 1e-2"))
    assert options == Preparation(validation_fraction=0.01)


@pytest.mark.parametrize("name", ["sources", "block_siz"])
def test_an_option_that_there_is_not_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(TypeError, match=name):
        prepare(tmp_path / "out", ["python-stdlib"], **{name: 3})
