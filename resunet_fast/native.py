"""The compiled libraries: loaded on first use, once; a failure is remembered and can be told."""

from __future__ import annotations

import json
import struct
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
from torch.nn import Parameter

from . import environment

_DIRECTORY = Path(__file__).parent


@cache
def build_info() -> dict[str, Any]:
    """What the installation built and why not, as setup.py recorded it (empty: no record)."""
    path = _DIRECTORY / "_build_info.json"
    if not path.exists():
        return {}
    info: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return info


def _library(name: str) -> Path | None:
    found = sorted(_DIRECTORY.glob(f"{name}.*so")) + sorted(_DIRECTORY.glob(f"{name}.*pyd"))
    return found[0] if found else None


def _has_kernels(key: str) -> bool:
    # An operator that every library has a kernel for.
    return hasattr(ops(), "bn_stats") and torch._C._dispatch_has_kernel_for_dispatch_key(
        "resunet_fast_native::bn_stats", key
    )


def _is_truncated(library: Path) -> bool:
    """Whether an ELF file ends before the table that lies at its end; loading it would crash."""
    header = library.read_bytes()[:64]
    if header[:5] != b"\x7fELF\x02":
        return not header
    offset, size, count = struct.unpack_from("<40xQ10xHH", header.ljust(64, b"\xff"))
    return bool(library.stat().st_size < offset + size * count)


def _load(library: Path, key: str) -> list[str]:
    """Load a library that registers kernels under a dispatch key, unless it cannot be."""
    if _is_truncated(library):
        return [f"the compiled library {library.name} is truncated; install resunet_fast again"]
    ours = str(library) in torch.ops.loaded_libraries
    if not ours and _has_kernels(key):
        return [f"another copy of {library.name} is loaded already and has registered its kernels"]
    try:
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        built = build_info().get("torch")
        if built not in (None, torch.__version__):
            reason += f" (built next to torch {built}, loaded by torch {torch.__version__})"
        return [f"the compiled library {library.name} does not load: {reason}"]
    return []


def _why_not_built(name: str) -> str:
    return build_info().get(name, {}).get("reason") or "it was never built"


@cache
def unavailable() -> list[str]:
    """Load the CPU library if need be; return why it cannot be used (empty: it is loaded)."""
    if environment.native_disabled():
        return ["the compiled library is switched off by RESUNET_FAST_DISABLE_NATIVE=1"]
    library = _library("_C")
    if library is None:
        return [f"the compiled library is not installed ({_why_not_built('cpu')})"]
    return _load(library, "CPU")


@cache
def cuda_unavailable() -> list[str]:
    """Load the CUDA library if need be; return why no GPU can use it (empty: one can).

    It is not looked at by a torch without CUDA, which lacks the symbols that it needs.
    """
    reasons = unavailable()
    if reasons:
        return reasons
    library = _library("_CUDA")
    if library is None:
        return [f"the CUDA library is not installed ({_why_not_built('cuda')})"]
    if torch.version.cuda is None:
        return [f"the CUDA library was built, but this torch ({torch.__version__}) is CPU-only"]
    if not torch.cuda.is_available():
        return ["the CUDA library was built, but torch finds no NVIDIA GPU"]
    return _load(library, "CUDA")


@cache
def device_refusals(device: torch.device) -> list[str]:
    """What the CUDA library has against a GPU: that its code is for newer ones."""
    oldest = min(map(int, build_info().get("architectures", ["0"])))
    major, minor = torch.cuda.get_device_capability(device)
    if 10 * major + minor >= oldest:
        return []
    built = f"{oldest // 10}.{oldest % 10}"
    return [f"the CUDA library was built for compute capability {built}, got {major}.{minor}"]


def ops() -> Any:
    """The private operators `resunet_fast_native::*`; call only when nothing is unavailable."""
    return torch.ops.resunet_fast_native


def calls_of(library: Path | None, name: str) -> Any:
    """The units of csrc/calls.h in a library that is loaded; None where they cannot be called.

    Args:
        library: its file, if there is one.
        name: "_C" or "_CUDA", which it was built as.
    """
    spec = library and spec_from_file_location(f"{__package__}.{name}", library)
    if not spec or spec.loader is None:
        return None
    try:
        module: Any = module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError:  # an older build, which has operators only
        return None
    exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    understood = exchange is not None and module.bind(exchange, torch.Tensor, Parameter)
    return module if understood else None


@cache
def cpu_calls() -> Any:
    """The units of csrc/calls.h for tensors on the CPU; None where they cannot be called."""
    return None if unavailable() else calls_of(_library("_C"), "_C")


@cache
def cuda_calls() -> Any:
    """The units of csrc/calls.h for tensors on a GPU; None where they cannot be called."""
    return None if cuda_unavailable() else calls_of(_library("_CUDA"), "_CUDA")
