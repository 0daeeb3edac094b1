"""conv_bn_act: z = relu(batch_norm(conv(x)) [+ r | + batch_norm'(r)]), optionally max_pool2d(z, 2).

With batch statistics a bias of the convolution cancels: it is left out, its gradient is zero, and
the returned mean is that of the convolution without it (running statistics add it back). With given
statistics it is a bias like any other. Two sources are as in conv2d.

Saved for backward: what conv2d and bn_act save, y = conv(x) between them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...registry import Implementation, Operator
from ..backends import cpu_refusals, cuda_refusals, deferred
from ..bn_act import compiled as bn_act_compiled
from ..bn_act import op as bn_act
from ..bn_act import reference as bn_act_reference
from ..conv2d import cpu as conv2d_cpu
from ..conv2d import cudnn as conv2d_cudnn
from ..conv2d import gpu
from ..conv2d import op as conv2d
from ..conv2d import reference as conv2d_reference
from . import cudnn
from .composed import composed

_CONV_ARGUMENTS = len(conv2d.ConvArguments._fields)


def _split(arguments: tuple[Any, ...]) -> tuple[conv2d.ConvArguments, tuple[Any, ...], bool]:
    conv = conv2d.ConvArguments(*arguments[:_CONV_ARGUMENTS])
    *norm, keep = arguments[_CONV_ARGUMENTS:]
    return conv, tuple(norm), keep


def _fake(*arguments: Any) -> tuple[Tensor | None, ...]:
    conv, norm, keep = _split(arguments)
    y = conv2d.fake(*conv)
    output, pooled, *stats = bn_act.fake(y, *norm)
    return output, pooled, y if keep else None, *stats


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
    *arguments, ctx.backend = inputs
    conv, norm, _ = _split(tuple(arguments))
    z, pooled, y, *stats = output
    assert y is not None  # autograd sets `keep`
    bn_act.save(ctx, bn_act.BnActArguments(y, *norm), y, (z, pooled, *stats))
    ctx.save_for_backward(*ctx.norm_tensors, *conv2d.save(ctx, conv))
    del ctx.norm_tensors


def _backward(
    ctx: Any,
    grad_output: Tensor | None,
    grad_pooled: Tensor | None,
    grad_y: Tensor | None,
    *_: None,
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    norm_saved, conv_saved = saved[: bn_act.SAVED], saved[bn_act.SAVED :]
    first = _CONV_ARGUMENTS
    wanted = bn_act.needed(ctx, first)
    dy, *norm_grads = bn_act.gradients(ctx, norm_saved, grad_output, grad_pooled, wanted)
    if grad_y is not None:  # y is an output, so that second derivatives see how it came about
        dy = grad_y if dy is None else dy + grad_y
    batch_stats = ctx.norm[1]
    conv_wanted = list(ctx.needs_input_grad[: conv2d.SAVED])
    bias = conv_saved[3]
    zero_bias = batch_stats and conv_wanted[3]
    if batch_stats:
        conv_wanted[3] = False
    conv_grads: tuple[Tensor | None, ...] = (None,) * conv2d.SAVED
    if dy is not None and any(conv_wanted):
        conv_grads = conv2d.gradients(ctx, conv_saved, dy, conv_wanted)
    if zero_bias:
        conv_grads = (*conv_grads[:3], torch.zeros_like(bias))
    spread = bn_act.spread((None, *norm_grads))
    return (*conv_grads, *[None] * 5, *spread[1:-1], None, None)


CONV_BN_ACT = Operator(
    "conv_bn_act",
    f"(Tensor input, Tensor? skip, Tensor conv_weight, {conv2d.SCHEMA_TAIL},"
    f" {bn_act.SCHEMA_TAIL}, bool keep=False, str backend='')"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
CONV_BN_ACT.add(
    Implementation("cudnn", cudnn.forward, *gpu.cudnn(gpu.conv_bn_act)),
    Implementation(
        "triton",
        deferred("resunet_fast.ops.conv_bn_act.triton_kernel", "forward"),
        *gpu.triton(gpu.conv_bn_act),
    ),
    Implementation(
        "cuda",
        composed(conv2d_cudnn.forward, bn_act_compiled.forward, in_place=True),
        cuda_refusals,
    ),
    Implementation(
        "cpu", composed(conv2d_cpu.forward, bn_act_compiled.forward, in_place=True), cpu_refusals
    ),
    Implementation(
        "reference",
        composed(conv2d_reference.forward, bn_act_reference.forward, in_place=False),
    ),
)
