"""Upsampling in plain torch: the specification.

    nearest                   y[i] = x[floor(i * in / out)]
    bilinear                  source coordinate max(0, (i + 0.5) * in / out - 0.5)
    bilinear_align_corners    source coordinate i * (in - 1) / (out - 1)

The backward of these linear maps is their transpose.
Source: torch.nn.functional.interpolate, whose results are the contract.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layout import accumulator, dense, layout_of

MODES = ("nearest", "bilinear", "bilinear_align_corners")


def forward(input: Tensor, size: Sequence[int], mode: str) -> Tensor:
    """Resize the spatial axes of an NCHW tensor to `size`."""
    if mode == "nearest":
        output = F.interpolate(input, size=list(size), mode="nearest")
    else:
        aligned = mode == "bilinear_align_corners"
        output = F.interpolate(input, size=list(size), mode="bilinear", align_corners=aligned)
    return dense(output, layout_of(input))


def backward(grad_output: Tensor, input_size: Sequence[int], mode: str) -> Tensor:
    """Gradient of the input, whose spatial size was `input_size`: rows' and columns' transposes."""
    dtype = accumulator(grad_output.dtype)
    rows, columns = (
        _matrix(source, target, mode, grad_output.new_empty(0, dtype=dtype))
        for source, target in zip(input_size, grad_output.shape[2:], strict=True)
    )
    grad = rows.t() @ (grad_output.to(dtype) @ columns)
    return dense(grad.to(grad_output.dtype), layout_of(grad_output))


def _matrix(source: int, target: int, mode: str, like: Tensor) -> Tensor:
    """The map of one axis, [target, source]: the images of the unit vectors."""
    units = torch.eye(source, dtype=like.dtype, device=like.device)
    return forward(units[None, :, :, None], (target, 1), mode)[0, :, :, 0].t()
