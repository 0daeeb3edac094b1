"""The plain way: the same results from ordinary torch operations.

Taken inside torch.func transforms and torch.jit.trace, which do not see through custom operators,
and for inputs that torch itself rejects, so that its own error is raised.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import Conv, Norm


def required() -> bool:
    """Whether something is active that does not see through custom operators."""
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return tracing or torch._C._are_functorch_transforms_active()


def batch_norm(input: Tensor, norm: Norm) -> Tensor:
    """As torch.nn.BatchNorm2d: the counter, then torch.nn.functional.batch_norm."""
    if input.dim() != 4:
        raise ValueError(f"expected 4D input (got {input.dim()}D input)")
    factor = 0.0 if norm.momentum is None else norm.momentum
    if norm.training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            factor = 1.0 / float(norm.num_batches_tracked)
    running = (norm.running_mean, norm.running_var)
    affine = (norm.weight, norm.bias)
    return F.batch_norm(input, *running, *affine, norm.batch_stats, factor, norm.eps)


def bn_act(
    input: Tensor,
    norm: Norm,
    residual: Tensor | None,
    residual_norm: Norm | None,
    relu: bool,
    pool: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """Batch norm, residual addition, ReLU and pooling, one after the other."""
    z = batch_norm(input, norm)
    if residual is not None:
        z = z + (residual if residual_norm is None else batch_norm(residual, residual_norm))
    if relu:
        z = z.relu()
    return (z, F.max_pool2d(z, 2)) if pool else z


def upsample(input: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Resize by torch.nn.functional.interpolate."""
    if mode == "nearest":
        return F.interpolate(input, size=size, mode="nearest")
    aligned = mode == "bilinear_align_corners"
    return F.interpolate(input, size=size, mode="bilinear", align_corners=aligned)


def conv_transpose2d(input: Tensor, conv: Conv, output_padding: tuple[int, int]) -> Tensor:
    """Transposed convolution by torch.nn.functional.conv_transpose2d."""
    return F.conv_transpose2d(input, conv.weight, conv.bias, 2, 0, output_padding)


def conv2d(input: Tensor, conv: Conv, skip: Tensor | None, mode: str) -> Tensor:
    """Concatenate the sources if there are two, then convolve."""
    if skip is not None:
        size = (skip.shape[2], skip.shape[3])
        low = input if mode == "none" else upsample(input, size, mode)
        input = torch.cat([low, skip], 1)
    return F.conv2d(input, *conv)
