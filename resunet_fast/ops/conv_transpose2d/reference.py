"""Transposed convolution of kernel 2 and stride 2 in plain torch: the specification.

    y[n, k, 2 h + r, 2 w + s] = sum over c of x[n, c, h, w] weight[c, k, r, s] + bias[k]

Windows do not overlap. `output_padding` appends a row below or a column at the right that holds the
bias alone. The weight may be float32 with 16-bit inputs: it is rounded to their dtype for the
product and its gradient is returned in float32, as autocast does.

Source: torch.nn.functional.conv_transpose2d and torch.ops.aten.convolution_backward, whose results
are the contract.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layout import dense, layout_of


def forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, output_padding: Sequence[int]
) -> Tensor:
    """Compute y."""
    shift = None if bias is None else bias.to(input.dtype)
    return F.conv_transpose2d(input, weight.to(input.dtype), shift, 2, 0, list(output_padding))


def backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Compute the gradients of (input, weight, bias)."""
    sizes = zip(grad_output.shape[2:], input.shape[2:], strict=True)
    # Symbolic differences become numbers: torch's derivative of what follows takes no others.
    output_padding = [int(large - 2 * small) for large, small in sizes]
    dx, dweight, dbias = torch.ops.aten.convolution_backward(
        grad_output,
        input,
        weight.to(input.dtype),
        None if bias is None else bias.shape,
        [2, 2],
        [0, 0],
        [1, 1],
        True,
        output_padding,
        1,
        output_mask,
    )
    return (
        dx if output_mask[0] else None,
        dense(dweight.to(weight.dtype), layout_of(weight)) if output_mask[1] else None,
        dbias.to(bias.dtype) if output_mask[2] and bias is not None else None,
    )
