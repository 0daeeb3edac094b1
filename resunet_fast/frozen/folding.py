"""Batch norm with running statistics, folded into the convolution before it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..arguments import Conv


def fold(conv: nn.Conv2d, norm: nn.BatchNorm2d | None, dtype: torch.dtype) -> Conv:
    """Return a convolution that equals norm(conv(x)) in evaluation, or conv(x) without a norm.

    scale = weight / sqrt(running_var + eps)
    weight' = weight * scale,  bias' = (bias - running_mean) * scale + norm's bias

    Everything is computed in float64 and rounded to `dtype` once.

    Args:
        conv: its tensors are read, not kept.
        norm: follows the convolution directly, and nothing else reads the convolution's result.
        dtype: of weight and bias, which lie in channels_last memory.
    """
    weight = conv.weight.detach().double()
    bias = weight.new_zeros(weight.shape[0]) if conv.bias is None else conv.bias.detach().double()
    if norm is not None:
        scale, shift = affine(norm)
        weight = weight * scale[:, None, None, None]
        bias = bias * scale + shift
    # copy: a float64 model's own tensors must not become the frozen one's.
    weight = weight.to(dtype, copy=True).contiguous(memory_format=torch.channels_last)
    geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
    return Conv(weight, bias.to(dtype, copy=True), *geometry)  # type: ignore[arg-type]


def affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return scale and shift, [C] in float64: batch_norm(y) = y * scale + shift."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return scale, shift
