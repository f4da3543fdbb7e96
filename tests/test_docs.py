"""What code and pages say of each other: sections, public names and links exist."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WRITTEN = ("src", "tests", "docs", "scripts", "benchmarks", "recipes")
TEXT = {".py", ".md", ".yaml", ".css"}
METHOD = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
API = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]


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


def public_names() -> dict[str, list[str]]:
    """The names of each module that docs/api.md says are public."""
    table = API.partition("## Public names")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("| `")]
    return {module.strip(" `"): re.findall(r"`(\w+)`", names) for module, names in rows}


def declared_names() -> dict[str, list[str]]:
    """`__all__` of each module that has one."""
    found = {}
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                parts = path.relative_to(ROOT / "src").with_suffix("").parts
                found[".".join(parts).removesuffix(".__init__")] = ast.literal_eval(node.value)
    return found


def test_public_names_are_those_of_the_modules() -> None:
    assert len(public_names()) > 10
    assert public_names() == declared_names()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_import_public_names_alone(page: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "thoughtbubbles":
                assert {alias.name for alias in node.names} <= set(public_names()[node.module or ""])


def anchors(page: Path) -> set[str]:
    """What a link into a page may name: its headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in link:
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_that_are_named_exist(page: Path) -> None:
    text = re.sub(r"```diff\n.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    named = re.findall(rf"\b(?:{'|'.join(WRITTEN)})/[\w./-]*\w", text)
    stand_in = re.compile("NAME|VARIANT")
    assert [path for path in named if not stand_in.search(path) and not (ROOT / path).exists()] == []


def test_every_document_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\]\(([\w.]+)\)", index))
    assert named >= {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert "](docs/README.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
