"""Reading what runs write of themselves: rows of metrics.jsonl and tasks.jsonl."""

import json
import re
from pathlib import Path
from typing import Any

# More than any row takes.
TAIL_BYTES = 1 << 16
# What a row has by which its kind is known, and what it has then.
NEEDED = {
    "loss": ("loss", "tokens", "flops", "tokens_per_second"),
    "eval_loss": ("eval_loss", "tokens", "flops"),
}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; none if it is absent. What is no row is left out."""
    return read_metric_rows(path)[0] if path.exists() else []


def read_metric_rows(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The rows of a metrics.jsonl or tasks.jsonl by their steps, and which lines, counted from 1, are none.

    A row is an object of numbers. Of several of one step and kind the first is taken.
    """
    rows: dict[tuple[int, bool], dict[str, Any]] = {}
    dropped = []
    for number, line in enumerate(_lines(path.read_bytes()), 1):
        row = _row(line)
        if row is None or (place := (row["step"], "eval_loss" in row)) in rows:
            dropped.append(number)
        else:
            rows[place] = row
    return [rows[place] for place in sorted(rows)], dropped


def last_metrics(path: Path) -> dict[str, Any]:
    """The last whole row of a metrics.jsonl, however long the file; empty if there is none."""
    if not path.exists():
        return {}
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        lines = _lines(file.read())
    return next((row for line in reversed(lines) if (row := _row(line)) is not None), {})


def _lines(content: bytes) -> list[bytes]:
    """The lines with their ends: only `\\n` is one, and the last line may lack it."""
    return re.findall(rb"[^\n]*\n|[^\n]+", content)


def _row(line: bytes) -> dict[str, Any] | None:
    """The row that a line holds; None if it holds none, or was cut short."""
    try:
        row = json.loads(line.decode("utf-8")) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int or row["step"] < 0:
        return None
    if not all(type(value) in (int, float, type(None)) for value in row.values()):
        return None
    needed = next((names for kind, names in NEEDED.items() if kind in row), ())
    return row if all(row.get(name) is not None for name in needed) else None
