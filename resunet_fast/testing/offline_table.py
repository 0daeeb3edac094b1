"""The committed table of what the kernels compile to, and what counts as getting worse."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .machine_code import Measurement

Row = dict[str, Any]

# A different spelling of the same loop moves these by an instruction or two; more is a change.
SLACK = 1.05
LEAST = 4
UPDATE = "if it is meant, run `python -m resunet_fast.testing.offline --update` and say why"


def row(measurement: Measurement) -> Row:
    """What of a measurement is committed: numbers and kinds, no sentences."""
    entry = asdict(measurement)
    del entry["narrow_addresses"]
    entry["serialised"] = bool(measurement.serialised)
    return entry


def load(path: Path) -> tuple[str, dict[str, Row]]:
    """Return the version of Triton that made the table, and its rows by `build/sm_arch`."""
    table = json.loads(path.read_text())
    return table["triton"], table["builds"]


def save(path: Path, version: str, rows: Mapping[str, Row]) -> None:
    """Write the table, one row a line, so that a change is one line of a diff."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"    {json.dumps(key)}: {json.dumps(rows[key])}" for key in sorted(rows)]
    body = ",\n".join(lines)
    path.write_text(f'{{\n  "triton": {json.dumps(version)},\n  "builds": {{\n{body}\n  }}\n}}\n')


def worse(key: str, new: Row, old: Row) -> list[str]:
    """Return a sentence for each thing in which a build became worse than the committed row.

    Args:
        key: its name in the table.
        new: the row now.
        old: the row committed.
    """
    found = []
    for name in ("registers", "instructions", "k_step", "ldmatrix"):
        if new[name] > max(old[name] * SLACK, old[name] + LEAST):
            found.append(f"{name} rose from {old[name]} to {new[name]}")
    for name in ("spilled", "shared", "serialised"):
        if new[name] > old[name]:
            found.append(f"{name} rose from {old[name]} to {new[name]}")
    if new["matrix"] != old["matrix"] or new["from_shared"] < old["from_shared"]:
        found.append(f"matrix instructions changed from {_matrix(old)} to {_matrix(new)}")
    for name in ("loads", "stores"):
        if _share(new, name) < _share(old, name):
            found.append(
                f"{name} of 16 bytes fell from {_share(old, name):.0%} to {_share(new, name):.0%}"
            )
    for name in ("tma_loads", "tma_stores"):
        if old[name] and not new[name]:
            found.append(f"{name} were lost")
    return [f"{key}: {sentence}; {UPDATE}" for sentence in found]


def _share(entry: Row, name: str) -> float:
    return float(entry[f"{name}_16"] / entry[name]) if entry[name] else 1.0


def _matrix(entry: Row) -> str:
    kind = entry["matrix"] or "none"
    return f"{entry['matrix_count']} {kind} ({entry['from_shared']} from shared memory)"


COLUMNS = {
    "registers": "regs",
    "spilled": "spill",
    "shared": "shared",
    "instructions": "instr",
    "k_step": "k-step",
}


def render(rows: Iterable[tuple[str, Row]]) -> str:
    """Lay rows out for reading."""
    rows = list(rows)
    width = max((len(key) for key, _ in rows), default=5)
    header = ["build".ljust(width), *(title.rjust(7) for title in COLUMNS.values())]
    lines = ["  ".join([*header, "matrix".ljust(24), "TMA ld/st", "16-byte ld/st"])]
    for key, entry in rows:
        numbers = [str(entry[name]).rjust(7) for name in COLUMNS]
        kind = f"{entry['matrix_count']} {entry['matrix']}" if entry["matrix"] else "-"
        if entry["from_shared"]:
            kind += f", {entry['from_shared']} shared"
        tma = f"{entry['tma_loads']}/{entry['tma_stores']}".rjust(9)
        wide = f"{_share(entry, 'loads'):.0%}/{_share(entry, 'stores'):.0%}".rjust(13)
        lines.append("  ".join([key.ljust(width), *numbers, kind.ljust(24), tma, wide]))
    return "\n".join(lines)
