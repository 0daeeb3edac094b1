"""The compiled libraries: loaded on first use, once; a failure is remembered and can be told."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

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


def _load(library: Path) -> list[str]:
    try:
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as error:
        first_line = str(error).splitlines()[0]
        return [f"the compiled library {library.name} does not load: {first_line}"]
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
    return _load(library)


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
    return _load(library)


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
