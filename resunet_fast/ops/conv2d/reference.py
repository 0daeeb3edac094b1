"""Convolution over one or two sources in plain torch: the specification.

    y = conv2d(x, weight) + bias                                       without a skip
    y = conv2d(cat([upsample(x to skip's size), skip], channels), weight) + bias

The weight may be float32 with 16-bit sources: it is rounded to their dtype for the convolution and
its gradient is returned in float32, as autocast does, without keeping the rounded copy.

Source: torch.nn.functional.conv2d and torch.ops.aten.convolution_backward, whose results are the
contract.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layout import dense, layout_of
from ..upsample import reference as upsample


def source(input: Tensor, skip: Tensor | None, mode: str) -> Tensor:
    """The tensor that is convolved: the input, or its concatenation with the skip."""
    if skip is None:
        return input
    low = input if mode == "none" else upsample.forward(input, skip.shape[2:], mode)
    return dense(torch.cat([low, skip], 1), layout_of(input))


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
    """Compute y."""
    x = source(input, skip, upsample_mode)
    shift = None if bias is None else bias.to(x.dtype)
    return F.conv2d(x, weight.to(x.dtype), shift, stride, padding, dilation, groups)


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
    """Compute the gradients of (input, skip, weight, bias)."""
    x = source(input, skip, upsample_mode)
    mask = [output_mask[0] or output_mask[1], output_mask[2], output_mask[3]]
    dx, dweight, dbias = torch.ops.aten.convolution_backward(
        grad_output,
        x,
        weight.to(x.dtype),
        None if bias is None else bias.shape,
        stride,
        padding,
        dilation,
        False,
        [0, 0],
        groups,
        mask,
    )
    dlow, dskip = dx, None
    if dx is not None and skip is not None:
        layout = layout_of(dx)
        parts = dx.split([input.shape[1], skip.shape[1]], 1)
        dlow, dskip = (dense(part, layout) for part in parts)
        if upsample_mode != "none":
            dlow = upsample.backward(dlow, input.shape[2:], upsample_mode)
    return (
        dlow if output_mask[0] else None,
        dskip if output_mask[1] else None,
        dense(dweight.to(weight.dtype), layout_of(weight)) if output_mask[2] else None,
        dbias.to(bias.dtype) if output_mask[3] and bias is not None else None,
    )
