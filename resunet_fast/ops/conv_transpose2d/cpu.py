"""Transposed convolution on the CPU: oneDNN's, through ATen, and its parameters' gradients as sums.

oneDNN has the result and the input's gradient at the speed of a convolution, but takes longer for
the weight's gradient than a matrix product of the same size, and as long again for the bias's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..conv2d.cpu import as_dtype
from ..conv2d.op import output_layout
from ..layout import accumulator, dense, layout_of


def forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, output_padding: Sequence[int]
) -> Tensor:
    """Compute as the reference does."""
    shift = None if bias is None else bias.to(input.dtype)
    w = as_dtype(weight, input.dtype)
    return F.conv_transpose2d(input, w, shift, 2, 0, list(output_padding))


def backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Compute as the reference does."""
    dx, dweight, dbias = None, None, None
    if output_mask[0]:
        w = as_dtype(weight, input.dtype)
        dx = dense(F.conv2d(grad_output, w, None, 2), output_layout(input, weight))
    if output_mask[1]:
        exact = _weight_gradient(grad_output, input)
        dweight = dense(as_dtype(exact, weight.dtype), layout_of(weight))
    if output_mask[2] and bias is not None:
        total = grad_output.sum((0, 2, 3), dtype=accumulator(grad_output.dtype))
        dbias = total.to(bias.dtype)
    return dx, dweight, dbias


def _weight_gradient(grad_output: Tensor, input: Tensor) -> Tensor:
    """Return [C, K, 2, 2], channels_last: pixels of the input times their four of the result."""
    n, c, h, w = input.shape
    k = grad_output.shape[1]
    rows = input.permute(0, 2, 3, 1).reshape(-1, c)
    cells = grad_output[:, :, : 2 * h, : 2 * w].permute(0, 2, 3, 1).reshape(n, h, 2, w, 2, k)
    product = torch.mm(rows.t(), cells.transpose(2, 3).reshape(-1, 4 * k))
    return product.view(c, 2, 2, k).permute(0, 3, 1, 2)
