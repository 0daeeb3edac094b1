"""Convolution on the CPU: oneDNN's, through ATen, fed and drained by the compiled library.

Float32 3x3 convolutions with stride 1 are our own, see :mod:`.winograd`, and so are the gradients
with respect to their inputs; those with respect to their weights are oneDNN's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import native
from ..layout import dense, layout_of
from ..upsample import compiled as upsample
from . import winograd
from .sources import join

# With more weights than this per position, oneDNN's weight gradient spends its time moving weights,
# and one matrix product per tap is faster (measured on AVX-512 without AMX, weight gradient alone:
# 1024 to 1024 channels on 2x8x8, 50.9 to 31.6 ms in float32 and 27.4 to 8.8 ms in bfloat16; 1536 to
# 512 on 2x16x16, 64.0 to 51.1 and 22.3 to 21.1 ms; 512 to 512 there, 13.5 to 16.7 and 6.8 to 7.3
# ms).
_TAP_PRODUCTS_MIN_WEIGHTS_PER_POSITION = 1024


def as_dtype(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight rounded to the sources' dtype, multi-threaded."""
    if weight.dtype == dtype:
        return weight
    if not weight.is_contiguous() and not weight.is_contiguous(memory_format=torch.channels_last):
        return weight.to(dtype)
    output = torch.empty_like(weight, dtype=dtype)
    native.ops().cast(weight, output)
    return output


def forward(
    input: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    upsample_mode: str,
) -> Tensor:
    """Compute as the reference does."""
    x = join(input, skip, upsample_mode, "cpu")
    shift = None if bias is None else bias.to(x.dtype)
    w = as_dtype(weight, x.dtype)
    geometry = (stride, padding, dilation, groups)
    y = winograd.convolve_once(x, w, shift, geometry)
    return F.conv2d(x, w, shift, *geometry) if y is None else y


def backward(
    grad_output: Tensor,
    input: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    upsample_mode: str,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Compute as the reference does."""
    x = join(input, skip, upsample_mode, "cpu")
    w = as_dtype(weight, x.dtype)
    geometry = (stride, padding, dilation, groups)
    wants_x = output_mask[0] or output_mask[1]
    dx = None
    if wants_x and layout_of(x) == torch.channels_last:
        grad_output = dense(grad_output, torch.channels_last)
        dx = winograd.convolve_once(grad_output, w, None, geometry, rotated=True)
    by_taps = output_mask[2] and _prefers_tap_products(x, w, geometry)
    other_dx, dweight, dbias = torch.ops.aten.convolution_backward(
        grad_output,
        x,
        w,
        None if bias is None else bias.shape,
        stride,
        padding,
        dilation,
        False,
        [0, 0],
        groups,
        [wants_x and dx is None, output_mask[2] and not by_taps, output_mask[3]],
    )
    dx = other_dx if dx is None else dx
    if by_taps:
        dweight = weight_gradient_by_taps(grad_output, x)
    dlow, dskip = dx, None
    if dx is not None and skip is not None:
        if upsample_mode == "none":
            parts = dx.split([input.shape[1], skip.shape[1]], 1)
            dlow, dskip = (dense(part, layout_of(dx)) for part in parts)
        else:
            dlow, dskip = upsample.separate(dx, input.shape, upsample_mode)
    return (
        dlow if output_mask[0] else None,
        dskip if output_mask[1] else None,
        _weight_gradient(dweight, weight) if output_mask[2] else None,
        dbias.to(bias.dtype) if output_mask[3] and bias is not None else None,
    )


def _weight_gradient(dweight: Tensor, weight: Tensor) -> Tensor:
    return dense(as_dtype(dweight, weight.dtype), layout_of(weight))


def _prefers_tap_products(x: Tensor, weight: Tensor, geometry: winograd.Geometry) -> bool:
    n, _, h, w = x.shape
    return (
        winograd.keeps_the_size(weight, geometry)
        and layout_of(x) == torch.channels_last
        and weight.shape[0] * weight.shape[1] >= _TAP_PRODUCTS_MIN_WEIGHTS_PER_POSITION * n * h * w
    )


def weight_gradient_by_taps(grad_output: Tensor, x: Tensor) -> Tensor:
    """Weight gradient of a 3x3 stride-1 padding-1 convolution as nine matrix products.

    dW[k, r, s, c] = sum_p g[p, k] * x[p + offset(r, s), c]: with both tensors laid out as rows of
    pixels, one zero column between rows and one zero row between images, a tap is a constant
    offset.

    Args:
        grad_output: [N, K, H, W].
        x: [N, C, H, W], same dtype.

    Returns:
        [K, C, 3, 3], channels_last.
    """
    n, c, h, w = x.shape
    k = grad_output.shape[1]
    rows, width = n * (h + 1) * (w + 1), w + 1
    g = x.new_zeros(n, h + 1, width, k)
    g[:, :h, :w] = grad_output.permute(0, 2, 3, 1)
    padded = x.new_zeros(rows + 2 * width + 2, c)
    inner = padded[width + 1 : width + 1 + rows].view(n, h + 1, width, c)
    inner[:, :h, :w] = x.permute(0, 2, 3, 1)
    transposed = g.view(rows, k).t()
    dweight = x.new_empty(k, 3, 3, c)
    for r in range(3):
        for s in range(3):
            start = r * width + s
            torch.mm(transposed, padded[start : start + rows], out=dweight[:, r, s])
    return dweight.permute(0, 3, 1, 2)
