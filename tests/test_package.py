"""The package from outside: imports, Auto classes, the command's help."""

import importlib
import importlib.metadata
import json
import subprocess
import sys
import textwrap

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import thoughtbubbles
from tests.test_docs import public_names


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300, check=False)


def run_script(script: str, *arguments: str) -> str:
    """The output of a script in a fresh interpreter, which must succeed."""
    done = run_python("-c", textwrap.dedent(script), *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def base_requirements(distribution: str) -> set[str]:
    """Everything that installing a distribution without extras brings along, itself included."""
    found: set[str] = set()
    waiting: list[tuple[str, str]] = [(distribution, "")]
    seen = set(waiting)
    while waiting:
        name, extra = waiting.pop()
        found.add(canonicalize_name(name))
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # another platform's
        for requirement in map(Requirement, lines):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                needed = {(requirement.name, wanted) for wanted in ("", *requirement.extras)} - seen
                seen |= needed
                waiting += sorted(needed)
    return found


def modules_of_extras() -> list[str]:
    """Top-level modules that are installed here and that a base installation would lack."""
    base = base_requirements("thoughtbubbles")
    owners = importlib.metadata.packages_distributions()
    return sorted(top for top, names in owners.items() if not base & {canonicalize_name(name) for name in names})


def test_base_requirements_are_told_from_extras() -> None:
    assert {"torch", "transformers", "numpy", "typer"} <= base_requirements("thoughtbubbles")
    assert "pytest" in modules_of_extras()
    assert "hypothesis" in modules_of_extras()
    assert "torch" not in modules_of_extras()


def test_every_module_imports_with_base_dependencies_alone() -> None:
    imported = run_script(
        """
        import importlib, json, pkgutil, sys

        hidden = set(json.loads(sys.argv[1])) - sys.stdlib_module_names

        class Without:
            def __init__(self, finder):
                self.finder = finder

            def find_spec(self, name, path=None, target=None):
                return None if name.partition(".")[0] in hidden else self.finder.find_spec(name, path, target)

            def __getattr__(self, name):
                return getattr(self.finder, name)

        sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
        for name in hidden & set(sys.modules):
            del sys.modules[name]
        try:
            import pytest
        except ModuleNotFoundError:
            pass
        else:
            sys.exit("pytest was not hidden")

        import thoughtbubbles
        from transformers import AutoConfig, AutoModelForCausalLM
        assert type(AutoConfig.for_model("thoughtbubbles")) is thoughtbubbles.ThoughtbubblesConfig
        model = AutoModelForCausalLM.from_config(thoughtbubbles.ThoughtbubblesConfig.preset("nano", vocab_size=7))
        assert type(model) is thoughtbubbles.ThoughtbubblesForCausalLM
        for module in pkgutil.walk_packages(thoughtbubbles.__path__, "thoughtbubbles."):
            importlib.import_module(module.name)
            print(module.name)
        """,
        json.dumps(modules_of_extras()),
    )
    assert {"thoughtbubbles.model.modeling", "thoughtbubbles.model.reference"} <= set(imported.split())


def test_public_names() -> None:
    for module, names in public_names().items():
        for name in names:
            assert getattr(importlib.import_module(module), name) is not None
    assert thoughtbubbles.__version__ == importlib.metadata.version("thoughtbubbles")
    with pytest.raises(AttributeError, match="no attribute 'Bubbles'"):
        _ = thoughtbubbles.Bubbles


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("thoughtbubbles", "thoughtbubbles, transformers"),
        ("thoughtbubbles.py", "transformers, thoughtbubbles"),
        ("-m", "transformers, thoughtbubbles"),
    ],
)
def test_a_program_of_any_name_gets_the_auto_classes_by_the_import(name: str, order: str) -> None:
    run_script(
        f"""
        import sys
        sys.argv = sys.argv[1:]
        import {order}
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

        config = AutoConfig.for_model("thoughtbubbles", vocab_size=7, hidden_size=8, num_hidden_layers=1,
                                      num_attention_heads=2)
        assert type(config) is thoughtbubbles.ThoughtbubblesConfig
        assert type(AutoModel.from_config(config)) is thoughtbubbles.ThoughtbubblesModel
        assert type(AutoModelForCausalLM.from_config(config)) is thoughtbubbles.ThoughtbubblesForCausalLM
        """,
        name,
        "thoughtbubbles",
    )
