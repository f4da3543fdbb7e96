import itertools
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from thoughtbubbles.data import DataError, Manifest, prepare
from thoughtbubbles.data.sources.corpora import resolve_source
from thoughtbubbles.data.sources.reading import open_documents, read_documents
from thoughtbubbles.data.sources.rowtext import render
from thoughtbubbles.recipes.preparation import load_preparation

ROWS: list[dict[str, Any]] = [
    {"question": f"{n} + {n}?", "steps": [f"{n}+{n}={2 * n}", "done"], "answer": n % 4} for n in range(9)
]
TEMPLATE = "{{ question }}\n{% for step in steps %}\n- {{ step }}\n{% endfor %}\n#### {{ answer }}\n"
RECIPES = Path(__file__).parents[3] / "recipes" / "data"


@pytest.fixture(params=["jsonl", "parquet", "hub"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """The rows as a file, and as a folder that is read like a dataset of the hub."""
    folder = tmp_path / "rows"
    folder.mkdir()
    if request.param == "jsonl":
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        return {"path": str(folder / "rows.jsonl")}
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "train.parquet", row_group_size=4)
    return {"path": str(folder / "train.parquet")} if request.param == "parquet" else {"hub": str(folder)}


def test_rows_become_texts(source: dict[str, Any]) -> None:
    found = list(read_documents(resolve_source({**source, "template": TEMPLATE}), "text"))
    assert found[3] == "3 + 3?\n- 3+3=6\n- done\n#### 3"
    assert len(found) == len(ROWS)


def test_reading_goes_on_from_a_position(source: dict[str, Any]) -> None:
    reader = open_documents(resolve_source({**source, "template": TEMPLATE}), "text")
    first = list(itertools.islice(reader.documents(), 5))
    again = open_documents(resolve_source({**source, "template": TEMPLATE}), "text")
    rest = list(again.documents(json.loads(json.dumps(reader.position()))))
    assert first + rest == list(read_documents(resolve_source({**source, "template": TEMPLATE}), "text"))


def test_an_empty_text_is_no_document(source: dict[str, Any]) -> None:
    texts = list(read_documents(resolve_source({**source, "template": "{% if answer %}{{ answer }}{% endif %}"}), "x"))
    assert texts[:3] == [None, "1", "2"]


def test_a_preparation_depends_on_its_template(source: dict[str, Any], tmp_path: Path, tokenizer_folder: Path) -> None:
    def made(name: str, template: str) -> Manifest:
        options: dict[str, Any] = {"tokenizer": str(tokenizer_folder), "block_size": 4, "validation_fraction": 0.3}
        return prepare(tmp_path / name, [{**source, "template": template}], **options, progress=False)

    one, same, other = made("one", TEMPLATE), made("same", TEMPLATE), made("other", "{{ question }}")
    assert one == same
    assert one.fingerprint != other.fingerprint
    (record,) = one.sources
    assert (record.field, record.template, record.documents) == (None, TEMPLATE, len(ROWS))
    assert record.bytes > other.sources[0].bytes
    assert Manifest.read(tmp_path / "one") == one


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ text }}", "template: 'text' is undefined; the row has 'question', 'steps', 'answer'"),
        ("{{ steps + 1 }}", "template: can only concatenate list"),
        ("{{ question.__class__.__mro__ }}", "template: access to attribute '__class__' of 'str' object is unsafe"),
    ],
)
def test_a_row_that_does_not_fit_is_named(source: dict[str, Any], template: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        list(read_documents(resolve_source({**source, "template": template}), "text"))
    assert message in str(caught.value)
    assert str(next(iter(source.values()))) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"template": "{% for %}"}, "template, line 1: Expected an expression"),
        ({"template": "{{ a }}", "field": "a"}, "expected either the key field or the key template"),
        ({"template": 3}, "template=3: expected text"),
    ],
)
def test_bad_templates_are_refused_before_anything_is_read(
    source: dict[str, Any], values: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError) as caught:
        resolve_source({**source, **values})
    assert message in str(caught.value)


