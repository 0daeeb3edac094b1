"""Measured choices, one committed JSON file per architecture, written by `python -m bench tune`.

`sm_<major><minor>.json` beside this module, such as sm_90.json:

    {
      "architecture": "sm_90",
      "gpu": "NVIDIA H200",              name that torch reports
      "date": "2026-12-01",
      "commit": "0123456789ab",          of this project
      "versions": {"torch": "...", "triton": "...", "cuda": "...", "cudnn": "..."},
      "measurements": [
        {
          "operator": "conv2d",          or conv2d_backward, conv_bias_act, conv_bn_act, bn_act_conv
          "channels": 64,                of all sources together
          "filters": 64,
          "kernel": [3, 3],
          "stride": [1, 1],
          "positions": 4194304,          images * height * width of the result
          "dtype": "bfloat16",
          "microseconds": {"cudnn": 812.0, "triton": 640.0},     medians, channels_last operands
          "config": {"family": "tma", "filters": 64, "rows": 16, "columns": 16, "channels": 64,
                     "warps": 4, "stages": 2}                    Triton's best, or null
        }
      ]
    }

The data gradient of a convolution from C to K channels is a convolution of its own: an entry of
conv2d_backward has "channels": K and "filters": C. A measurement speaks for every number of
positions that rounds to the same power of two, and for nothing else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .config import ConvConfig, ConvProblem

_FOLDER = Path(__file__).parent

Key = tuple[str, int, int, tuple[int, ...], tuple[int, ...], int, str]


@dataclass(frozen=True)
class Measurement:
    """Median times of the implementations of one shape class, and Triton's best tiles."""

    microseconds: Mapping[str, float]
    config: ConvConfig | None

    @property
    def fastest(self) -> str:
        """Name of the implementation with the least time."""
        return min(self.microseconds, key=lambda name: self.microseconds[name])


@dataclass(frozen=True)
class Table:
    """What was measured on one architecture, and where and when (empty: nothing was)."""

    origin: Mapping[str, Any]
    measurements: Mapping[Key, Measurement]


def parse(content: Mapping[str, Any]) -> Table:
    """Build a table from the JSON of its file.

    Raises:
        KeyError: a field is missing.
        ValueError: a measurement without times.
    """
    measurements = {}
    for line in content["measurements"]:
        if not line["microseconds"]:
            raise ValueError(f"microseconds: expected at least one time, got {line}")
        config = None if line["config"] is None else ConvConfig(**line["config"])
        measurements[_key_of_line(line)] = Measurement(dict(line["microseconds"]), config)
    origin = {name: content[name] for name in ("gpu", "date", "commit", "versions")}
    return Table(origin, measurements)


@cache
def load(architecture: str) -> Table:
    """Read the committed table of an architecture, such as "sm_90"; without one it is empty."""
    path = _FOLDER / f"{architecture}.json"
    if not path.exists():
        return Table({}, {})
    return parse(json.loads(path.read_text(encoding="utf-8")))


def lookup(problem: ConvProblem, capability: tuple[int, int] | None) -> Measurement | None:
    """Return what was measured for a problem's shape class on a GPU, if anything was.

    Args:
        problem: the convolution.
        capability: the GPU's, such as (9, 0); None without one.
    """
    if capability is None:
        return None
    measurements = load(f"sm_{capability[0]}{capability[1]}").measurements
    return measurements.get(_key(problem)) if measurements else None


def _key(problem: ConvProblem) -> Key:
    positions = problem.images * problem.height * problem.width
    shape = (problem.channels, problem.filters, problem.kernel, problem.stride)
    return (problem.operator, *shape, _magnitude(positions), problem.dtype)


def _key_of_line(line: Mapping[str, Any]) -> Key:
    shape = (line["channels"], line["filters"], tuple(line["kernel"]), tuple(line["stride"]))
    return (line["operator"], *shape, _magnitude(line["positions"]), line["dtype"])


def _magnitude(positions: int) -> int:
    return round(math.log2(max(positions, 1)))
