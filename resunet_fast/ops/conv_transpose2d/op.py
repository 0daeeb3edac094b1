"""conv_transpose2d: a transposed convolution of kernel 2 and stride 2.

Saved for backward: the input and the weight as they came, hence no rounded copy of the weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...registry import Implementation, Operator
from ..backends import cpu_refusals, deferred, triton_declines, triton_refusals
from ..conv2d.op import output_layout
from ..double_backward import save_inputs, through
from ..layout import empty, layout_of
from . import cpu, reference

_KERNELS = "resunet_fast.ops.conv_transpose2d.triton_kernel"


def _fake(
    input: Tensor, weight: Tensor, bias: Tensor | None, output_padding: Sequence[int]
) -> Tensor:
    n, _, h, w = input.shape
    shape = (n, weight.shape[1], 2 * h + output_padding[0], 2 * w + output_padding[1])
    return empty(input, shape, output_layout(input, weight))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, _, ctx.backend = inputs
    ctx.save_for_backward(x, weight, bias)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:3])
    return (*CONV_TRANSPOSE2D_BACKWARD(grad, *ctx.saved_tensors, wanted, ctx.backend), None, None)


def _fake_backward(
    grad: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, output_mask: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    makers = (
        (input, output_layout(input, weight)),
        (weight, layout_of(weight)),
        (bias, torch.contiguous_format),
    )
    return tuple(
        empty(like, like.shape, layout) if wanted and like is not None else None
        for (like, layout), wanted in zip(makers, output_mask, strict=True)
    )


def _triton_refusals(*inputs: Any) -> list[str]:
    first: Tensor = inputs[0]
    if first.is_cuda and first.dtype in (torch.float32, torch.float64):
        return [f"it has no {first.dtype} products on a GPU"]
    return triton_refusals(*inputs)


def _triton_declines(*inputs: Any) -> list[str]:
    return triton_declines(*inputs) or ["cuDNN is the default until a measurement prefers this"]


CONV_TRANSPOSE2D = Operator(
    "conv_transpose2d",
    "(Tensor input, Tensor conv_weight, Tensor? conv_bias=None, int[2] output_padding=0,"
    " str backend='') -> Tensor",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
CONV_TRANSPOSE2D_BACKWARD = Operator(
    "conv_transpose2d_backward",
    "(Tensor grad_output, Tensor input, Tensor conv_weight, Tensor? conv_bias,"
    " bool[3] output_mask, str backend='') -> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    setup_context=save_inputs,
    backward=through(reference.backward),
)
CONV_TRANSPOSE2D.add(
    Implementation("triton", deferred(_KERNELS, "forward"), _triton_refusals, _triton_declines),
    Implementation("cpu", cpu.forward, cpu_refusals),
    Implementation("reference", reference.forward),
)
CONV_TRANSPOSE2D_BACKWARD.add(
    Implementation("triton", deferred(_KERNELS, "backward"), _triton_refusals, _triton_declines),
    Implementation("cpu", cpu.backward, cpu_refusals),
    Implementation("reference", reference.backward),
)
