"""How the package is laid out: what may import what, and how long a function may be."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import thoughtbubbles

SOURCE = Path(thoughtbubbles.__file__).parent
FLOORS = (
    *("support", "model", "recipes", "data", "inspection", "app", "serving"),
    *("training", "evaluation", "planning", "comparison", "cli"),
)
"""Folders, each of which imports itself and those before it."""
INSIDE_DATA = ("splitting", "tokenizer", "sources", "preparation", "feed", "procedural", "__init__")
ROOT_FILES = {"__init__.py", "__main__.py", "py.typed"}
MOST_LINES = 60
MEDIAN_LINES = 8
PAPER = ("streams", "routing", "gate", "attention", "modeling")
"""What a reader of the paper reads, in model/."""
PAPER_LINES = 1500

FILES = sorted(SOURCE.rglob("*.py"))


def name_of(path: Path) -> str:
    """Of a module, below the package: a package's own is named __init__."""
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts)


MODULES = {name_of(path) for path in FILES}


def imports(path: Path) -> Iterator[str]:
    """The modules of ours that a file imports, anywhere in it."""
    package = path.relative_to(SOURCE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            named = tuple((node.module or "").split(".")) if node.module else ()
            if node.level:
                base = package[: len(package) - node.level + 1] + named
            elif named[:1] == ("thoughtbubbles",):
                base = named[1:]
            else:
                continue
            for alias in node.names:
                yield module((*base, alias.name)) or module(base) or ".".join((*base, "__init__"))
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "thoughtbubbles":
                    parts = tuple(alias.name.split(".")[1:])
                    yield module(parts) or ".".join((*parts, "__init__"))


def module(parts: tuple[str, ...]) -> str | None:
    """The module of that name, if there is one."""
    return name if (name := ".".join(parts)) in MODULES else None


GRAPH = {name_of(path): sorted(set(imports(path))) for path in FILES}
BELOW_THE_ROOT = {name: found for name, found in GRAPH.items() if "." in name}


def test_the_root_holds_no_code() -> None:
    assert {path.name for path in SOURCE.iterdir() if path.is_file()} == ROOT_FILES
    folders = {path.name for path in SOURCE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders <= set(FLOORS)


@pytest.mark.parametrize("name", BELOW_THE_ROOT)
def test_no_import_runs_up(name: str) -> None:
    floor = FLOORS.index(name.split(".")[0])
    for other in BELOW_THE_ROOT[name]:
        assert other.split(".")[0] in FLOORS[: floor + 1], f"{name} imports {other}"


def test_no_import_runs_up_inside_data() -> None:
    for name, found in BELOW_THE_ROOT.items():
        if name.startswith("data."):
            floor = INSIDE_DATA.index(name.split(".")[1])
            for other in found:
                if other.startswith("data."):
                    assert other.split(".")[1] in INSIDE_DATA[: floor + 1], f"{name} imports {other}"


def test_there_is_no_circle() -> None:
    waiting = {name: set(found) - {name} for name, found in GRAPH.items()}
    while ready := [name for name, found in waiting.items() if not found & waiting.keys()]:
        for name in ready:
            del waiting[name]
    assert not waiting


def test_the_models_code_imports_siblings_alone() -> None:
    """transformers copies these beside a model's weights and loads them without the package."""
    closure, waiting = set(), {"model.modeling"}
    while waiting:
        name = waiting.pop()
        closure.add(name)
        waiting |= set(GRAPH[name]) - closure
        text = (SOURCE / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("thoughtbubbles")):
                assert (node.level, "." in (node.module or ".")) == (1, False), f"{name}: {node.module}"
    assert {name.rpartition(".")[0] for name in closure} == {"model"}


def lengths() -> Iterator[tuple[int, str]]:
    """Lines of each function, docstring and all."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield (node.end_lineno or 0) - node.lineno + 1, f"{name_of(path)}.{node.name}"


def types_of(path: Path) -> Iterator[str]:
    """The classes and other types that a module defines, such as `Row = dict[str, Any]`."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        named = ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else getattr(node, "name", "")
        if re.fullmatch(r"[A-Z]\w*[a-z]\w*", named):
            yield named


def test_a_type_has_a_name_of_its_own() -> None:
    homes: dict[str, list[str]] = {}
    for path in FILES:
        for name in types_of(path):
            homes.setdefault(name, []).append(name_of(path))
    assert {name: found for name, found in homes.items() if len(found) > 1} == {}


def test_functions_are_short() -> None:
    found = sorted(lengths())
    assert [each for each in found if each[0] > MOST_LINES] == []
    assert found[len(found) // 2][0] <= MEDIAN_LINES


def test_the_paper_is_a_short_read() -> None:
    count = sum(len((SOURCE / "model" / f"{name}.py").read_text("utf-8").splitlines()) for name in PAPER)
    assert count < PAPER_LINES
