"""`python -m bench compare OLD NEW`: ratios with their spread, and what got slower beyond noise."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import table

# Beyond noise: the medians differ by more than this, and the middle parts do not overlap.
SLOWER = 1.03


def timings(results: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row with a time, by its place in the file; the ratios within a file are left out."""
    if isinstance(results, list):  # the ways to compute one shape, in a GPU's records
        results = {row["implementation"]: row for row in results if "implementation" in row}
    if not isinstance(results, dict):
        return
    if isinstance(results.get("ms"), dict):
        yield " / ".join(part for part in path if part not in ("variants", "rows")), results["ms"]
        return
    for name, value in results.items():
        if name != "ratios":
            yield from timings(value, (*path, name))


def compare(old: dict[str, Any], new: dict[str, Any]) -> tuple[str, list[str]]:
    """Return the table and the names of the rows that got slower beyond noise.

    A ratio is old over new: above 1 the new one is faster. Its spread takes the ends of both: the
    20th percentile of one against the 80th of the other.
    """
    before, after = dict(timings(old)), dict(timings(new))
    cells = [["row", "old", "new", "old / new", ""]]
    slower = []
    for name in before.keys() & after.keys():
        a, b = before[name], after[name]
        ratio = {
            "median": a["median"] / b["median"],
            "p20": a["p20"] / b["p80"],
            "p80": a["p80"] / b["p20"],
        }
        beyond = b["p20"] > a["p80"] and b["median"] > SLOWER * a["median"]
        slower += [name] * beyond
        mark = "SLOWER" if beyond else ""
        cells.append([name, table.milliseconds(a), table.milliseconds(b), table.times(ratio), mark])
    cells[1:] = sorted(cells[1:])
    lines = [table.columns(cells)]
    lines += [f"only in the old file: {name}" for name in sorted(before.keys() - after.keys())]
    lines += [f"only in the new file: {name}" for name in sorted(after.keys() - before.keys())]
    return "\n".join(lines), sorted(slower)


def load(path: Path) -> dict[str, Any]:
    """Read a results file: an object, or JSON lines of one GPU part."""
    content = path.read_text(encoding="utf-8")
    if path.suffix != ".jsonl":
        results: dict[str, Any] = json.loads(content)
        return results
    return {record["job"]: record for record in map(json.loads, content.splitlines())}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)


def main(options: argparse.Namespace) -> int:
    lines, slower = compare(load(options.old), load(options.new))
    print(lines)
    for name in slower:
        print(f"slower beyond noise: {name}")
    return 1 if slower else 0
