"""The convolution inside composed CUDA operators: ATen's, fed by the compiled upsampling."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from .cpu import source


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
    x = source(input, skip, upsample_mode)
    shift = None if bias is None else bias.to(x.dtype)
    return F.conv2d(x, weight.to(x.dtype), shift, stride, padding, dilation, groups)
