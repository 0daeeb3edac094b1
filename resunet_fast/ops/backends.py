"""The backends that this version has, and what each refuses whatever the operator."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .. import environment, native
from ..registry import Operator, nothing, register_backend, select

NATIVE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def cpu_refusals(*inputs: Any) -> list[str]:
    """What the C++ CPU implementations have against some operator arguments."""
    reasons = native.unavailable()
    if reasons:
        return reasons
    for tensor in inputs:
        if isinstance(tensor, Tensor):
            if not tensor.is_cpu:
                return [f"it needs tensors on the CPU, got one on {tensor.device}"]
            if tensor.dtype not in NATIVE_DTYPES and tensor.dtype != torch.int64:
                return [f"it has no {tensor.dtype} kernels"]
    return reasons


def cuda_refusals(*inputs: Any) -> list[str]:
    """What the CUDA C++ implementations have against some operator arguments."""
    reasons = native.cuda_unavailable()
    if reasons:
        return reasons
    for tensor in inputs:
        if isinstance(tensor, Tensor):
            if not tensor.is_cuda:
                return [f"it needs tensors on an NVIDIA GPU, got one on {tensor.device}"]
            if tensor.dtype not in NATIVE_DTYPES and tensor.dtype != torch.int64:
                return [f"it has no {tensor.dtype} kernels"]
    return native.device_refusals(next(t.device for t in inputs if isinstance(t, Tensor)))


def triton_unavailable() -> list[str]:
    """Why no Triton kernel can run on this machine (empty: they can)."""
    if not environment.triton_installed():
        return ["Triton is not installed"]
    if environment.triton_interpreted() or torch.cuda.is_available():
        return []
    return ["Triton needs an NVIDIA GPU (TRITON_INTERPRET=1 interprets its kernels on the CPU)"]


def triton_refusals(*inputs: Any) -> list[str]:
    """What every Triton implementation has against some operator arguments."""
    reasons = triton_unavailable()
    interpreted = environment.triton_interpreted()
    device = None
    for tensor in inputs:
        if isinstance(tensor, Tensor):
            if not (tensor.is_cuda or (interpreted and tensor.device.type == "cpu")):
                return [*reasons, f"it needs tensors on an NVIDIA GPU, got one on {tensor.device}"]
            # Triton itself would launch, and read the other GPU's addresses.
            device = device or tensor.device
            if tensor.device != device:
                return [*reasons, f"it needs tensors on one GPU, got {device} and {tensor.device}"]
            if tensor.dtype not in NATIVE_DTYPES and tensor.dtype != torch.int64:
                return [*reasons, f"it has no {tensor.dtype} kernels"]
    return reasons


def triton_declines(*_: Any) -> list[str]:
    """Interpreted kernels check arithmetic and run only where they are asked for by name."""
    return ["Triton's interpreter is slow"] if environment.triton_interpreted() else []


def cudnn_unavailable() -> list[str]:
    """Why cuDNN cannot run on this machine (empty: it can)."""
    if not torch.cuda.is_available():
        return ["cuDNN needs an NVIDIA GPU that torch can use"]
    if not torch.backends.cudnn.is_available():
        return ["this torch was built without cuDNN"]
    return [] if torch.backends.cudnn.enabled else ["torch.backends.cudnn.enabled is False"]


def computed_by(backend: str, operator: Operator) -> Callable[..., Any]:
    """Return a function that computes `operator` within another operator's implementation.

    Args:
        backend: computes it if it has an implementation; empty, or without one, the selected does.
        operator: takes all its arguments but `backend`.
    """

    def compute(*inputs: Any) -> Any:
        return select(operator, inputs, backend).compute(*inputs)

    return compute


def deferred(module: str, function: str) -> Callable[..., Any]:
    """Return a function that imports its body when it is first called.

    Kernels import Triton, which takes longer to load than this whole package.

    Args:
        module: such as "resunet_fast.ops.bn_act.triton_kernel".
        function: the name in it.
    """

    def call(*args: Any, **keywords: Any) -> Any:
        return getattr(import_module(module), function)(*args, **keywords)

    return call


register_backend("reference", nothing)
register_backend("cpu", native.unavailable)
register_backend("cudnn", cudnn_unavailable)
register_backend("cuda", native.cuda_unavailable)
register_backend("triton", triton_unavailable)
