"""conv_bias_act: z = relu(conv(x) + bias + r) in one kernel; for inference, not differentiable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ...registry import Implementation, Operator
from ..backends import deferred
from ..conv2d import gpu
from ..conv2d import op as conv2d
from . import cpu, cudnn, reference


def _fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    geometry = (stride, padding, dilation, groups)
    return conv2d.fake(input, None, weight, bias, *geometry, "none")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Nothing is kept: the backward only says that there is none."""


def _backward(ctx: Any, grad: Tensor) -> Any:
    raise RuntimeError(
        "conv_bias_act is for inference and has no derivative: call it under torch.no_grad(), or"
        " use conv_bn_act or torch.nn.functional.conv2d for training"
    )


CONV_BIAS_ACT = Operator(
    "conv_bias_act",
    "(Tensor input, Tensor conv_weight, Tensor? conv_bias=None, Tensor? residual=None,"
    " bool relu=True, int[2] stride=1, int[2] padding=0, int[2] dilation=1, int groups=1,"
    " str backend='') -> Tensor",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
CONV_BIAS_ACT.add(
    Implementation(
        "triton",
        deferred("resunet_fast.ops.conv_bias_act.triton_kernel", "forward"),
        *gpu.triton(gpu.conv_bias_act),
    ),
    Implementation("cudnn", cudnn.forward, cudnn.refusals, gpu.cudnn(gpu.conv_bias_act).declines),
    Implementation("cpu", cpu.forward, cpu.refusals),
    Implementation("reference", reference.forward),
)
