"""Upsampling by Triton, with a skip in the same pass; the backward is a gather, deterministic."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from ..layout import dense, empty, layout_of
from ..triton_dtype import accumulator_type
from . import triton_device as device
from .reference import MODES
from .triton_builds import builds as builds
from .triton_tiling import block_of, blocks_for, readers


def forward(input: Tensor, size: Sequence[int], mode: str) -> Tensor:
    """Compute as the reference does."""
    output = empty(input, (*input.shape[:2], *size), layout_of(input))
    write(input, None, mode, output)
    return output


def write(input: Tensor, skip: Tensor | None, mode: str, output: Tensor) -> None:
    """Resize `input` and put `skip` behind it along the channels, in one pass.

    Args:
        input: [N, C, H, W].
        skip: [N, S, H', W'], same dtype, or None.
        mode: one of MODES.
        output: [N, C + S, H', W'], dense, filled here.
    """
    layout = layout_of(output)
    x, behind = dense(input, layout), None if skip is None else dense(skip, layout)
    n, c, h, w = x.shape
    size = output.shape[2:]
    s = 0 if behind is None else behind.shape[1]
    if output.numel() == 0:
        return
    last = layout == torch.channels_last
    pixels = size[0] * size[1]
    held = blocks_for(backward=False)
    block_p, block_c = block_of(held, c, pixels, last)
    blocks = triton.cdiv(c, block_c) + triton.cdiv(s, block_c)
    with torch.cuda.device_of(x):
        # One program: a block of an image's output pixels, a block of one source's channels.
        device.upsample_fwd_kernel[(n * triton.cdiv(pixels, block_p) * blocks,)](
            x,
            behind,
            output,
            c,
            s,
            h,
            w,
            *size,
            BLOCK_P=block_p,
            BLOCK_C=block_c,
            UNIT=math.gcd(c, s, 16) if last else 1,
            CHANNELS_LAST=last,
            MODE=MODES.index(mode),
            HAS_SKIP=behind is not None,
            ACC=accumulator_type(x),
            num_warps=held.num_warps,
        )


def backward(grad_output: Tensor, input_size: Sequence[int], mode: str) -> Tensor:
    """Compute as the reference does."""
    layout = layout_of(grad_output)
    dy = dense(grad_output, layout)
    dx = empty(dy, (*dy.shape[:2], *input_size), layout)
    if dx.numel() == 0:
        return dx
    n, c, h, w = dx.shape
    height, width = dy.shape[2:]
    last = layout == torch.channels_last
    held = blocks_for(backward=True)
    block_p, block_c = block_of(held, c, h * w, last)
    with torch.cuda.device_of(dy):
        # One program: a block of an image's input pixels, a block of channels.
        device.upsample_bwd_kernel[(n * triton.cdiv(h * w, block_p) * triton.cdiv(c, block_c),)](
            dy,
            dx,
            c,
            h,
            w,
            height,
            width,
            BLOCK_P=block_p,
            BLOCK_C=block_c,
            UNIT=math.gcd(c, 16) if last else 1,
            CHANNELS_LAST=last,
            MODE=MODES.index(mode),
            ROWS=readers(h, height, mode),
            COLUMNS=readers(w, width, mode),
            ACC=accumulator_type(dy),
            num_warps=held.num_warps,
        )
    return dx
