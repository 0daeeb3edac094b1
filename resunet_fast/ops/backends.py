"""The backends that this version has, and what each refuses whatever the operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import native
from ..registry import register_backend

NATIVE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _no_reasons(*_: Any) -> list[str]:
    return []


def cpu_refusals(*inputs: Any) -> list[str]:
    """What the C++ CPU implementations have against some operator arguments."""
    reasons = list(native.unavailable())
    for tensor in inputs:
        if isinstance(tensor, Tensor):
            if tensor.device.type != "cpu":
                return [*reasons, f"it needs tensors on the CPU, got one on {tensor.device}"]
            if tensor.dtype not in NATIVE_DTYPES and tensor.dtype != torch.int64:
                return [*reasons, f"it has no {tensor.dtype} kernels"]
    return reasons


no_refusals = _no_reasons

register_backend("reference", _no_reasons)
register_backend("cpu", native.unavailable)
