"""conv_bn_act in Triton: the convolution's epilogue does what batch norm needs of its sums.

With batch statistics the epilogue sums them, which saves batch norm its first reading of y, and one
more sweep normalises. With given statistics, if nothing is kept for backward, batch norm, residual
and ReLU happen before y is stored, and there is no sweep at all.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends import computed_by
from ..bn_act.op import BN_ACT, BnActArguments
from ..conv2d import triton_kernel as conv2d
from ..conv2d.op import ConvArguments
from ..conv2d.triton_builds import box_build, pointer_build
from ..conv2d.triton_launch import Epilogue
from ..layout import accumulator
from ..triton_build import Build, signature_of

_BLOCK_K = 128


@triton.jit
def bn_scale_shift_kernel(
    p_mean,  # [K]
    p_var,  # [K]
    p_weight,  # [K], or None
    p_bias,  # [K], or None
    p_conv_bias,  # [K], or None
    p_scale,  # [K]
    p_shift,  # [K]
    K,
    eps: tl.float64,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CONV_BIAS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """scale = weight / sqrt(var + eps), shift = bias + (conv_bias - mean) * scale, in float64."""
    o_k = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_k = o_k < K
    b_var = tl.load(p_var + o_k, mask=m_k, other=1.0).to(tl.float64)
    b_offset = -tl.load(p_mean + o_k, mask=m_k, other=0.0).to(tl.float64)
    b_scale = 1.0 / tl.sqrt(b_var + eps)
    if HAS_WEIGHT:
        b_scale *= tl.load(p_weight + o_k, mask=m_k, other=0.0).to(tl.float64)
    if HAS_CONV_BIAS:
        b_offset += tl.load(p_conv_bias + o_k, mask=m_k, other=0.0).to(tl.float64)
    b_shift = b_offset * b_scale
    if HAS_BIAS:
        b_shift += tl.load(p_bias + o_k, mask=m_k, other=0.0).to(tl.float64)
    tl.store(p_scale + o_k, b_scale.to(p_scale.dtype.element_ty), mask=m_k)
    tl.store(p_shift + o_k, b_shift.to(p_shift.dtype.element_ty), mask=m_k)


def forward(*arguments: Any) -> tuple[Tensor | None, ...]:
    """Compute as the reference does."""
    conv = ConvArguments(*arguments[:9])
    *norm, keep = arguments[9:]
    a = BnActArguments(conv.input, *norm)
    if a.mean is None:
        # A constant per channel cancels in (y - mean): see the operator's docstring.
        epilogue = Epilogue(statistics=True)
        y, _, mean, var, _ = conv2d.fused("conv_bn_act", conv._replace(bias=None), epilogue)
        output, pooled, _, _, *other = _normalise(a._replace(input=y, mean=mean, var=var))
        return output, pooled, y if keep else None, mean, var, *other
    if keep or a.residual_norm:
        y = conv2d.fused("conv_bn_act", conv, Epilogue(shift=conv.bias)).output
        output, pooled, *stats = _normalise(a._replace(input=y))
        return output, pooled, y if keep else None, *stats
    scale, shift = scale_shift(a, conv.bias)
    epilogue = Epilogue(scale, shift, a.residual, a.relu, a.pool)
    result = conv2d.fused("conv_bn_act", conv, epilogue)
    return result.output, result.pooled, *[None] * 5


def _normalise(a: BnActArguments) -> tuple[Tensor | None, ...]:
    outputs: tuple[Tensor | None, ...] = computed_by("triton", BN_ACT)(*a)
    return outputs


def scale_shift(a: BnActArguments, conv_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Batch norm with given statistics, and a convolution's bias before it, as one affine map.

    Computed at every call: edits of any kind are seen.

    Args:
        a: the normalisation; its input gives dtype and device.
        conv_bias: [K] or None.

    Returns:
        (scale, shift), [K] each, in the accumulator's dtype.
    """
    mean, var = a.mean, a.var
    assert mean is not None
    assert var is not None
    k = mean.shape[0]
    scale = mean.new_empty(k, dtype=accumulator(a.input.dtype))
    shift = torch.empty_like(scale)
    with torch.cuda.device_of(mean):
        # Each program computes 128 filters.
        bn_scale_shift_kernel[(triton.cdiv(k, _BLOCK_K),)](
            mean.contiguous(),
            var.contiguous(),
            None if a.weight is None else a.weight.contiguous(),
            None if a.bias is None else a.bias.contiguous(),
            None if conv_bias is None else conv_bias.contiguous(),
            scale,
            shift,
            k,
            a.eps,
            HAS_WEIGHT=a.weight is not None,
            HAS_BIAS=a.bias is not None,
            HAS_CONV_BIAS=conv_bias is not None,
            BLOCK_K=_BLOCK_K,
        )
    return scale, shift


def builds() -> list[Build]:
    """Training's statistics, evaluation's affine map with all that may follow it."""
    evaluated = ("HAS_SCALE", "HAS_SHIFT", "RELU", "POOL")
    flags = {"HAS_WEIGHT": True, "HAS_BIAS": True, "HAS_CONV_BIAS": True, "BLOCK_K": _BLOCK_K}
    names = ("mean", "var", "weight", "bias", "conv_bias", "scale", "shift")
    pointers = {f"p_{name}": "*fp32" for name in names}
    given = {**pointers, "eps": "fp64"}
    return [
        box_build("training", "bf16", 64, 64, "STATISTICS"),
        box_build("training", "bf16", 128, 128, "STATISTICS"),
        box_build("training", "fp16", 128, 128, "STATISTICS"),
        box_build("training-two-sources", "bf16", 128, 64, "STATISTICS", skip=64),
        box_build("evaluation", "bf16", 64, 64, *evaluated),
        box_build("evaluation-residual", "bf16", 128, 128, *evaluated, "HAS_RESIDUAL"),
        pointer_build("training-first-layer", "bf16", 3, 64, "STATISTICS"),
        pointer_build("training-stride2", "bf16", 64, 128, "STATISTICS", stride=2),
        Build(
            "bn_scale_shift-fp32",
            bn_scale_shift_kernel,
            signature_of(bn_scale_shift_kernel, given, flags),
            flags,
            aligned=(*pointers, "K"),
        ),
    ]
