"""conv_bias_act in plain torch: z = relu(conv2d(x, weight) + bias + r)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Compute z."""
    if weight.is_mkldnn:
        weight = weight.to_dense()
    shift = None if bias is None else bias.to(input.dtype)
    z = F.conv2d(input, weight.to(input.dtype), shift, stride, padding, dilation, groups)
    if residual is not None:
        z = z + residual
    return z.relu() if relu else z
