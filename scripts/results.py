"""Write the tables of the pages in docs/results, and the main one of README.md, from the JSON there.

Each table stands between <!-- NAME --> and <!-- /NAME -->; everything else in the pages is left as it is.
"""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from thoughtbubbles.evaluation.report import ComparisonRow, ScoreRow, comparison_table, table_of
from thoughtbubbles.support.tables import Table, markdown_table

README = Path("README.md")
DATA = Path("docs/results")
MAIN = "compare-books"
MAIN_COLUMNS = ("training tokens", "seeds", "training FLOPs", "perplexity", "at test budget 1", "loss minus dense's")


def main() -> None:
    """Fill every marked place whose JSON there is."""
    makers = {
        "decoding": decoding_table,
        "training": training_table,
        "routing": routing_tables,
        "compare": comparison_tables,
        "evaluation": evaluation_table,
    }
    tables = {path.stem: make(read(path)) for kind, make in makers.items() for path in DATA.glob(f"{kind}-*.json")}
    tables |= {path.parent.name: device_tables(path.parent) for path in DATA.glob("*/training.json")}
    for name, table in tables.items():
        fill(sorted(DATA.glob("*.md")), name, table)
    fill([README], MAIN, comparison_extract(read(DATA / f"{MAIN}.json"), MAIN_COLUMNS))


