"""Readable tables: for a terminal, and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Align rows of cells: the first column to the left, the others to the right."""
    if not rows:
        return ""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table for a document; the first row is its head."""
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def milliseconds(timing: dict[str, Any]) -> str:
    """A median with its 20th and 80th percentile, at three digits."""
    digits = 0 if timing["median"] >= 100 else 1 if timing["median"] >= 10 else 3
    median, low, high = (f"{timing[key]:,.{digits}f}" for key in ("median", "p20", "p80"))
    return f"{median} ms [{low}, {high}]"


def times(timing: dict[str, Any]) -> str:
    """A ratio with its 20th and 80th percentile."""
    return f"{timing['median']:.2f}x [{timing['p20']:.2f}, {timing['p80']:.2f}]"


def mebibytes(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:,.0f} MiB"


def roofline(row: dict[str, Any]) -> str:
    return f"{row['roofline_percent']:.0f}% ({row['binds']})"
