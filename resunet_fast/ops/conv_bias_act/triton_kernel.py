"""conv_bias_act in one Triton kernel: bias, residual and ReLU before the only rounding."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..conv2d.op import ConvArguments
from ..conv2d.triton_builds import box_build, pointer_build
from ..conv2d.triton_kernel import fused
from ..conv2d.triton_launch import Epilogue
from ..triton_build import Build


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


def builds() -> list[Build]:
    """The epilogues that only this operator asks for."""
    bias, residual = ("HAS_SHIFT", "RELU"), ("HAS_SHIFT", "HAS_RESIDUAL", "RELU")
    return [
        box_build("bias", "bf16", 64, 64, *bias),
        box_build("residual", "bf16", 128, 128, *residual),
        box_build("residual", "fp16", 128, 128, *residual),
        pointer_build("residual", "bf16", 128, 128, *residual),
    ]
