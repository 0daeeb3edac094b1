"""Segment a large image in overlapping tiles, a row of tiles at a time.

Tiles start at multiples of the network's coarsest cell, so that its pooling sees the same cells as
in the whole image, and the last one of a row ends with the image. Where tiles overlap, their
results are averaged with weights that fall linearly towards each tile's edge and add up to one;
where only one tile lies, its result is taken as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from .models import Wiring

Plane = NDArray[np.float32]
# [N windows] of equal size, as (rows, columns), to one plane of results each.
Solve = Callable[[Sequence[tuple[slice, slice]]], Sequence[Plane]]


@dataclass(frozen=True)
class Span:
    """One tile along one axis.

    Args:
        start, stop: its pixels.
        weight: [stop - start], its share of the result at each of them.
    """

    start: int
    stop: int
    weight: Plane

    @property
    def pixels(self) -> slice:
        """The pixels as an index."""
        return slice(self.start, self.stop)


def cell_size(network: object) -> int:
    """Return the size of the coarsest level's pixel in pixels of the image (1 if unknown)."""
    return 1 << (len(network.widths) - 1) if isinstance(network, Wiring) else 1


def receptive_radius(network: Wiring) -> int:
    """Return how far from a pixel of the result, at most, lie the pixels that it depends on.

    On level l a pixel is 2**l wide. Two 3x3 convolutions reach 2 pixels far, a 2x2 pooling or its
    inverse 1, bilinear interpolation another 2 (a neighbour on the coarser level). With
    align_corners=True, interpolation also depends on the image's size, which this cannot include.

    Args:
        network: any of this library's, in evaluation mode.
    """
    deepest = cell_size(network)
    below = deepest - 1  # the sum of 2**l over all levels but the last
    convolutions = 2 * (below + deepest) + 2 * below
    if network.res_blocks:
        convolutions += 2 * below
    enlarging = 3 if network.upsample == "bilinear" else 1
    return convolutions + below + enlarging * below


def spans(size: int, tile: int, overlap: int, cell: int) -> list[Span]:
    """Cover an axis with tiles whose weights add up to one at every pixel.

    Args:
        size: pixels of the axis.
        tile: pixels of a tile, a multiple of `cell` and at least twice as much.
        overlap: least number of pixels that neighbours share, at most `tile - cell`.
        cell: every tile starts at a multiple of it.
    """
    if size <= tile:
        return [Span(0, size, np.ones(size, dtype=np.float32))]
    step = (tile - overlap) // cell * cell
    last = -(-(size - tile) // cell) * cell
    starts = [*range(0, last, step), last]
    bounds = [(start, min(start + tile, size)) for start in starts]
    raw = [_trapezoid(start, stop, size, max(overlap, 1)) for start, stop in bounds]
    total = np.zeros(size)
    for (start, stop), weight in zip(bounds, raw, strict=True):
        total[start:stop] += weight
    return [
        Span(start, stop, (weight / total[start:stop]).astype(np.float32))
        for (start, stop), weight in zip(bounds, raw, strict=True)
    ]


def _trapezoid(start: int, stop: int, size: int, ramp: int) -> NDArray[np.float64]:
    """1 inside, falling over `ramp` pixels towards the ends, but not at the image's borders."""
    position = np.arange(start, stop) + 0.5
    left = np.ones(stop - start) if start == 0 else (position - start) / ramp
    right = np.ones(stop - start) if stop == size else (stop - position) / ramp
    weight: NDArray[np.float64] = np.minimum(1.0, np.minimum(left, right))
    return weight


def bands(
    solve: Solve, height: int, width: int, *, tile: int, overlap: int, cell: int, batch: int
) -> Iterator[tuple[int, Plane]]:
    """Yield the finished rows of the result from top to bottom; no more than a tile's are kept.

    Args:
        solve: computes the results of some windows of equal size.
        height, width: of the image.
        tile, overlap, cell: see :func:`spans`.
        batch: windows per call of `solve`, at most.

    Returns:
        Pairs of the first row and [rows, width] float32.
    """
    rows, columns = (spans(size, tile, overlap, cell) for size in (height, width))
    following = [row.start for row in rows[1:]] + [height]
    pending = np.zeros((0, width), dtype=np.float32)
    for row, done in zip(rows, following, strict=True):
        fresh = row.stop - row.start - len(pending)
        pending = np.concatenate([pending, np.zeros((fresh, width), dtype=np.float32)])
        for group in _batches(columns, batch):
            results = solve([(row.pixels, column.pixels) for column in group])
            for column, result in zip(group, results, strict=True):
                pending[:, column.pixels] += result * row.weight[:, None] * column.weight
        yield row.start, pending[: done - row.start]
        pending = pending[done - row.start :]


def _batches(columns: Sequence[Span], batch: int) -> Iterator[list[Span]]:
    """Neighbours of equal width, at most `batch` at a time."""
    for _, same in groupby(columns, key=lambda span: span.stop - span.start):
        group = list(same)
        yield from (group[i : i + batch] for i in range(0, len(group), batch))
