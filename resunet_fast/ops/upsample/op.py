"""upsample: nearest or bilinear resizing of the spatial axes; nothing but sizes is saved."""

from __future__ import annotations

from collections.abc import Sequence
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
from ..layout import empty, layout_of
from . import compiled, reference


def _fake(input: Tensor, size: Sequence[int], mode: str) -> Tensor:
    return empty(input, (*input.shape[:2], *size), layout_of(input))


def _fake_backward(grad_output: Tensor, input_size: Sequence[int], mode: str) -> Tensor:
    return empty(grad_output, (*grad_output.shape[:2], *input_size), layout_of(grad_output))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, ctx.mode, ctx.backend = inputs
    ctx.input_size = x.shape[2:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return UPSAMPLE_BACKWARD(grad, ctx.input_size, ctx.mode, ctx.backend), None, None, None


def _setup_backward_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, _, ctx.mode, ctx.backend = inputs
    ctx.output_size = grad.shape[2:]


def _double_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    # The map is linear: the derivative of its transpose is the map itself.
    return UPSAMPLE(grad, ctx.output_size, ctx.mode, ctx.backend), None, None, None


UPSAMPLE = Operator(
    "upsample",
    "(Tensor input, SymInt[2] size, str mode='bilinear', str backend='') -> Tensor",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
UPSAMPLE_BACKWARD = Operator(
    "upsample_backward",
    "(Tensor grad_output, SymInt[2] input_size, str mode='bilinear', str backend='') -> Tensor",
    fake=_fake_backward,
    setup_context=_setup_backward_context,
    backward=_double_backward,
)
_TRITON = "resunet_fast.ops.upsample.triton_kernel"
UPSAMPLE.add(
    Implementation("cuda", compiled.forward, cuda_refusals),
    Implementation("triton", deferred(_TRITON, "forward"), triton_refusals, triton_declines),
    Implementation("cpu", compiled.forward, cpu_refusals),
    Implementation("reference", reference.forward),
)
UPSAMPLE_BACKWARD.add(
    Implementation("cuda", compiled.backward, cuda_refusals),
    Implementation("triton", deferred(_TRITON, "backward"), triton_refusals, triton_declines),
    Implementation("cpu", compiled.backward, cpu_refusals),
    Implementation("reference", reference.backward),
)
