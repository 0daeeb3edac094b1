"""conv_bias_act by cuDNN's fused convolutions: bias, residual and ReLU happen in the convolution.

Not yet run on a GPU. ATen has the two operators without fakes and derivatives; ours supplies both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import cudnn_unavailable, unsuited
from ..conv2d.op import output_layout
from ..layout import dense

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refusals(*inputs: Any) -> list[str]:
    """What cuDNN's fused convolution has against the operator's arguments."""
    x, weight, _, _, relu = inputs[:5]
    reasons = unsuited([x], gpu=True) or cudnn_unavailable()
    if not relu:
        reasons.append("cuDNN's fused convolution always ends in a ReLU")
    if x.dtype not in _DTYPES:
        reasons.append(f"cuDNN's fused convolution has no {x.dtype} kernel")
    if x.numel() == 0 or weight.numel() == 0:
        reasons.append("cuDNN refuses empty tensors")
    return reasons


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
    """Compute as the reference does; `relu` is True, see :func:`refusals`."""
    layout = output_layout(input, weight)
    x, w = dense(input, layout), dense(weight.to(input.dtype), layout)
    # ATen takes no absent bias beside a residual.
    shift = x.new_zeros(w.shape[0]) if bias is None else bias.to(x.dtype)
    geometry = (stride, padding, dilation, groups)
    if residual is None:
        alone: Tensor = torch.ops.aten.cudnn_convolution_relu(x, w, shift, *geometry)
        return alone
    summed: Tensor = torch.ops.aten.cudnn_convolution_add_relu(
        x, w, dense(residual, layout), 1.0, shift, *geometry
    )
    return summed
