"""bn_act_conv composed of a bn_act and a convolution, for every backend that has both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..bn_act.op import BnActArguments
from ..conv2d.op import ConvArguments

Outputs = tuple["Tensor | None", ...]

# Arguments of the normalisation: input, weight, bias, mean, var, eps, relu.
NORM_ARGUMENTS = 7


class BackwardArguments(NamedTuple):
    """The backward operator's arguments without `backend`."""

    grad_output: Tensor | None
    grad_z: Tensor | None
    input: Tensor
    z: Tensor
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    var: Tensor
    eps: float
    batch_stats: bool
    relu: bool
    conv_weight: Tensor
    conv_bias: Tensor | None
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int
    output_mask: Sequence[bool]


def norm(arguments: tuple[Any, ...]) -> BnActArguments:
    """The normalisation's part of the forward's arguments."""
    x, weight, bias, mean, var, eps, relu = arguments[:NORM_ARGUMENTS]
    return BnActArguments(x, weight, bias, mean, var, eps, relu=relu)


def conv(z: Tensor, arguments: tuple[Any, ...]) -> ConvArguments:
    """The convolution's part of the forward's arguments; `z` is what it convolves."""
    weight, bias, stride, padding, dilation, groups, _, _ = arguments[NORM_ARGUMENTS:]
    return ConvArguments(z, None, weight, bias, stride, padding, dilation, groups, "none")


def forward(
    normalise: Callable[..., Outputs], convolve: Callable[..., Tensor]
) -> Callable[..., Outputs]:
    """Return the forward of bn_act_conv.

    Args:
        normalise: forward of bn_act.
        convolve: forward of conv2d.
    """

    def compute(*arguments: Any) -> Outputs:
        z, _, mean, var, _, _ = normalise(*norm(arguments))
        assert z is not None
        recompute, keep = arguments[-2:]
        y = convolve(*conv(z, arguments))
        return y, z if keep and not recompute else None, mean, var

    return compute


def backward(
    convolve: Callable[..., Outputs], normalise: Callable[..., Outputs]
) -> Callable[..., Outputs]:
    """Return the backward of bn_act_conv.

    Args:
        convolve: backward of conv2d.
        normalise: backward of bn_act.
    """

    def compute(*arguments: Any) -> Outputs:
        a = BackwardArguments(*arguments)
        dz, dweight, dbias = a.grad_z, None, None
        if a.grad_output is not None:
            geometry = (a.stride, a.padding, a.dilation, a.groups, "none")
            mask = [any(a.output_mask[:3]), False, *a.output_mask[3:]]
            dz, _, dweight, dbias = convolve(
                a.grad_output, a.z, None, a.conv_weight, a.conv_bias, *geometry, mask
            )
            if a.grad_z is not None and dz is not None:
                dz = dz + a.grad_z
        return *norm_gradients(normalise, a, dz), dweight, dbias

    return compute


def norm_gradients(
    normalise: Callable[..., Outputs], a: BackwardArguments, dz: Tensor | None, **more: Any
) -> Outputs:
    """Gradients of (input, weight, bias) from that of z; `more` is for `normalise` alone."""
    if not any(a.output_mask[:3]):
        return None, None, None
    vectors = (a.weight, a.bias, a.mean, a.var, a.eps, a.batch_stats)
    mask = [*a.output_mask[:3], False, False, False]
    no_residual = (None, None, None, None, 0.0, False)
    return normalise(dz, None, a.input, None, *vectors, *no_residual, a.relu, mask, **more)[:3]
