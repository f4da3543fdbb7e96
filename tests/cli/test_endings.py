"""How commands end that cannot go on: one line, the right exit code, nothing left behind."""

import errno
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.test_commands import COMMAND, COMMANDS, run
from tests.run_fixtures import RECIPE
from thoughtbubbles import __version__, cli
from thoughtbubbles.cli import application
from thoughtbubbles.data import PreparedData
from thoughtbubbles.evaluation.generation import RANGES, Sampling
from thoughtbubbles.support.errors import InputError, RunError, ending
from thoughtbubbles.support.progress import stage

pytestmark = pytest.mark.usefixtures("blank_figures")
ROWS = '{"prompt": "the", "answer": "root", "difficulty": 1}\n' * 3


@pytest.fixture
def end(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """Run a command that must end with one line on standard error: its exit code and the line."""

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["thoughtbubbles", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        lines = [line for line in capsys.readouterr().err.splitlines() if "━" not in line]
        assert len(lines) == 1, lines
        assert lines[0].startswith("thoughtbubbles: ")
        return int(str(exit_.value.code)), lines[0]

    return call


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_version_is_said() -> None:
    assert run("--version") == f"thoughtbubbles {__version__}\n"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/a/b"), 2, "/a/b: No such file or directory"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", b"/a"), 2, "/a: Is a directory"),
        (OSError(errno.EROFS, "Read-only file system", "/a"), 2, "/a: Read-only file system"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left on device"),
        (OSError(errno.EIO, "Input/output error", "/a"), 1, "/a: Input/output error"),
        (ConnectionError("the hub\n is away"), 1, "the hub is away"),
        (TimeoutError(), 1, "TimeoutError"),
        (Exception("I/O error: (os error 28)"), 1, "No space left on device"),
        (Exception("not written: [errno 20] not that"), 2, "Not a directory"),
        (MemoryError(), 1, "out of memory: MemoryError"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"),
            1,
            "out of memory: CUDA out of memory. Tried 2 GiB",
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "out of memory: DefaultCPU"),
        (RecursionError("maximum"), 2, "the input is nested too deeply"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_what_the_system_refuses_is_one_line(error: Exception, code: int, line: str) -> None:
    end = ending(error)
    assert isinstance(end, InputError if code == 2 else RunError)
    assert (end.exit_code, str(end)[: len(line)]) == (code, line)
    assert "\n" not in str(end)


@pytest.mark.parametrize("error", [ValueError("x"), KeyError("x"), AssertionError(), TypeError("x"), RuntimeError("x")])
def test_a_fault_of_the_program_keeps_its_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ending(error) is None

    def broken(**_: Any) -> int:
        raise error

    monkeypatch.setattr(application, "app", broken)
    with pytest.raises(type(error)):
        cli.main()


def test_a_full_disk_behind_the_output_is_one_line() -> None:
    command = [*COMMAND, "--version"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "thoughtbubbles: No space left on device\n")


def test_nobody_who_reads_the_output_is_no_message() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [*COMMAND, "--help"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["generate"], "Missing argument 'model'."),
        (["generate", "m", "--top-p", "2"], "--top-p=2: Input should be less than or equal to 1"),
        (["generate", "m", "--seed", "1", "--seed=x"], "--seed=x: Input should be a valid integer"),
        (["perplexity", "m", "d", "--blocks", "0"], "--blocks=0: Input should be greater than or equal to 1"),
        (["perplexity", "m", "d", f"--batch-size={10**30}"], f"--batch-size={10**30}: Input should be le"),
        (["plan", "nano", "--nope"], "No such option: --nope"),
        (["nope"], "No such command 'nope'."),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_command_line_is_one_line(end: Callable[..., tuple[int, str]], arguments: list[str], line: str) -> None:
    code, said = end(*arguments)
    assert code == 2
    assert said.startswith(f"thoughtbubbles: {line}")


@pytest.mark.parametrize("command", COMMANDS)
def test_brackets_survive_in_the_help(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    text = run(command, "--help")
    assert "\\[" not in text
    if command in ("demo", "serve"):
        assert f"pip install 'thoughtbubbles[{command}]'" in text


def test_brackets_survive_in_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with stage("run [demo] [/x]", 1, enabled=True) as bar:
        bar.show("a [/b]")
    assert "run [demo] [/x]" in shown.getvalue()
    assert "a [/b]" in shown.getvalue()


NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in RANGES if name != "top_k" for value in (NAN, INFINITE, -INFINITE, -1.0)),
        ("temperature", 1e-300),
        ("temperature", 1e300),
        ("top_p", 1.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e300),
        ("top_k", -1),
    ],
)
def test_sampling_that_overflows_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{name}={value}: expected")):
        Sampling(**{name: value})


