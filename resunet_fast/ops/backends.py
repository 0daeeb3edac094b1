"""The backends that this version has, and what each refuses whatever the operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .. import environment, native
from ..registry import Operator, nothing, register_backend, select

NATIVE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_KERNEL_DTYPES = (*NATIVE_DTYPES, torch.int64)  # counters


def unsuited(
    inputs: Sequence[Any],
    *,
    gpu: bool = False,
    cpu: bool = False,
    dtypes: Sequence[torch.dtype] | None = None,
) -> list[str]:
    """Say what stands against the first tensor that lies elsewhere or has another dtype.

    Refusals begin with it: no call on the CPU asks what there is for GPUs.

    Args:
        inputs: an operator's arguments, tensors and others.
        gpu, cpu: where tensors may lie.
        dtypes: that tensors may have; None: any.
    """
    for tensor in inputs:
        if isinstance(tensor, Tensor):
            if not ((gpu and tensor.is_cuda) or (cpu and tensor.is_cpu)):
                where = "an NVIDIA GPU" if gpu else "the CPU"
                return [f"it needs tensors on {where}, got one on {tensor.device}"]
            if dtypes is not None and tensor.dtype not in dtypes:
                return [f"it has no {tensor.dtype} kernels"]
    return []


def _devices(inputs: Sequence[Any]) -> list[torch.device]:
    return [value.device for value in inputs if isinstance(value, Tensor)]


def cpu_refusals(*inputs: Any) -> list[str]:
    """What the C++ CPU implementations have against some operator arguments."""
    return unsuited(inputs, cpu=True, dtypes=_KERNEL_DTYPES) or native.unavailable()


def cuda_refusals(*inputs: Any) -> list[str]:
    """What the CUDA C++ implementations have against some operator arguments."""
    return (
        unsuited(inputs, gpu=True, dtypes=_KERNEL_DTYPES)
        or native.cuda_unavailable()
        or native.device_refusals(_devices(inputs)[0])
    )


def triton_unavailable() -> list[str]:
    """Why no Triton kernel can run on this machine (empty: they can)."""
    if not environment.triton_installed():
        return ["Triton is not installed"]
    if environment.triton_interpreted() or torch.cuda.is_available():
        return []
    return ["Triton needs an NVIDIA GPU (TRITON_INTERPRET=1 interprets its kernels on the CPU)"]


def triton_refusals(*inputs: Any) -> list[str]:
    """What every Triton implementation has against some operator arguments."""
    interpreted = environment.triton_interpreted()
    return (
        unsuited(inputs, gpu=True, cpu=interpreted, dtypes=_KERNEL_DTYPES)
        or _on_two_gpus(inputs)
        or triton_unavailable()
    )


def _on_two_gpus(inputs: Sequence[Any]) -> list[str]:
    # Triton itself would launch, and read the other GPU's addresses.
    first, *others = _devices(inputs)
    for other in others:
        if other != first:
            return [f"it needs tensors on one GPU, got {first} and {other}"]
    return []


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
