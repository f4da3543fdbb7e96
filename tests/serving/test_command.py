"""`thoughtbubbles serve`: what it refuses, and a process that serves and ends."""

import os
import signal
import socket
import subprocess
from importlib import util
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cli.test_commands import COMMAND, fail
from thoughtbubbles.serving.server import read_keys

for _needed in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(_needed, reason=f"{_needed} is not installed: pip install 'thoughtbubbles[serve]'")


def test_bad_input_is_one_line(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").write_text("\n \n")
    (tmp_path / "odd").write_text("schlüssel\n")
    for arguments, words in (
        (["--budget", "0"], "budget='0': expected a number of streams"),
        (["--budget", "3", "--max-budget", "2"], "budget=3: expected at most 2"),
        (["--slots", "0"], "--slots=0"),
        (["--port", "70000"], "--port=70000"),
        (
            ["--api-key-file", str(tmp_path / "none")],
            "none: No such file or directory, expected a file with an API key",
        ),
        (["--api-key-file", str(tmp_path / "empty")], "empty: expected an API key a line, and there is none"),
        (["--api-key-file", str(tmp_path / "odd")], "odd: expected keys of ASCII letters"),
        (["--host", "no.such.host.invalid"], "no.such.host.invalid, port 8000:"),
    ):
        assert words in fail(capsys, monkeypatch, "serve", tiny_run, *arguments)
    assert "expected a folder with config.json" in fail(capsys, monkeypatch, "serve", tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = fail(capsys, monkeypatch, "serve", tiny_run, "--port", port)
    assert f"127.0.0.1, port {port}: Address already in use: expected an address of this machine that is free" in said


def test_what_is_missing_is_named(
    tiny_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = util.find_spec

    def without(name: str, *rest: Any) -> Any:
        return None if name == "uvicorn" else find(name, *rest)

    monkeypatch.setattr("thoughtbubbles.serving.server.find_spec", without)
    said = fail(capsys, monkeypatch, "serve", tiny_run)
    assert "serve: expected uvicorn, which `pip install 'thoughtbubbles[serve]'` brings" in said


def test_keys_stand_a_line_each(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("sk-1\n\n  sk-2 \n")
    assert read_keys(tmp_path / "keys") == ["sk-1", "sk-2"]


@pytest.mark.parametrize("ending", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_a_process_serves_until_it_is_told_to_end(tiny_run: Path, ending: signal.Signals) -> None:
    command = [*COMMAND, "serve", f"{tiny_run}/", "--port", "0", "--slots", "2"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        address = line.split(" is served at ")[1].split()[0]
        assert address.startswith("http://127.0.0.1:")
        made = httpx.post(f"{address}/completions", json={"prompt": "the", "max_tokens": 2, "budget": 1}, timeout=60)
        assert made.json()["usage"]["completion_tokens"] in (1, 2)
        assert made.json()["model"] == str(tiny_run)
        process.send_signal(ending)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "", "")
