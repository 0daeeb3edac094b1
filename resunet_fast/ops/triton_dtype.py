"""What Triton kernels compute in, by the dtype of their operands."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from .. import environment
from .layout import accumulator


def accumulator_type(tensor: Tensor) -> tl.dtype:
    """Triton's name of the dtype that sums of this tensor are accumulated in."""
    return tl.float64 if accumulator(tensor.dtype) == torch.float64 else tl.float32


def upcast(tensor: Tensor) -> bool:
    """Whether products of this tensor need wider operands: the interpreter has no bfloat16 ones."""
    return tensor.dtype == torch.bfloat16 and environment.triton_interpreted()


def precision(tensor: Tensor) -> str:
    """How tensor cores read operands of a convolution: float32 as TF32, where there are any."""
    tf32 = tensor.dtype == torch.float32 and not environment.triton_interpreted()
    return "tf32" if tf32 else "ieee"