def read(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def fill(pages: Sequence[Path], name: str, table: str) -> None:
    """Put `table` between the marks of `name`, in whichever of the pages has them."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    marked = {page: text for page in pages if pattern.search(text := page.read_text(encoding="utf-8"))}
    if not marked:
        raise SystemExit(f"expected the marks <!-- {name} --> and <!-- /{name} --> in {', '.join(map(str, pages))}")
    for page, text in marked.items():
        page.write_text(pattern.sub(lambda match: f"{match[1]}{table}{match[2]}", text), encoding="utf-8")


def decoding_table(result: dict[str, Any]) -> str:
    """Milliseconds a step for each context and batch, one column a variant."""
    variants = list(dict.fromkeys(row["variant"] for row in result["rows"]))
    lines = []
    places = dict.fromkeys((row["batch"], row["context"]) for row in result["rows"])
    for batch, context in places:
        at = {row["variant"]: row for row in result["rows"] if (row["batch"], row["context"]) == (batch, context)}
        cells = [f"{at[v]['milliseconds']:,.1f}" if v in at else "" for v in variants]
        ratio = at["ours, cached"]["milliseconds"] / at["dense, cached"]["milliseconds"]
        sizes = " / ".join(f"{at[v]['cache_bytes_per_token'] / 1000:.0f}" for v in ("ours, cached", "dense, cached"))
        lines.append([str(batch), f"{context:,}", *cells, f"{ratio:.2f}", sizes])
    machine = result["machine"]
    facts = (
        f"Milliseconds a step, medians of {result['settings']['steps']} steps; cache sizes are ours / dense. Commit "
        f"{machine['commit']}, {machine['device']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"transformers {machine['transformers']}; random weights, budget {result['settings']['budget']:g}."
    )
    columns = ["batch", "context", *variants, "ours / dense", "cache, kB per token"]
    return f"{markdown_table(columns, lines, left=())}\n\n{facts}\n"


def training_table(result: dict[str, Any]) -> str:
    """A row for each variant of benchmarks/training.py."""
    parts = ("gate", "routing", "gather", "merge")
    rows = []
    for name, row in result["variants"].items():
        ours = sum(row["parts"].get(part, 0.0) for part in parts) / row["milliseconds"] if "parts" in row else None
        rows.append(
            [
                name,
                f"{row['milliseconds']:,.0f}",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['times_dense']:.2f}",
                f"{row['times_same_positions']:.2f}" if "times_same_positions" in row else "",
                "" if ours is None or name == "dense" else f"{ours:.1%}",
                f"{row['share_of_peak']:.0%}",
            ]
        )
    columns = [
        "variant",
        "ms a step",
        "tokens/s",
        "/ dense",
        "/ dense, same positions",
        ", ".join(parts),
        "of the peak",
    ]
    settings = result["settings"]
    precision = settings["precision"] + (", compiled" if settings["compile"] else "")
    facts = (
        f"Preset {settings['preset']}, vocabulary {settings['vocab_size']:,}, batches of {settings['batch_size']} x "
        f"{settings['length']} tokens, {precision}; medians of {settings['rounds']} steps. "
        f"Peak {result['matmul_peak'] / 1e9:,.0f} GFLOP/s. {_made(result['machine'])}."
    )
    return f"{markdown_table(columns, rows)}\n\n{facts}\n"


def routing_tables(result: dict[str, Any]) -> str:
    """Routing beside a block at each length, and attention's memory at each width, of benchmarks/routing.py."""
    columns = ["router", "budget", "tokens", "routing, ms", "a block, ms", "routing / block"]
    rows = [
        [
            row["router"],
            row["budget"],
            f"{row['length']:,}",
            f"{row['routing_milliseconds']:.2f}",
            f"{row['block_milliseconds']:.1f}",
            f"{row['routing_milliseconds'] / row['block_milliseconds']:.1%}",
        ]
        for row in result["routing"]
    ]
    memory = [
        [f"{row['streams']:,}", f"{row['bytes'] / 1e6:.0f}", f"{row['bytes'] / row['streams'] / 1000:.1f}"]
        for row in result["memory"]
    ]
    settings = result["settings"]
    facts = (
        f"Routing: forward of batches of {settings['batch_size']}, preset {settings['preset']}, medians of "
        f"{settings['rounds']}. Memory: {settings['precision']}, one row, 12 heads of 64. {_made(result['machine'])}."
    )
    return "\n\n".join(
        [
            markdown_table(columns, rows),
            markdown_table(["streams", "memory of attention, MB", "kB a stream"], memory),
            f"{facts}\n",
        ]
    )


def device_tables(folder: Path) -> str:
    """What the parts `correct` and `training` of scripts/gpu.py found on a device."""
    training, correct, facts = (read(folder / f"{part}.json") for part in ("training", "correct", "facts"))
    items, peak = training["items"], facts["items"]["matmul"]["bfloat16"]
    columns = ["step", "rows", "ms", "tokens/s", "TFLOP/s", "of 989", "of the measured peak", "causal half", "GB"]
    rows = [
        [
            name,
            str(row["rows"]),
            f"{row['seconds'] * 1000:.0f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['flops_per_second'] / 1e12:.0f}",
            *(f"{row[key]:.1%}" for key in ("mfu_square", "measured_mfu_square", "mfu_half")),
            f"{row['peak_memory'] / 1e9:.1f}",
        ]
        for name, row in items.items()
        if "tokens_per_second" in row
    ]
    parts = {name: row for name, row in items.items() if "ours" in row}
    names = list(dict.fromkeys(part for row in parts.values() for part in row["seconds"]))
    by_part = [
        [name, *(f"{row['seconds'][part] * 1000:.1f}" for part in names), f"{row['ours']:.1%}"]
        for name, row in parts.items()
    ]
    cases = [row for name, row in correct["items"].items() if not name.startswith("compiled")]
    worst = {key: max(row.get(key, 0) for row in cases) for key in ("logits", "gradients", "cached", "bfloat16_logits")}
    told = (
        f"Correctness: {len(cases)} cases against the reference, {sum(row['flips'] for row in cases)} of "
        f"{sum(row['candidates'] for row in cases):,} candidates routed otherwise, {len(correct['failed'])} failed. "
        f"Largest error of a logit {worst['logits']:.1e} and, relative, of a gradient {worst['gradients']:.1e} in "
        f"float32; of logits as a whole {worst['bfloat16_logits']:.1%} in bfloat16; of a logit in the cache "
        f"{worst['cached']:.1e} in float64."
    )
    made = (
        f"{_made(training['machine'])}; bfloat16, compiled by blocks, rows of 1,024 tokens, vocabulary 50,257, medians "
        f"of 6 steps. Measured peak {peak / 1e12:.0f} TFLOP/s. FLOPs over the whole square of attention, but in the "
        "column that counts half of it."
    )
    tables = [
        markdown_table(columns, rows),
        markdown_table(["ms, uncompiled", *names, "gate to merge"], by_part),
    ]
    return "\n\n".join([*tables, told, f"{made}\n"])


def _made(machine: dict[str, str]) -> str:
    return (
        f"Commit {machine['commit']}, {machine['device']}, {machine['threads']} thread(s), torch {machine['torch']}, "
        f"transformers {machine['transformers']}"
    )


def comparison_tables(result: dict[str, Any]) -> str:
    """The tables of the report.json of a comparison, and what they were made on."""
    parts = list(result["status"])
    for each in result["tables"]:
        parts += [f"**{each['title']}**", Table(**each).markdown()]
    for facts in result["machines"]:
        made = (
            f"commit {facts['commit']}, {facts['device']}, {facts['threads']} thread(s) a run, torch {facts['torch']}"
        )
        parts.append(f"Runs made at {made}, transformers {facts['transformers']}.")
    return "\n\n".join(parts) + "\n"


def comparison_extract(result: dict[str, Any], columns: Sequence[str]) -> str:
    """Some columns of all tables of a comparison's variants, in one."""
    found: dict[str, list[str]] = {}
    for each in (Table(**content) for content in result["tables"][:2]):
        names = [row[0] for row in each.rows]
        found |= {column: [row[place] for row in each.rows] for place, column in enumerate(each.columns)}
    rows = [[name, *(found[column][line] for column in columns)] for line, name in enumerate(names)]
    return markdown_table(["variant", *columns], rows) + "\n"


def evaluation_table(result: dict[str, Any]) -> str:
    """The table of a results.json of `thoughtbubbles evaluate`."""
    rows = [
        ScoreRow(**{**row, "stderr": math.nan if row["stderr"] is None else row["stderr"]}) for row in result["results"]
    ]
    made = result["made_with"]
    facts = (
        f"Routing {result['routing']}, trained at budget {result['own_budget']}; {result['documents']}. Commit "
        f"{made['commit']}, lm-evaluation-harness {made['lm_eval']}, torch {made['torch']}, transformers "
        f"{made['transformers']}."
    )
    table = f"{table_of(rows)}\n{facts}\n"
    if result.get("against"):
        compared = [ComparisonRow(**row) for row in result["against"]["results"]]
        # At its own budget alone; results.json has the others.
        own = [row for row in compared if row.budget == result["own_budget"]]
        table += f"\nAgainst {result['against']['model']}, document by document:\n\n{comparison_table(own)}"
    return table


if __name__ == "__main__":
    main()
