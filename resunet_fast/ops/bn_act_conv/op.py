"""bn_act_conv: y = conv(relu(batch_norm(x))), the pre-activation unit, and how to recompute.

Saved for backward: x, the statistics and the weight; z = relu(batch_norm(x)) as well unless
`recompute`, which computes it again from x and the saved statistics (one more sweep, one tensor
less).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...registry import Implementation, Operator
from ..backends import computed_by, cpu_refusals, cuda_refusals, deferred
from ..bn_act import compiled as bn_act_compiled
from ..bn_act import op as bn_act
from ..bn_act import reference as bn_act_reference
from ..conv2d import cpu as conv2d_cpu
from ..conv2d import cudnn as conv2d_cudnn
from ..conv2d import gpu
from ..conv2d import op as conv2d
from ..conv2d import reference as conv2d_reference
from ..double_backward import save_inputs, through
from . import composed


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
    *arguments, ctx.backend = inputs
    _, z, mean, var = output
    norm = composed.norm(tuple(arguments))
    bn_act.save(ctx, norm, norm.input, (None, None, mean, var, None, None))
    conv_saved = conv2d.save(ctx, composed.conv(norm.input, tuple(arguments)))
    ctx.save_for_backward(*ctx.norm_tensors, z, *conv_saved[2:])
    del ctx.norm_tensors


def _backward(
    ctx: Any, grad_y: Tensor | None, grad_z: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    saved_tensors = ctx.saved_tensors  # once: activation checkpointing gives them out once
    norm_saved = saved_tensors[: bn_act.SAVED]
    z, conv_weight, conv_bias = saved_tensors[bn_act.SAVED :]
    need = ctx.needs_input_grad
    if grad_y is None and grad_z is None:
        return (None,) * len(need)
    if z is None:
        z = _recomputed(ctx, norm_saved)
    x, _, weight, bias, mean, var, *_ = norm_saved
    eps, batch_stats, _, _, relu = ctx.norm
    *geometry, _ = ctx.conv
    first = composed.NORM_ARGUMENTS
    conv_wanted = [wanted and grad_y is not None for wanted in need[first : first + 2]]
    grads: tuple[Tensor | None, ...] = BN_ACT_CONV_BACKWARD(
        grad_y,
        grad_z,
        x,
        z,
        weight,
        bias,
        mean,
        var,
        eps,
        batch_stats,
        relu,
        conv_weight,
        conv_bias,
        *geometry,
        [*need[:3], *conv_wanted],
        ctx.backend,
    )
    return (*grads[:3], *[None] * 4, *grads[3:], *[None] * 7)


def _recomputed(ctx: Any, norm_saved: tuple[Tensor | None, ...]) -> Tensor:
    x, _, weight, bias, mean, var, *_ = norm_saved
    eps, batch_stats, _, _, relu = ctx.norm
    if batch_stats and torch.is_grad_enabled():
        # Second derivatives need the statistics as functions of x.
        mean = var = None
    none = (None, False, None, None, None, None, 0.0)
    z: Tensor = bn_act.BN_ACT(x, weight, bias, mean, var, eps, *none, relu, False, ctx.backend)[0]
    return z


BN_ACT_CONV_BACKWARD = Operator(
    "bn_act_conv_backward",
    "(Tensor? grad_output, Tensor? grad_z, Tensor input, Tensor z, Tensor? weight, Tensor? bias,"
    " Tensor mean, Tensor var, float eps, bool batch_stats, bool relu, Tensor conv_weight,"
    " Tensor? conv_bias, int[2] stride, int[2] padding, int[2] dilation, int groups,"
    " bool[5] output_mask, str backend='') -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=composed.backward(conv2d.fake_backward, bn_act.fake_backward),
    setup_context=save_inputs,
    backward=through(composed.backward(conv2d_reference.backward, bn_act_reference.backward)),
)
BN_ACT_CONV = Operator(
    "bn_act_conv",
    "(Tensor input, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, float eps, bool relu,"
    " Tensor conv_weight, Tensor? conv_bias=None, int[2] stride=1, int[2] padding=0,"
    " int[2] dilation=1, int groups=1, bool recompute=False, bool keep=False, str backend='')"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    fake=composed.forward(bn_act.fake, conv2d.fake),
    setup_context=_setup_context,
    backward=_backward,
)
_TRITON_CONVOLUTION = deferred("resunet_fast.ops.conv2d.triton_kernel", "forward")
BN_ACT_CONV.add(
    Implementation(
        "cudnn",
        composed.forward(computed_by("", bn_act.BN_ACT), conv2d_cudnn.forward),
        *gpu.cudnn(gpu.bn_act_conv),
    ),
    Implementation(
        "triton",
        composed.forward(computed_by("triton", bn_act.BN_ACT), _TRITON_CONVOLUTION),
        *gpu.triton(gpu.bn_act_conv),
    ),
    Implementation(
        "cuda", composed.forward(bn_act_compiled.forward, conv2d_cudnn.forward), cuda_refusals
    ),
    Implementation(
        "cpu", composed.forward(bn_act_compiled.forward, conv2d_cpu.forward), cpu_refusals
    ),
    Implementation(
        "reference", composed.forward(bn_act_reference.forward, conv2d_reference.forward)
    ),
)
BN_ACT_CONV_BACKWARD.add(
    Implementation(
        "cudnn",
        composed.backward(conv2d_cudnn.backward, computed_by("", bn_act.BN_ACT_BACKWARD)),
        *gpu.cudnn(gpu.bn_act_conv_backward),
    ),
    Implementation(
        "triton",
        deferred("resunet_fast.ops.bn_act_conv.triton_kernel", "backward"),
        *gpu.triton(gpu.bn_act_conv_backward),
    ),
    Implementation(
        "cuda", composed.backward(conv2d_cudnn.backward, bn_act_compiled.backward), cuda_refusals
    ),
    Implementation(
        "cpu", composed.backward(conv2d_cpu.backward, bn_act_compiled.backward), cpu_refusals
    ),
    Implementation(
        "reference", composed.backward(conv2d_reference.backward, bn_act_reference.backward)
    ),
)
