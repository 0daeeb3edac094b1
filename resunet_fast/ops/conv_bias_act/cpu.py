"""conv_bias_act on the CPU: by Winograd's method in float32, else by oneDNN's post-operations.

The weight may be one that :func:`pack` has laid out for oneDNN, once: then `weight.is_mkldnn`, and
the ReLU happens in the convolution, too. oneDNN's ReLU makes NaN zero: who packs a weight sees to
it that none arises. With a dense weight the ReLU is a pass of its own, and NaN stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..conv2d import winograd
from ..conv2d.cpu import as_dtype
from ..layout import dense, layout_of

_DTYPES = (torch.float32, torch.bfloat16)

# oneDNN lays the weight out for one image size. The layout for an ordinary size serves all others
# (ONEDNN_VERBOSE=1 shows no reorder), but for images of up to 3x3 pixels with many channels, where
# it lays the weight out anew at every call: slower, the same numbers.
_PACKED_FOR = (64, 64)


def refusals(*inputs: Any) -> list[str]:
    """What oneDNN's fused convolution has against the operator's arguments."""
    x, _, _, residual = inputs[:4]
    if not torch.backends.mkldnn.is_available():
        return ["this torch was built without oneDNN"]
    if x.device.type != "cpu":
        return [f"it needs tensors on the CPU, got one on {x.device}"]
    if x.dtype not in _DTYPES:
        return [f"oneDNN's fused convolution has no {x.dtype} kernel"]
    if x.numel() == 0 or inputs[1].numel() == 0:
        return ["oneDNN's fused convolution refuses empty tensors"]
    if residual is not None and layout_of(x) != torch.channels_last:
        return ["oneDNN's fused sum needs channels_last"]
    if x.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return ["oneDNN has no bfloat16 on this processor"]
    return []


def pack(
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor | None:
    """Lay a weight out for oneDNN, or return None where :func:`refusals` has reasons.

    The result is opaque: it has a shape and a dtype but neither strides nor a storage.
    """
    if refusals(weight, weight, None, None):
        return None
    size = (1, weight.shape[1] * groups, *_PACKED_FOR)
    packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(
        weight, padding, stride, dilation, groups, size
    )
    return packed


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
    """Compute as the reference does."""
    w = as_dtype(weight, input.dtype)
    shift = None if bias is None else bias.to(input.dtype)
    if not weight.is_mkldnn:
        geometry = (stride, padding, dilation, groups)
        once = winograd.convolve_once(input, w, shift, geometry, residual, relu=relu)
        if once is not None:
            return once
    onednn = (padding, stride, dilation, groups)
    inside = relu and weight.is_mkldnn
    z: Tensor
    if residual is None:
        activation = "relu" if inside else "none"
        z = torch.ops.mkldnn._convolution_pointwise(input, w, shift, *onednn, activation, [], None)
    else:
        other = dense(residual, layout_of(input))
        z = torch.ops.mkldnn._convolution_pointwise.binary(
            input, other, w, shift, *onednn, "add", 1.0, "relu" if inside else None, [], None
        )
    return z.relu_() if relu and not inside else z
