"""The report of a comparison as Markdown, JSON and a page of HTML that needs no other file."""

import base64
import html
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from thoughtbubbles.comparison.control import control_lines
from thoughtbubbles.comparison.figures import draw_figures
from thoughtbubbles.comparison.results import Report
from thoughtbubbles.comparison.tables import tables
from thoughtbubbles.support.errors import RunError, one_line
from thoughtbubbles.support.files import json_text, write_text

__all__ = ["write_report"]

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
th, td { padding: 0.3rem 0.7rem; text-align: right; border-bottom: 1px solid #8884; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; background: white; border-radius: 4px; }
.note { opacity: 0.75; font-size: 0.9rem; }
"""


def write_report(report: Report, folder: Path) -> None:
    """Write report.json (with the tables as they are shown), report.md, report.html and plots/*.png.

    Raises:
        RunError: if the disk is full or fails.
    """
    try:
        _write_report(report, folder)
    except OSError as error:
        raise RunError(f"report in {folder}: {one_line(error)}; the runs are whole") from error


def _write_report(report: Report, folder: Path) -> None:
    figures = draw_figures(report, folder / "plots")
    content = {**asdict(report), "status": status(report), "tables": [asdict(table) for table in tables(report)]}
    write_text(folder / "report.json", json_text(content, indent=2) + "\n")
    write_text(folder / "report.md", markdown(report, figures))
    write_text(folder / "report.html", page(report, figures))


def markdown(report: Report, figures: Mapping[str, Path]) -> str:
    """The report with links to its figures."""
    parts = [f"# {report.title}", *status(report)]
    for table in tables(report):
        parts += [f"## {table.title}", table.markdown()]
    parts += [f"![{caption}](plots/{path.name})" for caption, path in figures.items()]
    parts += ["## Made on", *(f"- {line}" for line in _machines(report))]
    return "\n\n".join(parts) + "\n"


def page(report: Report, figures: Mapping[str, Path]) -> str:
    """The report as HTML, its figures inside."""
    body = [f"<h1>{html.escape(report.title)}</h1>"]
    body += [f"<p>{html.escape(line)}</p>" for line in status(report)]
    pictures = [_picture(caption, path) for caption, path in figures.items()]
    # The first figure answers first; the others follow the numbers.
    body += pictures[:1]
    for table in tables(report):
        body += [f"<h2>{html.escape(table.title)}</h2>", table.html()]
    body += pictures[1:]
    body += ["<h2>Made on</h2>", "<ul>", *(f"<li>{html.escape(line)}</li>" for line in _machines(report)), "</ul>"]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    title = f"<title>{html.escape(report.title)}</title>"
    top = f'<!doctype html>\n<html lang="en"><head>{head}{title}<style>{STYLE}</style></head>'
    return "\n".join([top, "<body>", *body, "</body></html>"]) + "\n"


def status(report: Report) -> list[str]:
    """Which extra computation pays, first of all; then what the report rests on, and what it lacks."""
    lines = [
        *control_lines(report.trials),
        f"Data {report.data['source']}, seeds {', '.join(map(str, report.seeds))}; all variants of a seed see the same "
        f"{report.data['unit']} in the same order.",
    ]
    if report.missing:
        lines.append(f"Not finished: {', '.join(report.missing)}.")
    lines += [f"Failed: {label}: {reason}" for label, reason in report.failed.items()]
    return lines


def _machines(report: Report) -> list[str]:
    return [", ".join(f"{name} {value}" for name, value in facts.items()) for facts in report.machines]


def _picture(caption: str, path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{data}"></figure>'
