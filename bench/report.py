"""`python -m bench report`: results to README's speed table and docs/performance.md, with plots.

Each file says where: a block between `<!-- begin NAME -->` and `<!-- end NAME -->` is replaced, all
else is left alone. Every number comes from a results file and stands next to its machine, versions
and commit; blocks without results are left as they are.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import gpu_report, launch, plots, predictions
from .facts import sentence
from .networks import INFERENCE, TRAINING
from .table import markdown, mebibytes, milliseconds, roofline, times

Results = dict[str, Any]
# The variant whose ratios README shows; docs/performance.md shows all.
HEADLINES = {TRAINING: "fast channels_last", INFERENCE: "freeze"}


def provenance(results: Results, path: Path) -> str:
    made = "median with 20th and 80th percentile of interleaved rounds"
    return f"{sentence(results)}; {made}; `{path.as_posix()}`, made by `make bench`."


def network_tables(results: Results, phase: str, ours: str = "") -> str:
    """One table of all variants in both precisions, one of ours against the peers.

    Args:
        results, phase: what is shown.
        ours: the one variant of ours whose ratios are shown; empty: all.
    """
    sections: dict[str, Results] = results[phase]
    names = list(dict.fromkeys(n for s in sections.values() for n in s["variants"]))
    keeps = phase == TRAINING
    some = next(iter(sections.values()))["setting"]
    what = f"{phase}, {some['batch']}x3x{some['size']}x{some['size']}, width {some['width']}"
    head = [what]
    for precision in sections:
        head += [precision, "of the roofline", *(["kept"] if keeps else [])]
    rows = [head]
    for name in names:
        row = [name]
        for section in sections.values():
            row += _cells(section["variants"].get(name), keeps)
        rows.append(row)
    parts = [markdown(rows), ratio_table(sections, ours), _notes(sections)]
    return "\n\n".join(part for part in parts if part)


def _cells(row: Results | None, keeps: bool) -> list[str]:
    if row is None:
        return [""] * (3 if keeps else 2)
    kept = [mebibytes(row["kept_for_backward_bytes"])] if keeps else []
    if row["wrong"]:
        return ["WRONG, not timed", "", *kept]
    return [milliseconds(row["ms"]), roofline(row), *kept]


def ratio_table(sections: dict[str, Results], only: str = "") -> str:
    """Ours, or one of them, against each peer, round by round."""
    pairs = dict.fromkeys(
        (ours, peer)
        for section in sections.values()
        for ours, ratios in section["ratios"].items()
        for peer in ratios
        if only in ("", ours)
    )
    rows = [["ratio, round by round", *sections]]
    for ours, peer in pairs:
        found = [section["ratios"].get(ours, {}).get(peer) for section in sections.values()]
        rows.append([f"{ours} / {peer}", *("" if r is None else times(r) for r in found)])
    return markdown(rows) if pairs else ""


def _notes(sections: dict[str, Results]) -> str:
    lines = []
    for precision, section in sections.items():
        rows = section["variants"].items()
        lines += [f"{name} ({precision}): {row['note']}." for name, row in rows if row["note"]]
        if section["setting"]["phase"] == INFERENCE:
            first = [f"{name} {row['first_call_seconds']:.2f} s" for name, row in rows]
            lines.append(f"First call ({precision}): {', '.join(first)}.")
        missing = section["missing"].items()
        lines += [f"Missing: {name} ({precision}): {why}." for name, why in missing]
    return "\n".join(f"- {line}" for line in lines)


def operator_table(results: Results) -> str:
    rows = [["operator", "time", "of the roofline"]]
    rows += [
        [name, milliseconds(row["ms"]), roofline(row)] for name, row in results["operators"].items()
    ]
    return markdown(rows)


def ceilings_line(results: Results) -> str:
    parts = [
        f"{precision}: copy {c['bytes_per_second'] / 1e9:,.1f} GB/s,"
        f" matrix product {c['flops_per_second'] / 1e9:,.0f} GFLOP/s"
        for precision, c in results["ceilings"].items()
    ]
    return "Ceilings measured in the same run: " + "; ".join(parts) + "."


def speed(results: Results, path: Path, gpu: Path) -> str:
    """README's block: training and inference, with what was measured where."""
    tables = [network_tables(results, p, HEADLINES[p]) for p in HEADLINES if p in results]
    return "\n\n".join(
        [*tables, imports(results), provenance(results, path), *gpu_report.networks(gpu)]
    )


def details(results: Results, path: Path, docs: Path) -> str:
    """docs/performance.md's block of the CPU."""
    parts = [ceilings_line(results)]
    parts += [network_tables(results, p) for p in (TRAINING, INFERENCE) if p in results]
    if results.get("operators"):
        parts.append(operator_table(results))
    if results.get("launch"):
        parts.append(markdown(launch.cells(results["launch"])))
    if results.get("classes_ms"):
        parts.append(gpu_report.class_table(results["classes_ms"]))
    found = plots.draw_cpu(results, docs)
    parts += [f"![{title}]({name})" for name, title in found.items()]
    return "\n\n".join([*parts, imports(results), provenance(results, path)])


def imports(results: Results) -> str:
    beyond = results["import_seconds"]["resunet_fast"]
    return f"`import resunet_fast` takes {beyond:.2f} s beyond torch's own."


def replace_block(path: Path, name: str, content: str) -> None:
    """Replace what stands between a file's two marks of a block.

    Raises:
        ValueError: the file does not have the two marks.
    """
    text = path.read_text(encoding="utf-8")
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"{path}: expected the marks '{begin}' and '{end}'")
    block = f"{begin}\n{content.strip()}\n{end}"
    path.write_text(pattern.sub(lambda _: block, text, count=1), encoding="utf-8")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, default=Path("bench/results/cpu.json"))
    parser.add_argument("--gpu", type=Path, default=Path("bench/results/gpu"))
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument("--docs", type=Path, default=Path("docs/performance.md"))


def main(options: argparse.Namespace) -> int:
    blocks: list[tuple[Path, str, Callable[[], str]]] = [
        (options.docs, "predictions", predictions.text),
        (options.docs, "gpu", lambda: gpu_report.text(options.gpu, options.docs.parent)),
    ]
    if options.results.exists():
        results = json.loads(options.results.read_text(encoding="utf-8"))
        blocks += [
            (options.readme, "speed", lambda: speed(results, options.results, options.gpu)),
            (options.docs, "cpu", lambda: details(results, options.results, options.docs.parent)),
        ]
    else:
        print(f"no {options.results}: the CPU's blocks stay as they are; `make bench` writes it")
    for path, name, make in blocks:
        try:
            replace_block(path, name, make())
        except ValueError as error:
            print(error)
            return 2
        print(f"{path}: {name}")
    return 0