@pytest.mark.parametrize(
    "options",
    [
        ["--temperature", 1e-5],
        ["--temperature", 1e5],
        ["--top-p", 0],
        ["--top-k", 10**30],
        ["--min-p", 1],
        ["--repetition-penalty", 100],
        ["--temperature", 1e-5, "--repetition-penalty", 0.01],
        ["--max-new-tokens", 10**30],
        ["--seed", 2**32 - 1],
    ],
    ids=lambda options: "-".join(map(str, options)),
)
def test_sampling_at_its_limits_works(tiny_run: Path, options: list[object]) -> None:
    assert run("generate", tiny_run, "--prompt", "the", "--max-new-tokens", 8, *options).startswith("the")


@pytest.mark.parametrize("seed", [-1, 2**32, 10**30])
def test_a_seed_that_no_generator_takes_is_refused(
    tmp_path: Path, tiny_run: Path, end: Callable[..., tuple[int, str]], seed: int
) -> None:
    output = tmp_path / "out"
    for command in (["generate", tiny_run, "--prompt", "a"], ["prepare", output], ["make-task", "recall", output]):
        code, line = end(*command, "--seed", seed)
        assert (code, f"seed={seed}: expected a whole number from 0 to 4294967295" in line) == (2, True)
    assert names(tmp_path) == []


def calls(tiny_run: Path, tiny_data: PreparedData, rows: Path) -> dict[str, list[object]]:
    """Every command with an output folder, without the folder."""
    return {
        "inspect-text": ["inspect", tiny_run, "--text", "the", "--output"],
        "inspect-data": ["inspect", tiny_run, "--data", tiny_data.path, "--blocks", 2, "--output"],
        "exact-match": ["exact-match", tiny_run, rows, "--output"],
        "make-task": ["make-task", "recall", "--examples", 5, "--test-examples", 5, "--quiet"],
        "prepare": ["prepare", "--quiet"],
    }


