"""Few rows in which every pair of values of every two axes occurs, and the spelling of a row."""

from __future__ import annotations

import itertools
from typing import Any

Row = dict[str, Any]
Setting = tuple[str, Any]


def pairs(row: Row) -> set[tuple[Setting, Setting]]:
    return set(itertools.combinations(row.items(), 2))


def every_pair(axes: dict[str, tuple[Any, ...]]) -> set[tuple[Setting, Setting]]:
    settings = [[(name, value) for value in values] for name, values in axes.items()]
    return {
        pair
        for one, other in itertools.combinations(settings, 2)
        for pair in itertools.product(one, other)
    }


def rows(axes: dict[str, tuple[Any, ...]]) -> list[Row]:
    """Greedy and deterministic: start from a missing pair, then take what covers most.

    Args:
        axes: the values of each axis.
    """
    missing = dict.fromkeys(sorted(every_pair(axes), key=repr))
    result: list[Row] = []
    while missing:
        row: Row = dict(next(iter(missing)))
        for name, values in axes.items():
            if name not in row:
                row[name] = max(values, key=lambda value: _gain(row, name, value, axes, missing))
        row = {name: row[name] for name in axes}
        result.append(row)
        for pair in pairs(row):
            missing.pop(pair, None)
    return result


def _gain(row: Row, name: str, value: Any, axes: Row, missing: Row) -> int:
    complete = {other: row[other] for other in axes if other in row} | {name: value}
    ordered = {other: complete[other] for other in axes if other in complete}
    return sum(pair in missing for pair in pairs(ordered))


def spell(row: Row) -> str:
    """The switches that are on, and the chosen values."""
    return "-".join(
        name if value is True else str(value)
        for name, value in row.items()
        if value is not False and value is not None
    )
