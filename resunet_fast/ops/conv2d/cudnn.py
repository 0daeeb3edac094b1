"""Convolution by cuDNN, through ATen, of sources joined by the selected upsample_concat."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..backends import computed_by
from ..layout import dense, layout_of
from ..upsample.op import UPSAMPLE_BACKWARD
from . import reference
from .sources import join


def forward(
    input: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    upsample_mode: str,
) -> Tensor:
    """Compute as the reference does."""
    x = join(input, skip, upsample_mode, "")
    geometry = (stride, padding, dilation, groups)
    return reference.forward(x, None, weight, bias, *geometry, "none")


def backward(
    grad_output: Tensor,
    input: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    upsample_mode: str,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Compute as the reference does."""
    x = join(input, skip, upsample_mode, "")
    geometry = (stride, padding, dilation, groups)
    wants_low, wants_skip, *wants_parameters = output_mask
    mask = [wants_low or wants_skip, False, *wants_parameters]
    dx, _, dweight, dbias = reference.backward(
        grad_output, x, None, weight, bias, *geometry, "none", mask
    )
    dlow, dskip = dx, None
    if dx is not None and skip is not None:
        dlow, dskip = (
            dense(part, layout_of(dx)) if wanted else None
            for part, wanted in zip(
                dx.split([input.shape[1], skip.shape[1]], 1), output_mask[:2], strict=True
            )
        )
        if dlow is not None and upsample_mode != "none":
            dlow = computed_by("", UPSAMPLE_BACKWARD)(dlow, input.shape[2:], upsample_mode)
    return dlow if wants_low else None, dskip, dweight, dbias
