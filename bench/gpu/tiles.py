"""Tiles of the Triton convolution that are tried beside its heuristic's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from resunet_fast.tuning import ConvConfig, Table, table

from .job import Record
from .measure import Results

if TYPE_CHECKING:
    from .convolutions import Operands

# By whether the result has 128 filters or more; compiled for sm_90 they fit its shared memory and
# do not spill (tests/tile_builds.py).
NARROW = (
    ConvConfig("tma", 64, 16, 16, 64, warps=4, stages=2),
    ConvConfig("tma", 64, 16, 16, 64, warps=4, stages=3),
    ConvConfig("tma", 64, 8, 16, 64, warps=4, stages=4),
)
WIDE = (
    ConvConfig("tma", 128, 16, 16, 64, warps=8, stages=3),
    ConvConfig("tma", 128, 16, 16, 64, warps=8, stages=4),
    ConvConfig("tma", 128, 8, 16, 64, warps=4, stages=3),
    ConvConfig("tma", 128, 8, 16, 64, warps=8, stages=4),
)
POINTER = (ConvConfig("pointer", 64, 1, 128, 32, warps=4, stages=3),)


def alternatives(filters: int, channels: int, operation: str) -> tuple[ConvConfig, ...]:
    """Configurations worth a try; none for the weight gradient, whose tiles are its own."""
    if operation == "wgrad":
        return ()
    if operation == "dgrad":
        filters, channels = channels, filters
    if channels % 8:
        return POINTER
    return WIDE if filters >= 128 else NARROW


def label(config: ConvConfig) -> str:
    tile = f"{config.filters}x{config.rows}x{config.columns}x{config.channels}"
    return f"{config.family} {tile} w{config.warps} s{config.stages}"


def trying(
    call: Callable[[], Results], operator: str, o: Operands, config: ConvConfig
) -> Callable[[], Results]:
    """The same call while the architecture's table names this configuration for its shape."""
    n, filters, h, w = o.g.shape
    channels = o.x.shape[1]
    if operator == "conv2d_backward":
        filters, channels = channels, filters
    line: Record = {
        "operator": operator,
        "channels": channels,
        "filters": filters,
        "kernel": list(o.w.shape[2:]),
        "stride": [1, 1],
        "positions": n * h * w,
        "dtype": str(o.x.dtype)[6:],
        "microseconds": {"triton": 1.0},
        "config": vars(config),
    }

    def tried() -> Results:
        with _table([line]):
            return call()

    return tried


@contextmanager
def _table(lines: list[dict[str, Any]]) -> Iterator[None]:
    """Let the package read these measurements instead of the committed ones."""
    origin = {"gpu": torch.cuda.get_device_name(), "date": "", "commit": "", "versions": {}}
    trial: Table = table.parse({**origin, "measurements": lines})
    committed = table.load
    table.load = lambda _: trial  # type: ignore[assignment]
    try:
        yield
    finally:
        table.load = committed
