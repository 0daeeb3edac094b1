"""conv2d: a convolution over one source, or over two without keeping their concatenation.

Saved for backward: the sources and the weight as they came, hence neither the upsampled tensor, nor
the concatenation, nor a rounded copy of the weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...registry import Implementation, Operator
from ..backends import cpu_refusals, deferred
from ..double_backward import save_inputs, through
from ..layout import empty, layout_of
from . import cpu, cudnn, gpu, reference


class ConvArguments(NamedTuple):
    """The operator's arguments without `backend`."""

    input: Tensor
    skip: Tensor | None
    weight: Tensor
    bias: Tensor | None
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int
    upsample: str


SCHEMA_TAIL = (
    "Tensor? conv_bias=None, int[2] stride=1, int[2] padding=0, int[2] dilation=1, int groups=1,"
    " str upsample='none'"
)


def output_layout(input: Tensor, weight: Tensor) -> torch.memory_format:
    """Return channels_last if either operand is, as eager's convolutions do."""
    if torch.channels_last in (layout_of(input), layout_of(weight)):
        return torch.channels_last
    return torch.contiguous_format


def fake(*arguments: Any) -> Tensor:
    """Shape of the result."""
    a = ConvArguments(*arguments)
    spatial = a.input.shape[2:] if a.skip is None else a.skip.shape[2:]
    geometry = zip(spatial, a.weight.shape[2:], a.stride, a.padding, a.dilation, strict=True)
    size = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in geometry]
    shape = (a.input.shape[0], a.weight.shape[0], *size)
    return empty(a.input, shape, output_layout(a.input, a.weight))


def save(ctx: Any, a: ConvArguments) -> tuple[Tensor | None, ...]:
    """Keep what :func:`gradients` needs; return the tensors to save."""
    ctx.conv = (a.stride, a.padding, a.dilation, a.groups, a.upsample)
    return a.input, a.skip, a.weight, a.bias


SAVED = 4  # tensors that `save` returns


def gradients(
    ctx: Any, saved: Sequence[Tensor | None], grad: Tensor, wanted: list[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of (input, skip, weight, bias)."""
    grads: tuple[Tensor | None, ...] = CONV2D_BACKWARD(grad, *saved, *ctx.conv, wanted, ctx.backend)
    return grads


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *arguments, ctx.backend = inputs
    ctx.save_for_backward(*save(ctx, ConvArguments(*arguments)))


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:SAVED])
    return (*gradients(ctx, ctx.saved_tensors, grad, wanted), *[None] * 6)


def fake_backward(
    grad: Tensor,
    input: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor | None, ...]:
    """Shapes of the gradients that the mask asks for."""
    image = output_layout(input, weight)
    makers = (
        (input, image),
        (skip, image),
        (weight, layout_of(weight)),
        (bias, torch.contiguous_format),
    )
    return tuple(
        empty(like, like.shape, layout) if wanted and like is not None else None
        for (like, layout), wanted in zip(makers, rest[-1], strict=True)
    )


CONV2D = Operator(
    "conv2d",
    f"(Tensor input, Tensor? skip, Tensor conv_weight, {SCHEMA_TAIL}, str backend='') -> Tensor",
    fake=fake,
    setup_context=_setup_context,
    backward=_backward,
)
CONV2D_BACKWARD = Operator(
    "conv2d_backward",
    "(Tensor grad_output, Tensor input, Tensor? skip, Tensor conv_weight, Tensor? conv_bias,"
    " int[2] stride, int[2] padding, int[2] dilation, int groups, str upsample,"
    " bool[4] output_mask, str backend='') -> (Tensor, Tensor, Tensor, Tensor)",
    fake=fake_backward,
    setup_context=save_inputs,
    backward=through(reference.backward),
)
_TRITON = "resunet_fast.ops.conv2d.triton_kernel"
CONV2D.add(
    Implementation("cudnn", cudnn.forward, *gpu.cudnn(gpu.conv2d)),
    Implementation("triton", deferred(_TRITON, "forward"), *gpu.triton(gpu.conv2d)),
    Implementation("cpu", cpu.forward, cpu_refusals),
    Implementation("reference", reference.forward),
)
CONV2D_BACKWARD.add(
    Implementation("cudnn", cudnn.backward, *gpu.cudnn(gpu.conv2d_backward)),
    Implementation("triton", deferred(_TRITON, "backward"), *gpu.triton(gpu.conv2d_backward)),
    Implementation("cpu", cpu.backward, cpu_refusals),
    Implementation("reference", reference.backward),
)
