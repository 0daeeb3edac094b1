"""docs/performance.md's block of the GPU, from the records of `make gpu`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from . import launch, plots
from .facts import sentence
from .gpu.job import BAD, Record
from .table import markdown, mebibytes, milliseconds, roofline

NOT_YET = (
    "Not yet run on a GPU. `make gpu PART=check` compares every implementation with float64 there,"
    " `PART=sanitize` runs compute-sanitizer, `PART=shapes` and `PART=nets` measure; `python -m"
    " bench report` then puts the tables here, `python -m bench tune` the choices into"
    " resunet_fast/tuning."
)
TITLES = {
    "check": "Correctness",
    "sanitize": "compute-sanitizer",
    "shapes": "Convolutions and the bn_act family per shape",
    "nets": "Whole networks, N=16, 512x512, bfloat16",
}


def load(path: Path) -> list[Record]:
    """The records of one part that ran on a GPU; none where it did not."""
    if not path.exists():
        return []
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return records if records and records[0]["machine"]["gpu"] else []


def text(folder: Path, docs: Path) -> str:
    """All parts that there are, or that there is none."""
    found = {part: load(folder / f"{part}.jsonl") for part in TITLES}
    if not any(found.values()):
        return NOT_YET
    blocks = []
    for part, records in found.items():
        if not records:
            blocks.append(f"### {TITLES[part]}\n\nNot yet run on a GPU: `make gpu PART={part}`.")
            continue
        body = {"shapes": shapes, "nets": nets}.get(part, verdicts)(records)
        source = f"{sentence(records[0])}; `{(folder / part).as_posix()}.jsonl`."
        blocks.append(f"### {TITLES[part]}\n\n{body}\n\n{source}")
    drawn = plots.draw_gpu(found["shapes"], found["nets"], docs)
    blocks += [f"![{title}]({name})" for name, title in drawn.items()]
    return "\n\n".join(blocks)


def networks(folder: Path) -> list[str]:
    """README's table of a GPU and where it comes from; empty where none was measured."""
    records = load(folder / "nets.jsonl")
    if not records:
        return []
    return [nets(records), f"{sentence(records[0])}; `{(folder / 'nets.jsonl').as_posix()}`."]


def verdicts(records: list[Record]) -> str:
    """How many jobs ended how, and the sentence of every one that did not end well."""
    counts: dict[str, int] = {}
    for record in records[1:]:
        counts[record["status"]] = counts.get(record["status"], 0) + 1
    lines = [", ".join(f"{count} {status}" for status, count in sorted(counts.items())) + "."]
    for record in records[1:]:
        if record["status"] in BAD or (record.get("note") and record["status"] == "UNAVAILABLE"):
            lines.append(f"- {record['status']}: {record['job']}: {record.get('note', '')}")
    return "\n".join(lines)


def shapes(records: list[Record]) -> str:
    """One line per shape and operation, one column per implementation with its fastest tiles."""
    rows = [r for r in records if "rows" in r]
    names = list(dict.fromkeys(_column(row) for r in rows for row in r["rows"]))
    cells = [["", *names]]
    for record in rows:
        fastest: dict[str, Record] = {}
        for row in record["rows"]:
            name = _column(row)
            if "ms" in row and _median(row) < _median(fastest.get(name)):
                fastest[name] = row
        cells.append([record["job"], *(_cell(fastest.get(name)) for name in names)])
    rates = [
        f"Measured in this run: copy {c['bytes_per_second'] / 1e12:.2f} TB/s, matrix product"
        f" {c['flops_per_second'] / 1e12:.0f} TFLOP/s."
        for c in (r["ceilings"] for r in records if "ceilings" in r)
    ]
    calls = [markdown(launch.cells(r["launch"])) for r in records if "launch" in r]
    return "\n\n".join([*rates, markdown(cells), *calls])


def _column(row: Record) -> str:
    name = str(row["implementation"])
    return "triton" if name.startswith("triton") else name


def _median(row: Record | None) -> float:
    return float("inf") if row is None else float(row["ms"]["median"])


def _cell(row: Record | None) -> str:
    if row is None:
        return ""
    return f"{row['ms']['median']:.3f} ms, {roofline(row)}"


def nets(records: list[Record]) -> str:
    """Time, ratios over eager and over the strongest torch.compile, memory; then the breakdown."""
    measured = [r for r in records if "variants" in r and "ms" in _own(r)]
    cells = [["", "time", "over eager", "over torch.compile", "allocated", "of the roofline"]]
    for record in measured:
        own = _own(record)
        eager = next(v for n, v in record["variants"].items() if n.startswith("eager"))
        strongest = min(
            (
                _own(r)["ms"]["median"]
                for r in measured
                if r["phase"] == record["phase"] and r["variant"].startswith("torch.compile")
            ),
            default=None,
        )
        median = own["ms"]["median"]
        cells.append(
            [
                f"{record['phase']}: {record['variant']}",
                milliseconds(own["ms"]),
                f"{eager['ms']['median'] / median:.2f}x",
                "" if strongest is None else f"{strongest / median:.2f}x",
                mebibytes(own.get("peak", {}).get("allocated")),
                roofline(own),
            ]
        )
    return "\n\n".join([markdown(cells), breakdowns(records)]).strip()


def _own(record: Record) -> dict[str, Any]:
    row: dict[str, Any] = record["variants"].get(record["variant"], {})
    return row


def breakdowns(records: list[Record]) -> str:
    """The training step by kernel class, one column per variant."""
    found = {r["variant"]: r["classes_ms"] for r in records if "classes_ms" in r}
    return class_table(found) if found else ""


def class_table(found: dict[str, dict[str, float]]) -> str:
    labels = list(dict.fromkeys(label for classes in found.values() for label in classes))
    cells = [["training step, ms by kernel class", *found]]
    for label in labels:
        cells.append([label, *(f"{classes.get(label, 0.0):.2f}" for classes in found.values())])
    return markdown(cells)
