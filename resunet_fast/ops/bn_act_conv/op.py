"""bn_act_conv: y = conv(relu(batch_norm(x))), the pre-activation unit, and how to recompute.

Saved for backward: x, the statistics and the weight; z = relu(batch_norm(x)) as well unless
`recompute`, which computes it again from x and the saved statistics (one more sweep, one tensor
less).
"""

from __future__ import annotations

from collections.abc import Callable
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

# Arguments of the normalisation: input, weight, bias, mean, var, eps, relu.
_NORM_ARGUMENTS = 7


def _norm(arguments: tuple[Any, ...]) -> bn_act.BnActArguments:
    x, weight, bias, mean, var, eps, relu = arguments[:_NORM_ARGUMENTS]
    return bn_act.BnActArguments(x, weight, bias, mean, var, eps, relu=relu)


def _conv(z: Tensor, arguments: tuple[Any, ...]) -> conv2d.ConvArguments:
    weight, bias, stride, padding, dilation, groups, _, _ = arguments[_NORM_ARGUMENTS:]
    return conv2d.ConvArguments(z, None, weight, bias, stride, padding, dilation, groups, "none")


def _composed(
    normalise: Callable[..., tuple[Tensor | None, ...]], convolve: Callable[..., Tensor]
) -> Callable[..., tuple[Tensor | None, ...]]:
    def forward(*arguments: Any) -> tuple[Tensor | None, ...]:
        z, _, mean, var, _, _ = normalise(*_norm(arguments))
        assert z is not None
        recompute, keep = arguments[-2:]
        y = convolve(*_conv(z, arguments))
        return y, z if keep and not recompute else None, mean, var

    return forward


def _fake(*arguments: Any) -> tuple[Tensor | None, ...]:
    z, _, mean, var, _, _ = bn_act.fake(*_norm(arguments))
    assert z is not None
    recompute, keep = arguments[-2:]
    return conv2d.fake(*_conv(z, arguments)), z if keep and not recompute else None, mean, var


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
    *arguments, ctx.backend = inputs
    _, z, mean, var = output
    norm = _norm(tuple(arguments))
    bn_act.save(ctx, norm, norm.input, (None, None, mean, var, None, None))
    conv_saved = conv2d.save(ctx, _conv(norm.input, tuple(arguments)))
    ctx.save_for_backward(*ctx.norm_tensors, z, *conv_saved[2:])
    del ctx.norm_tensors


def _backward(
    ctx: Any, grad_y: Tensor | None, grad_z: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    saved_tensors = ctx.saved_tensors  # once: activation checkpointing gives them out once
    norm_saved = saved_tensors[: bn_act.SAVED]
    z, conv_weight, conv_bias = saved_tensors[bn_act.SAVED :]
    need = ctx.needs_input_grad
    dz = grad_z
    dweight: Tensor | None = None
    dbias: Tensor | None = None
    if grad_y is not None:
        if z is None:
            z = _recomputed(ctx, norm_saved)
        wanted = [True, False, *need[_NORM_ARGUMENTS : _NORM_ARGUMENTS + 2]]
        saved = (z, None, conv_weight, conv_bias)
        dz, _none, dweight, dbias = conv2d.gradients(ctx, saved, grad_y, wanted)
        if grad_z is not None and dz is not None:
            dz = dz + grad_z
    norm_wanted = [need[0], *need[1:3], False, False, False]
    norm_grads: tuple[Tensor | None, ...] = bn_act.gradients(ctx, norm_saved, dz, None, norm_wanted)
    return (*norm_grads[:3], *[None] * 4, dweight, dbias, *[None] * 7)


def _recomputed(ctx: Any, norm_saved: tuple[Tensor | None, ...]) -> Tensor:
    x, _, weight, bias, mean, var, *_ = norm_saved
    eps, batch_stats, _, _, relu = ctx.norm
    if batch_stats and torch.is_grad_enabled():
        # Second derivatives need the statistics as functions of x.
        mean = var = None
    none = (None, False, None, None, None, None, 0.0)
    z: Tensor = bn_act.BN_ACT(x, weight, bias, mean, var, eps, *none, relu, False, ctx.backend)[0]
    return z


BN_ACT_CONV = Operator(
    "bn_act_conv",
    "(Tensor input, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, float eps, bool relu,"
    " Tensor conv_weight, Tensor? conv_bias=None, int[2] stride=1, int[2] padding=0,"
    " int[2] dilation=1, int groups=1, bool recompute=False, bool keep=False, str backend='')"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_TRITON_CONVOLUTION = deferred("resunet_fast.ops.conv2d.triton_kernel", "forward")
BN_ACT_CONV.add(
    Implementation(
        "cudnn",
        _composed(computed_by("", bn_act.BN_ACT), conv2d_cudnn.forward),
        *gpu.cudnn(gpu.bn_act_conv),
    ),
    Implementation(
        "triton",
        _composed(computed_by("triton", bn_act.BN_ACT), _TRITON_CONVOLUTION),
        *gpu.triton(gpu.bn_act_conv),
    ),
    Implementation("cuda", _composed(bn_act_compiled.forward, conv2d_cudnn.forward), cuda_refusals),
    Implementation("cpu", _composed(bn_act_compiled.forward, conv2d_cpu.forward), cpu_refusals),
    Implementation("reference", _composed(bn_act_reference.forward, conv2d_reference.forward)),
)
