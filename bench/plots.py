"""The pictures of docs/performance.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .gpu.job import Record
from .networks import INFERENCE, TRAINING

OURS, PEERS = "#0072b2", "#999999"


def _figure(width: float, height: float) -> tuple[Any, Any]:
    import matplotlib as mpl

    mpl.use("Agg")
    # The same bytes for the same numbers, and text that can be read in a diff.
    mpl.rcParams.update({"svg.hashsalt": "resunet_fast", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(width, height), layout="constrained")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    # Without the blanks that matplotlib leaves at line ends.
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(line.rstrip() for line in lines) + "\n", encoding="utf-8")


def bars(
    path: Path, title: str, unit: str, rows: dict[str, tuple[float, float, float, bool]]
) -> None:
    """Horizontal bars.

    Args:
        path: of the SVG.
        title, unit: what is shown.
        rows: value, lower and upper end of its spread, and whether it is ours, by name.
    """
    figure, axes = _figure(7, 0.6 + 0.28 * len(rows))
    names = list(rows)[::-1]
    values = [rows[name][0] for name in names]
    low = [rows[name][0] - rows[name][1] for name in names]
    high = [rows[name][2] - rows[name][0] for name in names]
    colours = [OURS if rows[name][3] else PEERS for name in names]
    axes.barh(names, values, xerr=[low, high], color=colours, ecolor="#333333", capsize=2)
    axes.set_xlabel(unit)
    axes.set_title(title, loc="left")
    _save(figure, path)


def network_times(section: dict[str, Any], path: Path, title: str) -> None:
    rows = {
        name: (row["ms"]["median"], row["ms"]["p20"], row["ms"]["p80"], row["ours"])
        for name, row in section["variants"].items()
        if "ms" in row
    }
    bars(path, title, "ms (20th to 80th percentile)", rows)


def kept_memory(section: dict[str, Any], path: Path, title: str) -> None:
    rows = {}
    for name, row in section["variants"].items():
        kept = row["kept_for_backward_bytes"]
        if kept:
            rows[name] = (kept / 2**20, kept / 2**20, kept / 2**20, row["ours"])
    bars(path, title, "MiB kept for backward", rows)


def roofline_plot(rows: list[tuple[str, float, bool]], path: Path, title: str) -> None:
    """Percentages of the roofline, one bar per row."""
    bars(path, title, "% of the roofline", {name: (p, p, p, ours) for name, p, ours in rows})


def class_bars(found: dict[str, dict[str, float]], path: Path, title: str) -> None:
    """One stacked bar per variant."""
    figure, axes = _figure(7, 1.2 + 0.4 * len(found))
    labels = list(dict.fromkeys(label for classes in found.values() for label in classes))
    left = [0.0] * len(found)
    for i, label in enumerate(labels):
        values = [classes.get(label, 0.0) for classes in found.values()]
        axes.barh(list(found), values, left=left, label=label, color=f"C{i}")
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.set_xlabel("ms")
    axes.set_title(title, loc="left")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.3), ncols=4, frameon=False, fontsize=7)
    _save(figure, path)


def draw_cpu(results: dict[str, Any], docs: Path) -> dict[str, str]:
    """Draw what a CPU's results hold; file name to title."""
    drawn = {}
    for phase in (TRAINING, INFERENCE):
        for precision, section in results.get(phase, {}).items():
            name, title = f"{phase}_{precision}_cpu.svg", f"{phase}, {precision}, CPU"
            network_times(section, docs / name, title)
            drawn[name] = title
            if phase == TRAINING:
                name, title = f"memory_{precision}_cpu.svg", f"kept for backward, {precision}, CPU"
                kept_memory(section, docs / name, title)
                drawn[name] = title
    if results.get("operators"):
        rows = [
            (name, row["roofline_percent"], row["backend"] != "reference")
            for name, row in results["operators"].items()
        ]
        title = "operators against the roofline, CPU"
        roofline_plot(rows, docs / "operators_cpu.svg", title)
        drawn["operators_cpu.svg"] = title
    if results.get("classes_ms"):
        title = "training step by kernel class, bf16, CPU"
        class_bars(results["classes_ms"], docs / "classes_cpu.svg", title)
        drawn["classes_cpu.svg"] = title
    return drawn


def draw_gpu(shapes: list[Record], nets: list[Record], docs: Path) -> dict[str, str]:
    """Draw what a GPU's records hold; file name to title."""
    drawn = {}
    rows = [
        (f"{r['job']} {row['implementation']}", row["roofline_percent"], _ours(row))
        for r in shapes
        for row in r.get("rows", [])
        if "ms" in row and r.get("operation") in ("fprop", "dgrad", "wgrad")
    ]
    if rows:
        drawn["convolutions_gpu.svg"] = title = "convolutions against the roofline, GPU"
        roofline_plot(rows, docs / "convolutions_gpu.svg", title)
    for phase in (TRAINING, INFERENCE):
        found = {r["variant"]: r["variants"][r["variant"]] for r in nets if r.get("phase") == phase}
        if found:
            name, title = f"{phase}_gpu.svg", f"{phase}, bf16, GPU"
            network_times({"variants": found}, docs / name, title)
            drawn[name] = title
            peaks = {
                n: (row["peak"]["allocated"] / 2**20,) * 3 + (row["ours"],)
                for n, row in found.items()
                if "peak" in row
            }
            name, title = f"memory_{phase}_gpu.svg", f"peak memory, {phase}, bf16, GPU"
            bars(docs / name, title, "MiB allocated", peaks)
            drawn[name] = title
    classes = {r["variant"]: r["classes_ms"] for r in nets if "classes_ms" in r}
    if classes:
        drawn["classes_gpu.svg"] = title = "training step by kernel class, bf16, GPU"
        class_bars(classes, docs / "classes_gpu.svg", title)
    return drawn


def _ours(row: Record) -> bool:
    return str(row["implementation"]).split(" ")[0] in ("cuda", "triton")