def test_a_text_file_has_no_rows_to_fill_a_template(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match=r"expected \.parquet, \.jsonl, \.json or \.csv with a template"):
        resolve_source({"path": str(tmp_path), "template": "{{ a }}"})


@pytest.mark.parametrize(
    ("name", "row", "text"),
    [
        (
            "gsm8k-aug",
            {"question": "1 + 2 + 3?", "steps": ["<<1+2=3>>", "<<3+3=6>>"], "answer": "6"},
            "1 + 2 + 3?\n1+2=3 3+3=6\nanswer: 6",
        ),
        (
            "gsm8k-aug-usual",
            {"question": "1 + 2 + 3?", "steps": ["<<1+2=3>>", "<<3+3=6>>"], "answer": "6"},
            "Question: 1 + 2 + 3?\nAnswer: <<1+2=3>> <<3+3=6>>\n#### 6",
        ),
        (
            "mmlu",
            {"train": {"question": "Which is even?", "subject": "", "choices": ["1", "2", "3", "5"], "answer": 1}},
            "Which is even?\nchoices: 1, 2, 3, 5\nanswer: 2",
        ),
        (
            "smoltalk",
            {"messages": [{"role": "user", "content": " Hi\n"}, {"role": "assistant", "content": "{{ Hello }}"}]},
            "user:  Hi\n\n\nassistant: {{ Hello }}",
        ),
        ("smoltalk", {"messages": [{"role": "user", "content": "Hi"}]}, "user: Hi"),
    ],
)
def test_templates_of_shipped_recipes(name: str, row: dict[str, Any], text: str) -> None:
    (source,) = load_preparation(RECIPES / f"{name}.yaml").sources
    assert isinstance(source, dict)
    assert render(source["template"], row, "row") == text


NULLS: dict[str, Any] = {
    "title": None,
    "meta": {"by": None, "tags": ["a", None]},
    "author": None,
    "n": None,
    "text": "x",
}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ title }} {{ text }}", " x"),
        ("{{ title | upper }}-{{ title | trim }}-{{ title | replace('N', '') }}", "--"),
        ("{{ title ~ text }}", "x"),
        ("{{ '%s!' % title }}", "!"),
        ("{{ meta.by }}{{ meta['by'] }}.", "."),
        ("{{ author.name }}{{ author['name'] }}{{ author.name.first }}.", "."),
        ("{{ title.strip() }}{{ title[:3] }}.", "."),
        ("{{ meta.tags | join('+') }}", "a+"),
        ("{% for tag in meta.tags %}{{ tag }}{% endfor %}{% for each in title %}y{% endfor %}", "a"),
        ("{% if title %}y{% endif %}{% if title is none %}none{% endif %}{% if title == none %}!{% endif %}", "none!"),
        ("{{ title if title is not none else 'untitled' }}", "untitled"),
        ("{{ title or 'untitled' }} {{ title | default('untitled', true) }}", "untitled untitled"),
        ("{{ title | length }}", "0"),
        ("{{ meta | tojson }}", '{"by": null, "tags": ["a", null]}'),
        ("{{ {}.get('a') }}.", "."),
        ("{{ none }}.", "."),
        ("{{ title }} {{ author }}\n", ""),
    ],
)
@pytest.mark.parametrize("number", [None, float("nan")])
def test_a_null_is_an_empty_text(template: str, text: str, number: float | None) -> None:
    assert render(template, {**NULLS, "n": number}, "row") == text
    assert render(f"{template}{{{{ n }}}}", {**NULLS, "n": number}, "row") == text


@pytest.mark.parametrize("template", ["{{ titel }}", "{{ meta.titel }}", "{{ text.titel }}", "{{ n + 1 }}"])
def test_a_missing_field_is_still_refused(template: str) -> None:
    with pytest.raises(DataError, match="row: template: "):
        render(template, NULLS, "row")


def test_rows_of_nothing_are_skipped(tmp_path: Path) -> None:
    rows = [{"title": None, "text": "body"}, {"title": None, "text": None}, {"title": "head", "text": None}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(tmp_path / "rows.jsonl"), "template": "{{ title }} {{ text }}"}
    assert list(read_documents(resolve_source(source), "text")) == [" body", None, "head "]
