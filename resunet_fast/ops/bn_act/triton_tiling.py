"""How an image is cut into the programs of a Triton kernel: pure arithmetic, no Triton.

Memory is a number of runs, each `positions` by `channels`: one run of all pixels in channels_last,
one run per image otherwise. A program owns a block of channels and a span of `steps` blocks of
positions of one run. With pooling a position is a 2x2 window, and runs are images in both layouts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ... import environment


@dataclass(frozen=True)
class Blocks:
    """Sizes of what a program holds and how many programs there are.

    Args:
        elements: of a block, positions times channels.
        channels: most channels of a block in channels_last.
        programs: number of them from which on a program takes several blocks.
        steps: most blocks of one program.
        num_warps: of a program.
    """

    elements: int = 2048
    channels: int = 128
    programs: int = 1024
    steps: int = 1 << 30
    num_warps: int = 4


# An H200 has 132 multiprocessors, and eight programs of four warps fit on each. Reductions make
# about one wave of them, because a second stage reads what each leaves behind. Sweeps make several,
# and take a few blocks each because every program reads the channels' vectors first.
REDUCTION = Blocks()
SWEEP = Blocks(programs=4096, steps=8)
# Four cells per position: the same registers, 16 bytes per thread and cell in 16-bit dtypes.
WINDOW_REDUCTION = Blocks(elements=512, programs=768, num_warps=2)
WINDOW_SWEEP = Blocks(elements=1024, programs=4096, steps=4)
# The interpreter takes as long for any program, whatever it holds.
INTERPRETED = Blocks(elements=1 << 18, channels=1024)


def blocks_for(*, reduces: bool, pool: bool) -> Blocks:
    """The blocks of a kernel over an image, by whether it reduces and whether it pools."""
    if environment.triton_interpreted():
        return INTERPRETED
    if pool:
        return WINDOW_REDUCTION if reduces else WINDOW_SWEEP
    return REDUCTION if reduces else SWEEP


@dataclass(frozen=True)
class Extent:
    """The runs of an image.

    Args:
        runs: how many there are.
        positions: of a run, pixels or windows.
        pixels: of a run.
        channels: of the image.
        channels_last: whether the channels of a pixel lie side by side, else the pixels of a
            channel.
    """

    runs: int
    positions: int
    pixels: int
    channels: int
    channels_last: bool

    @property
    def unit(self) -> int:
        """Greatest divisor up to 16 of the innermost size: how wide an access may be."""
        return math.gcd(self.channels if self.channels_last else self.pixels, 16)


def extent_of(x: Tensor, layout: torch.memory_format, pool: bool) -> Extent:
    """Describe a tensor that is dense in `layout`."""
    n, c, h, w = x.shape
    # One pixel per image: both layouts are the same memory, and channels make the longer rows.
    last = layout == torch.channels_last or h * w == 1
    if pool:
        return Extent(n, -(-h // 2) * -(-w // 2), h * w, c, last)
    if last or c == 1:
        return Extent(1, n * h * w, n * h * w, c, last)
    return Extent(n, h * w, h * w, c, last)


@dataclass(frozen=True)
class Tiling:
    """What :func:`tiling` decides.

    Args:
        block_p, block_c: positions and channels of a block, powers of two.
        steps: blocks of a span.
        spans: of a run.
        tiles: spans of all runs.
        programs: tiles times blocks of channels.
        num_warps: of a program.
    """

    block_p: int
    block_c: int
    steps: int
    spans: int
    tiles: int
    programs: int
    num_warps: int


def tiling(extent: Extent, blocks: Blocks) -> Tiling:
    """Cut `extent` into programs."""
    if extent.channels_last:
        block_c = channel_block(extent.channels, blocks.channels)
        block_p = min(power_of_two(extent.positions), max(blocks.elements // block_c, 1))
    else:
        block_p = min(power_of_two(extent.positions), blocks.elements)
        block_c = min(power_of_two(extent.channels), max(blocks.elements // block_p, 1))
    along_positions = -(-extent.positions // block_p)
    along_channels = -(-extent.channels // block_c)
    total = extent.runs * along_positions * along_channels
    steps = min(max(total // blocks.programs, 1), blocks.steps, along_positions)
    spans = -(-along_positions // steps)
    tiles = extent.runs * spans
    return Tiling(block_p, block_c, steps, spans, tiles, tiles * along_channels, blocks.num_warps)


def channel_block(channels: int, most: int) -> int:
    """The power of two up to `most` that wastes the fewest channels, the largest of equals."""
    if channels <= most // 4:
        return power_of_two(channels)
    return min((most, most // 2, most // 4), key=lambda size: (-(-channels // size) * size, -size))


def power_of_two(value: int) -> int:
    """The smallest power of two that is not below `value`, which is at least 1."""
    return 1 << (value - 1).bit_length()
