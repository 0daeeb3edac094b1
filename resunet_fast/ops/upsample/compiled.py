"""Upsampling by the compiled libraries, CPU or CUDA; the backward is a deterministic gather."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ... import native
from ..layout import dense, empty, layout_of
from .reference import MODES


def forward(input: Tensor, size: Sequence[int], mode: str) -> Tensor:
    """Compute as the reference does."""
    return concatenate(input, None, size, mode)


def concatenate(input: Tensor, skip: Tensor | None, size: Sequence[int], mode: str) -> Tensor:
    """Resize `input` and put `skip` behind it along the channels, in one sweep."""
    layout = layout_of(input)
    channels = input.shape[1] + (0 if skip is None else skip.shape[1])
    output = empty(input, (input.shape[0], channels, *size), layout)
    source = dense(input, layout)
    behind = None if skip is None else dense(skip, layout)
    native.ops().upsample_forward(source, behind, MODES.index(mode), output)
    return output


def backward(grad_output: Tensor, input_size: Sequence[int], mode: str) -> Tensor:
    """Compute as the reference does."""
    layout = layout_of(grad_output)
    grad = empty(grad_output, (*grad_output.shape[:2], *input_size), layout)
    native.ops().upsample_backward(dense(grad_output, layout), MODES.index(mode), grad, None)
    return grad


def separate(grad: Tensor, input_shape: Sequence[int], mode: str) -> tuple[Tensor, Tensor]:
    """Undo :func:`concatenate` for gradients: those of `input` and of `skip`, in one sweep."""
    layout = layout_of(grad)
    n, channels, h, w = grad.shape
    grad_input = empty(grad, input_shape, layout)
    grad_skip = empty(grad, (n, channels - input_shape[1], h, w), layout)
    native.ops().upsample_backward(dense(grad, layout), MODES.index(mode), grad_input, grad_skip)
    return grad_input, grad_skip
