"""Convolution in Triton: no concatenation of two sources, data gradients by the same kernels.

The gradient of the data is a convolution of the gradient with the weight flipped and transposed
(docs/math.md), one for each source that wants it. Sums are in float32 and in a fixed order. Not yet
run on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import computed_by
from ..layout import dense, layout_of
from ..triton_build import Build
from ..upsample.op import UPSAMPLE, UPSAMPLE_BACKWARD
from . import triton_builds, triton_wgrad
from .op import ConvArguments, output_layout
from .triton_launch import Epilogue, Geometry, Result, convolve, pack
from .triton_wgrad import bias_gradient, weight_gradient


def _pair(values: Sequence[int]) -> tuple[int, int]:
    first, second = values
    return first, second


def geometry_of(weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> Geometry:
    """Which pixels a convolution reads."""
    return Geometry(_pair(weight.shape[2:]), _pair(stride), _pair(padding))


def fused(operator: str, a: ConvArguments, epilogue: Epilogue) -> Result:
    """Convolve an operator's sources and apply an epilogue (its shift holds the bias)."""
    x = enlarged(a.input, a.skip, a.upsample)
    geometry = geometry_of(a.weight, a.stride, a.padding)
    axes = zip(x.shape[2:], *geometry[:3], strict=True)
    height, width = ((n + 2 * p - k) // s + 1 for n, k, s, p in axes)
    return convolve(
        operator,
        x,
        a.skip,
        pack(a.weight, x.dtype),
        geometry,
        (height, width),
        output_layout(a.input, a.weight),
        epilogue,
    )


def enlarged(input: Tensor, skip: Tensor | None, mode: str) -> Tensor:
    """The first source at the size of the second."""
    if skip is None or mode == "none":
        return input
    low: Tensor = computed_by("triton", UPSAMPLE)(input, skip.shape[2:], mode)
    return low


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
    a = ConvArguments(input, skip, weight, bias, stride, padding, dilation, groups, upsample_mode)
    return fused("conv2d", a, Epilogue(shift=bias)).output


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
    dlow = dskip = dweight = dbias = None
    size = _pair(input.shape[2:] if skip is None else skip.shape[2:])
    layout = output_layout(input, weight)
    channels = input.shape[1]
    geometry = geometry_of(weight, stride, padding)
    if output_mask[0]:
        dlow = data_gradient(grad_output, weight[:, :channels], geometry, size, layout).output
        if upsample_mode != "none":
            dlow = computed_by("triton", UPSAMPLE_BACKWARD)(dlow, input.shape[2:], upsample_mode)
    if output_mask[1]:
        dskip = data_gradient(grad_output, weight[:, channels:], geometry, size, layout).output
    if output_mask[2]:
        x = enlarged(input, skip, upsample_mode)
        dweight = weight_gradient(grad_output, x, geometry.kernel, stride, padding, skip=skip)
        dweight = dense(dweight.to(weight.dtype), layout_of(weight))
    if output_mask[3] and bias is not None:
        dbias = bias_gradient(grad_output).to(bias.dtype)
    return dlow, dskip, dweight, dbias


def data_gradient(
    grad_output: Tensor,
    weight: Tensor,
    geometry: Geometry,
    size: tuple[int, int],
    layout: torch.memory_format,
    epilogue: Epilogue | None = None,
) -> Result:
    """Gradient of a source of a convolution: the convolution with its weight turned round.

    Args:
        grad_output: [N, K, H', W'].
        weight: [K, C, R, S], the slice that belongs to the source.
        geometry: of the convolution itself.
        size: (H, W).
        layout: of the result.
        epilogue: what follows, if anything does.

    Returns:
        The gradient, [N, C, H, W], and what the epilogue adds.
    """
    height, width = (k - 1 - p for k, p in zip(geometry.kernel, geometry.padding, strict=True))
    gather = Geometry(geometry.kernel, padding=(height, width), spread=geometry.stride, flip=True)
    turned = pack(weight, grad_output.dtype, transpose=True)
    arguments = (grad_output, None, turned, gather, size, layout)
    return convolve("conv2d_backward", *arguments, epilogue or Epilogue())


def builds() -> list[Build]:
    """What is compiled ahead of time of all three passes."""
    return [*triton_builds.builds(), *triton_wgrad.builds()]
