"""upsample_concat: the decoder's input, written once; nothing but sizes is saved."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...registry import Implementation, Operator
from ..backends import (
    cpu_refusals,
    cuda_refusals,
    deferred,
    triton_declines,
    triton_refusals,
)
from ..layout import dense, empty, layout_of
from ..upsample.op import UPSAMPLE_BACKWARD
from . import compiled, reference


def _fake(input: Tensor, skip: Tensor, mode: str) -> Tensor:
    n, channels, h, w = skip.shape
    return empty(skip, (n, input.shape[1] + channels, h, w), layout_of(skip))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, ctx.mode, ctx.backend = inputs
    ctx.input_shape = x.shape


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    _, channels, *size = ctx.input_shape
    layout = layout_of(grad)
    low = skip = None
    if ctx.needs_input_grad[0]:
        low = UPSAMPLE_BACKWARD(dense(grad[:, :channels], layout), size, ctx.mode, ctx.backend)
    if ctx.needs_input_grad[1]:
        skip = dense(grad[:, channels:], layout)
    return low, skip, None, None


UPSAMPLE_CONCAT = Operator(
    "upsample_concat",
    "(Tensor input, Tensor skip, str mode='bilinear', str backend='') -> Tensor",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
UPSAMPLE_CONCAT.add(
    Implementation("cuda", compiled.forward, cuda_refusals),
    Implementation(
        "triton",
        deferred("resunet_fast.ops.upsample_concat.triton_kernel", "forward"),
        triton_refusals,
        triton_declines,
    ),
    Implementation("cpu", compiled.forward, cpu_refusals),
    Implementation("reference", reference.forward),
)
