"""What the convolutions on a GPU refuse, and which of them is preferred where.

cuDNN's convolution is the default. Triton's is chosen for a shape class and dtype in which the
committed table of the GPU's architecture says that it is faster; there cuDNN's declines.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import environment
from ...registry import Refusals
from ...tuning import ConvProblem, Measurement, lookup
from ..backends import cudnn_unavailable, triton_declines, triton_refusals, unsuited
from ..layout import layout_of

# Compute capabilities, both ends included, that the kernels are made for.
_OLDEST, _NEWEST = (8, 0), (12, 9)


class Convolution(NamedTuple):
    """What the choice depends on, whichever operator asks."""

    operator: str
    x: Tensor
    size: tuple[int, int]
    channels: int
    weight: Tensor
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


class Rules(NamedTuple):
    """`refusals` and `declines` of an implementation."""

    refusals: Refusals
    declines: Refusals


Describe = Callable[..., Convolution]


def conv2d(*inputs: Any, operator: str = "conv2d") -> Convolution:
    """Read the arguments of an operator that begins as conv2d does."""
    x, skip, weight, _, stride, padding, dilation, groups, *_ = inputs
    size = x.shape[2:] if skip is None else skip.shape[2:]
    geometry = (tuple(stride), tuple(padding), tuple(dilation), groups)
    return Convolution(operator, x, tuple(size), weight.shape[1], weight, *geometry)


def conv2d_backward(*inputs: Any) -> Convolution:
    """Read the arguments of conv2d_backward."""
    return conv2d(*inputs[1:], operator="conv2d_backward")


def conv_bn_act(*inputs: Any) -> Convolution:
    """Read the arguments of conv_bn_act."""
    return conv2d(*inputs, operator="conv_bn_act")


def conv_bias_act(*inputs: Any) -> Convolution:
    """Read the arguments of conv_bias_act."""
    x, weight, bias, _, _, *geometry = inputs
    return conv2d(x, None, weight, bias, *geometry, operator="conv_bias_act")


def bn_act_conv(*inputs: Any) -> Convolution:
    """Read the arguments of bn_act_conv."""
    return conv2d(inputs[0], None, *inputs[7:13], operator="bn_act_conv")


def bn_act_conv_backward(*inputs: Any) -> Convolution:
    """Read the arguments of bn_act_conv_backward, whose data gradient is conv2d_backward's."""
    return conv2d(inputs[2], None, *inputs[11:17], operator="conv2d_backward")


def triton(describe: Describe) -> Rules:
    """Return what the Triton implementation of an operator refuses and declines."""

    def refusals(*inputs: Any) -> list[str]:
        return triton_refusals(*inputs) or _unsupported(describe(*inputs))

    def declines(*inputs: Any) -> list[str]:
        return triton_declines(*inputs) or _slower(describe(*inputs))

    return Rules(refusals, declines)


def cudnn(describe: Describe) -> Rules:
    """Return what the cuDNN implementation of an operator refuses and declines."""
    rival = triton(describe)

    def refusals(*inputs: Any) -> list[str]:
        return unsuited(inputs, gpu=True) or cudnn_unavailable()

    def declines(*inputs: Any) -> list[str]:
        if rival.declines(*inputs) or rival.refusals(*inputs):
            return []
        return ["Triton's convolution was measured to be faster here"]

    return Rules(refusals, declines)


def _unsupported(conv: Convolution) -> list[str]:
    """What no Triton convolution computes, or not on a GPU."""
    if conv.dilation != (1, 1):
        return [f"dilation is left to ATen, got {conv.dilation}"]
    if conv.groups != 1:
        return [f"groups are left to ATen, got {conv.groups}"]
    capability = environment.compute_capability(conv.x.device)
    if capability is None:
        return []
    if not _OLDEST <= capability <= _NEWEST:
        return [f"it needs compute capability 8.0 to 12.9, got {capability[0]}.{capability[1]}"]
    if conv.x.dtype == torch.float64:
        return ["float64 is left to cuDNN"]
    # Read once, here: the kernels know no other float32 than TF32.
    precision = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    if conv.x.dtype == torch.float32 and precision != "tf32":
        return [
            "float32 without TF32 is left to cuDNN"
            f" (torch.backends.cudnn.conv.fp32_precision is {precision!r})"
        ]
    return []


def _slower(conv: Convolution) -> list[str]:
    """Why the Triton convolution is not preferred (empty: it was measured to be faster)."""
    if layout_of(conv.x) != torch.channels_last:
        return ["only channels_last was measured, and cuDNN is the default"]
    measured = _measured(conv)
    if measured is None:
        return ["no measurement on this GPU says that it is faster than cuDNN"]
    if measured.fastest == "triton":
        return []
    times = ", ".join(f"{name} {time:.0f}" for name, time in measured.microseconds.items())
    return [f"{measured.fastest} was measured to be faster (microseconds: {times})"]


def _measured(conv: Convolution) -> Measurement | None:
    kernel = (conv.weight.shape[2], conv.weight.shape[3])
    stride = (conv.stride[0], conv.stride[1])
    axes = zip(conv.size, kernel, stride, conv.padding, strict=True)
    height, width = ((n + 2 * p - k) // s + 1 for n, k, s, p in axes)
    channels, filters = conv.channels, conv.weight.shape[0]
    if conv.operator == "conv2d_backward":
        (height, width), channels, filters = conv.size, filters, channels
    dtype = str(conv.x.dtype).removeprefix("torch.")
    shape = (conv.x.shape[0], height, width, channels, filters, kernel, stride)
    problem = ConvProblem(conv.operator, *shape, dtype, conv.x.itemsize)
    return lookup(problem, environment.compute_capability(conv.x.device))
