"""conv_bias_act in one Triton kernel: bias, residual and ReLU before the only rounding."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..conv2d.op import ConvArguments
from ..conv2d.triton_kernel import fused
from ..conv2d.triton_launch import Epilogue


def forward(
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
    """Compute as the reference does."""
    geometry = (stride, padding, dilation, groups)
    conv = ConvArguments(input, None, weight, bias, *geometry, "none")
    epilogue = Epilogue(shift=bias, residual=residual, relu=relu)
    return fused("conv_bias_act", conv, epilogue).output
