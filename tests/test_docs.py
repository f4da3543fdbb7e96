"""What code and pages say of each other: sections that are named exist."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WRITTEN = ("src", "tests", "docs", "scripts", "benchmarks", "recipes")
TEXT = {".py", ".md", ".yaml", ".css"}
METHOD = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")


def texts() -> Iterator[tuple[Path, str]]:
    """Every file of ours that people read, as one line."""
    paths = [path for folder in WRITTEN for path in (ROOT / folder).rglob("*") if path.suffix in TEXT]
    for path in [*paths, *ROOT.glob("*.md"), ROOT / "Makefile", ROOT / "pyproject.toml"]:
        yield path, re.sub(r"\s+(# )?", " ", path.read_text(encoding="utf-8"))


def test_no_file_cites_what_is_not_in_the_repository() -> None:
    cited = re.compile(r"\bDesign \d")
    assert [path for path, text in texts() if cited.search(text)] == []


def sections_named(text: str) -> list[str]:
    """Sections of docs/method.md that a text names, as in (method: Gate, Routing)."""
    found = re.findall(r"\bmethod: ([A-Z][^).;:]*)", text)
    return [name for names in found for name in names.split(", ") if not name.startswith("`")]


def test_sections_of_the_method_that_are_named_exist() -> None:
    headings = re.findall(r"^##+ (.*)$", METHOD, re.MULTILINE)
    named = {(path, name) for path, text in texts() for name in sections_named(text)}
    assert len(named) > 50
    assert {(path, name) for path, name in named if name not in headings} == set()


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("as there (method: Gate, Routing).", ["Gate", "Routing"]),
        ("released (method: Attenuation, `released`); else", ["Attenuation"]),
        ("method: in capitals; method: str", []),
    ],
)
def test_names_of_sections_are_found(text: str, names: list[str]) -> None:
    assert sections_named(text) == names
