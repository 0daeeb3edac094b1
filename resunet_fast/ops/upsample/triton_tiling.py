"""How upsampling is cut into the programs of a Triton kernel: pure arithmetic, no Triton."""

from __future__ import annotations

from dataclasses import dataclass

from ... import environment
from ..bn_act.triton_tiling import channel_block, power_of_two


@dataclass(frozen=True)
class Blocks:
    """What a program holds.

    Args:
        elements: of a block in channels_last, pixels times channels.
        pixels: of a block otherwise, where every tap of every pixel is an access of its own.
        channels: most channels of a block in channels_last.
        num_warps: of a program.
    """

    elements: int = 2048
    pixels: int = 1024
    channels: int = 128
    num_warps: int = 4


FORWARD = Blocks()
# Several accesses of every thread are under way at once: smaller blocks leave registers for them.
BACKWARD = Blocks(elements=1024)
# The interpreter takes as long for any program, whatever it holds.
INTERPRETED = Blocks(elements=1 << 18, pixels=1 << 18, channels=1024)


def blocks_for(*, backward: bool) -> Blocks:
    """The blocks of the map, or of its transpose."""
    if environment.triton_interpreted():
        return INTERPRETED
    return BACKWARD if backward else FORWARD


def block_of(blocks: Blocks, channels: int, pixels: int, channels_last: bool) -> tuple[int, int]:
    """Pixels and channels of a block of an image, powers of two."""
    if channels_last:
        block_c = channel_block(channels, blocks.channels)
        return min(power_of_two(pixels), max(blocks.elements // block_c, 1)), block_c
    block_p = min(power_of_two(pixels), blocks.pixels)
    return block_p, min(power_of_two(channels), max(blocks.pixels // block_p, 1))


def readers(size: int, target: int, mode: str) -> int:
    """Most outputs that read one input along an axis of `size` inputs and `target` outputs.

    Those whose source coordinate is within one pixel of it, or that have it as the nearest. Where
    the ratio is no power of two, rounding of the coordinates may add one.
    """
    if mode == "nearest":
        reach = -(-target // size)
    elif mode == "bilinear":
        reach = -(-2 * target // size)
    else:
        reach = -(-2 * (target - 1) // (size - 1)) if size > 1 else target
    ratio = target // size
    exact = mode != "bilinear_align_corners" and target == size * ratio and ratio & (ratio - 1) == 0
    return min(reach if exact else reach + 1, target)
