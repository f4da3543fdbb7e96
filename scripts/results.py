"""Write the tables of docs/results.md from the JSON in docs/results.

Each table stands between <!-- NAME --> and <!-- /NAME -->; everything else in the page is left as it is.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

from thoughtbubbles.comparison.pages import markdown_table
from thoughtbubbles.comparison.tables import Table
from thoughtbubbles.evaluation.report import Row, table_of

PAGE = Path("docs/results.md")
DATA = Path("docs/results")


def main() -> None:
    """Fill every marked place whose JSON there is."""
    text = PAGE.read_text(encoding="utf-8")
    for path in sorted(DATA.glob("decoding-*.json")):
        text = fill(text, path.stem, decoding_table(json.loads(path.read_text(encoding="utf-8"))))
    for path in sorted(DATA.glob("compare-*.json")):
        text = fill(text, path.stem, comparison_tables(json.loads(path.read_text(encoding="utf-8"))))
    for path in sorted(DATA.glob("evaluation-*.json")):
        text = fill(text, path.stem, evaluation_table(json.loads(path.read_text(encoding="utf-8"))))
    PAGE.write_text(text, encoding="utf-8")


def fill(text: str, name: str, table: str) -> str:
    """`text` with `table` between the marks of `name`."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"{PAGE}: expected the marks <!-- {name} --> and <!-- /{name} -->")
    return pattern.sub(lambda match: f"{match[1]}{table}{match[2]}", text)


def decoding_table(result: dict[str, Any]) -> str:
    """Milliseconds a step for each context and batch, one column a variant."""
    variants = list(dict.fromkeys(row["variant"] for row in result["rows"]))
    lines = ["| batch | context | " + " | ".join(variants) + " | ours / dense | cache, kB per token |"]
    lines.append("| ---: | ---: |" + " ---: |" * (len(variants) + 2))
    places = dict.fromkeys((row["batch"], row["context"]) for row in result["rows"])
    for batch, context in places:
        at = {row["variant"]: row for row in result["rows"] if (row["batch"], row["context"]) == (batch, context)}
        cells = [f"{at[v]['milliseconds']:,.1f}" if v in at else "" for v in variants]
        ratio = at["ours, cached"]["milliseconds"] / at["dense, cached"]["milliseconds"]
        sizes = " / ".join(f"{at[v]['cache_bytes_per_token'] / 1000:.0f}" for v in ("ours, cached", "dense, cached"))
        lines.append(f"| {batch} | {context:,} | {' | '.join(cells)} | {ratio:.2f} | {sizes} |")
    machine = result["machine"]
    lines.append("")
    lines.append(
        f"Milliseconds a step, medians of {result['settings']['steps']} steps; cache sizes are ours / dense. Commit "
        f"{machine['commit']}, {machine['device']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"transformers {machine['transformers']}; random weights, budget {result['settings']['budget']:g}."
    )
    return "\n".join(lines) + "\n"


def comparison_tables(result: dict[str, Any]) -> str:
    """The tables of the report.json of a comparison, and what they were made on."""
    parts = list(result["status"])
    for each in result["tables"]:
        parts += [f"**{each['title']}**", markdown_table(Table(**each))]
    for facts in result["machines"]:
        made = (
            f"commit {facts['commit']}, {facts['device']}, {facts['threads']} thread(s) a run, torch {facts['torch']}"
        )
        parts.append(f"Runs made at {made}, transformers {facts['transformers']}.")
    return "\n\n".join(parts) + "\n"


def evaluation_table(result: dict[str, Any]) -> str:
    """The table of a results.json of `thoughtbubbles evaluate`."""
    rows = [Row(**{**row, "stderr": math.nan if row["stderr"] is None else row["stderr"]}) for row in result["results"]]
    made = result["made_with"]
    facts = (
        f"Routing {result['routing']}, trained at budget {result['own_budget']}; {result['documents']}. Commit "
        f"{made['commit']}, lm-evaluation-harness {made['lm_eval']}, torch {made['torch']}, transformers "
        f"{made['transformers']}."
    )
    return f"{table_of(rows)}\n{facts}\n"


if __name__ == "__main__":
    main()
