"""The backward of bn_act_conv in Triton: the data gradient's epilogue sums for the batch norm.

A program that holds a tile of dz reads the tile of x, which saves batch norm its first sweep over
both (docs/math.md). The sums are those of dz as it is stored. Not yet run on a GPU.
"""

from __future__ import annotations

from typing import Any

from ..bn_act import triton_kernel as bn_act
from ..conv2d import triton_kernel as conv2d
from ..conv2d.triton_builds import box_build, pointer_build
from ..conv2d.triton_launch import Epilogue, Normalised
from ..layout import dense, layout_of
from ..triton_build import Build
from . import composed

_composed = composed.backward(conv2d.backward, bn_act.backward)


def backward(*arguments: Any) -> composed.Outputs:
    """Compute as the reference does."""
    a = composed.BackwardArguments(*arguments)
    needs_sums = (a.output_mask[0] and a.batch_stats) or any(a.output_mask[1:3])
    if a.grad_output is None or a.grad_z is not None or not needs_sums:
        return _composed(*arguments)
    layout = layout_of(a.input)
    x = dense(a.input, layout)
    _, _, h, w = x.shape
    dz, *_, sums = conv2d.data_gradient(
        a.grad_output,
        a.conv_weight,
        conv2d.geometry_of(a.conv_weight, a.stride, a.padding),
        (h, w),
        layout,
        Epilogue(sums=Normalised(x, a.mean, a.var, a.weight, a.bias, a.eps, a.relu)),
    )
    parameters = a._replace(output_mask=[False] * 3 + [*a.output_mask[3:]])
    *_, dweight, dbias = _composed(*parameters)
    norm_grads = composed.norm_gradients(bn_act.backward, a._replace(input=x), dz, sums=sums)
    return *norm_grads, dweight, dbias


def builds() -> list[Build]:
    """Data gradients that sum for the batch norm and ReLU before them."""
    relu = ("SUMS", "MASK", "HAS_WEIGHT", "HAS_BIAS")
    return [
        box_build("sums", "bf16", 64, 64, *relu, flip=True),
        box_build("sums", "bf16", 128, 128, *relu, flip=True),
        box_build("sums", "fp16", 128, 128, *relu, flip=True),
        box_build("sums", "fp32", 128, 128, *relu, flip=True),
        box_build("sums-linear", "bf16", 128, 128, "SUMS", flip=True),
        pointer_build("sums", "bf16", 128, 128, *relu),
        pointer_build("sums", "fp16", 128, 128, *relu),
        pointer_build("sums-linear", "bf16", 128, 128, "SUMS"),
        pointer_build("sums-stride2", "bf16", 128, 64, *relu, spread=2),
    ]
