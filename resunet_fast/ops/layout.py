"""Memory layout and precision rules shared by every operator and its fake."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def layout_of(tensor: Tensor) -> torch.memory_format:
    """Return the dense layout that results take: channels_last if the channels lie innermost.

    Where both descriptions fit (one channel, one pixel) the answer is contiguous, as in eager.
    """
    if tensor.is_contiguous() or tensor.stride(1) != 1:
        return torch.contiguous_format
    return torch.channels_last


def dense(tensor: Tensor, layout: torch.memory_format) -> Tensor:
    """Return the tensor itself if it is dense in `layout`, else a copy that is."""
    return tensor.contiguous(memory_format=layout)


def channels_innermost(tensor: Tensor) -> Tensor:
    """Return the tensor itself if its channels lie innermost, strided or not, else a copy."""
    return tensor if tensor.stride(1) == 1 else dense(tensor, torch.channels_last)


def empty(like: Tensor, shape: Sequence[int], layout: torch.memory_format) -> Tensor:
    """Allocate an uninitialised tensor of `like`'s dtype and device, dense in `layout`."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of statistics and of arithmetic: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