KINDS = ("inspect-text", "inspect-data", "exact-match", "make-task", "prepare")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["file", "file/below", "/proc/x", "/dev/full", "mine", "named"])
def test_an_output_that_is_no_place_for_it_is_refused(
    tmp_path: Path,
    tiny_run: Path,
    tiny_data: PreparedData,
    end: Callable[..., tuple[int, str]],
    kind: str,
    place: str,
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(ROWS)
    (tmp_path / "file").write_text("mine")
    for folder, name in (("mine", "notes.md"), ("named", "trace.json"), ("named", "exact_match.json")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_text('{"mine": 1}')
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    code, line = end(*calls(tiny_run, tiny_data, rows)[kind], tmp_path / place)
    assert (code, str(tmp_path / place) in line) == (2, True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert names(tmp_path) == ["file", "mine", "named", "rows.jsonl"]


@pytest.mark.parametrize("kind", ["inspect-text", "inspect-data", "exact-match"])
def test_an_output_of_its_own_is_written_again(
    tmp_path: Path, tiny_run: Path, tiny_data: PreparedData, kind: str
) -> None:
    rows, folder = tmp_path / "rows.jsonl", tmp_path / "new" / "out"
    rows.write_text(ROWS)
    command = calls(tiny_run, tiny_data, rows)[kind]
    run(*command, folder)
    (folder / "notes.md").write_text("mine")
    before = names(folder)
    run(*command, folder)
    assert names(folder) == before
    assert (folder / "notes.md").read_text() == "mine"


@pytest.mark.parametrize(
    ("kind", "old"),
    [
        *((kind, old) for kind in ("inspect-text", "inspect-data", "exact-match") for old in (False, True)),
        ("make-task", False),
    ],
)
def test_a_full_disk_leaves_what_was_there(
    tmp_path: Path,
    tiny_run: Path,
    tiny_data: PreparedData,
    end: Callable[..., tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    old: bool,
) -> None:
    rows, folder = tmp_path / "rows.jsonl", tmp_path / "new" / "out"
    rows.write_text(ROWS)
    command = calls(tiny_run, tiny_data, rows)[kind]
    before = {}
    if old:
        run(*command, folder)
        before = {path: path.read_bytes() for path in folder.iterdir()}
    flushed = []

    def full(path: Path) -> None:
        flushed.append(path)
        if len(flushed) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(
        "thoughtbubbles.support.files.flush" if kind != "make-task" else "thoughtbubbles.support.files.flush_entry",
        full,
    )
    code, line = end(*command, folder)
    assert (code, "No space left on device" in line, str(folder) in line) == (1, True, True)
    after = {path: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}
    assert after == before
    assert folder.exists() == bool(before)
    assert (tmp_path / "new").exists() == bool(before)


def test_a_home_folder_is_understood(
    tmp_path: Path, tiny_run: Path, monkeypatch: pytest.MonkeyPatch, end: Callable[..., tuple[int, str]]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").symlink_to(tiny_run)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "prompt.txt").write_text("the")
    assert run("generate", "~/run", "--file", "~/texts/prompt.txt", "--max-new-tokens", 2).startswith("the")
    run("inspect", "~/run", "--text", "the", "--output", "~/out")
    assert (tmp_path / "out" / "trace.json").is_file()
    run("make-task", "recall", "~/task", "--examples", 5, "--test-examples", 5, "--quiet")
    assert (tmp_path / "task" / "train.jsonl").is_file()
    code, line = end("prepare", "~/data", "~/texts", "--quiet")
    assert (code, "does not exist" in line) == (2, False)
    code, line = end("generate", "~nobody-of-this-name/run", "--prompt", "a")
    assert (code, "~nobody-of-this-name/run" in line) == (2, True)


@pytest.mark.parametrize("command", ["generate", "inspect"])
def test_text_that_is_none_is_refused(tiny_run: Path, end: Callable[..., tuple[int, str]], command: str) -> None:
    option = "--prompt" if command == "generate" else "--text"
    code, line = end(command, tiny_run, option, os.fsdecode(b"a\xff"))
    assert (code, "utf-8" in line) == (2, True)


def test_prompts_that_are_no_text_are_refused(
    tmp_path: Path, tiny_run: Path, end: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.bin").write_bytes(b"a\xff")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff"), encoding="utf-8"))
    places = {"standard input": [], "x.bin": ["--file", tmp_path / "x.bin"], str(tmp_path): ["--file", tmp_path]}
    for name, arguments in places.items():
        code, line = end("generate", tiny_run, *arguments)
        assert (code, name in line) == (2, True)


def test_a_comparison_leaves_other_folders_alone(
    tmp_path: Path, tiny_data: PreparedData, end: Callable[..., tuple[int, str]]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "report.md").write_text("mine")
    recipe = tmp_path / "recipe.yaml"
    text = RECIPE.format(data=tiny_data.path, output="").replace("  output: \n", "")
    recipe.write_text(f"{text}output: {tmp_path / 'mine'}\nvariants: {{dense: {{}}, causal: {{}}}}\n")
    code, line = end("compare", recipe, "--quiet")
    assert (code, "expected a new or empty folder, or that of a comparison" in line) == (2, True)
    assert names(tmp_path / "mine") == ["report.md"]
