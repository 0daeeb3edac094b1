"""3x3 convolution with stride 1 in float32 by Winograd's minimal filtering F(2x2, 3x3).

2.25 times fewer multiplications than the definition (Lavin and Gray 2015, arXiv:1509.09308;
docs/math.md), in the compiled library, for channels_last. The same bits for every number of
threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from ... import native
from ..layout import dense, layout_of
from ..scratch import scratch

# The kernels take multiples of this.
_BLOCK = 16
# With fewer channels the transforms cost more than the products save (measured, AVX-512, one core,
# 128x128 pixels: 16 to 16 channels 0.40 to 0.56 ms, 16 to 64 1.44 to 1.62 ms; 32 to 32 1.49 to 1.23
# ms, 64 to 64 5.1 to 3.9 ms).
_MIN_CHANNELS = 32
# With fewer pixels a weight packed at every call costs more than it saves (measured as above, 1024
# to 1024 channels with the packing: 4x4 pixels 5.5 to 8.2 ms, 8x8 25.4 to 9.4 ms).
_MIN_PIXELS = 64


# Stride, padding, dilation, groups.
Geometry = tuple[Sequence[int], Sequence[int], Sequence[int], int]


@cache
def _available() -> bool:
    return not native.unavailable() and bool(native.ops().has_winograd())


def keeps_the_size(weight: Tensor, geometry: Geometry) -> bool:
    """Whether it is a 3x3 convolution with stride 1 and padding 1, not dilated, not in groups."""
    stride, padding, dilation, groups = geometry
    ones = tuple(stride) == tuple(padding) == tuple(dilation) == (1, 1)
    return ones and groups == 1 and tuple(weight.shape[2:]) == (3, 3)


def takes_weight(weight: Tensor, geometry: Geometry) -> bool:
    """Whether this convolution is faster so, given enough pixels."""
    k, c = weight.shape[:2]
    return (
        weight.dtype == torch.float32
        and keeps_the_size(weight, geometry)
        and min(k, c) >= _MIN_CHANNELS
        and k % _BLOCK == c % _BLOCK == 0
        and weight.is_cpu
        and _available()
    )


def takes_image(x: Tensor) -> bool:
    """Whether an image has the dtype and the layout."""
    return x.dtype == torch.float32 and x.is_cpu and layout_of(x) == torch.channels_last


def pack(weight: Tensor, *, rotated: bool = False) -> Tensor | None:
    """Transform a weight for :func:`convolve`; None if it holds a NaN or an infinity.

    Args:
        weight: [K, C, 3, 3], see :func:`takes_weight`.
        rotated: for the gradient with respect to the input: channels exchanged, turned by 180
            degrees.

    Returns:
        [K / 16, 16, C, 16]; rotated, [C / 16, 16, K, 16].
    """
    packed = weight.new_empty(_packed_shape(weight, rotated))
    return packed if _pack(weight, rotated, packed) else None


def _packed_shape(weight: Tensor, rotated: bool) -> tuple[int, int, int, int]:
    k, c = weight.shape[1::-1] if rotated else weight.shape[:2]
    return k // _BLOCK, 16, c, _BLOCK


def _pack(weight: Tensor, rotated: bool, packed: Tensor) -> bool:
    finite = native.ops().winograd_pack(dense(weight, torch.channels_last), rotated, packed)
    return bool(finite)


def convolve_once(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    residual: Tensor | None = None,
    *,
    relu: bool = False,
    rotated: bool = False,
) -> Tensor | None:
    """Pack a weight for this call alone, into memory that is kept between calls, and convolve.

    Args:
        x, bias, residual, relu: as in :func:`convolve`.
        weight, rotated: as in :func:`pack`.
        geometry: of the convolution.

    Returns:
        The result; None where it is not faster, and where `pack` returns None.
    """
    enough = takes_image(x) and x.shape[0] * x.shape[2] * x.shape[3] >= _MIN_PIXELS
    if not enough or not takes_weight(weight, geometry):
        return None
    blocks, points, c, lanes = _packed_shape(weight, rotated)
    with scratch(weight, (blocks, lanes, points, c)) as memory:
        packed = memory.permute(0, 2, 3, 1)
        if not _pack(weight, rotated, packed):
            return None
        return convolve(x, packed, bias, residual, relu=relu)


def convolve(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    *,
    relu: bool = False,
) -> Tensor:
    """Compute conv(x) [+ bias] [+ residual], and its ReLU.

    Args:
        x: [N, C, H, W] float32.
        packed: from :func:`pack`.
        bias: [K] float32.
        residual: [N, K, H, W] float32.

    Returns:
        [N, K, H, W], channels_last.
    """
    n, _, h, w = x.shape
    shape = (n, packed.shape[0] * _BLOCK, h, w)
    output = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
    images = [None if t is None else dense(t, torch.channels_last) for t in (x, residual)]
    shift = None if bias is None else bias.contiguous()
    native.ops().winograd_conv2d(images[0], packed, shift, images[1], relu, output)
    return output
