"""The compiled library: loaded on first use, once; a failure is remembered and can be asked for."""

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


@cache
def unavailable() -> list[str]:
    """Load the CPU library if need be; return why it cannot be used (empty: it is loaded)."""
    if environment.native_disabled():
        return ["the compiled library is switched off by RESUNET_FAST_DISABLE_NATIVE=1"]
    libraries = sorted(_DIRECTORY.glob("_C*.so")) + sorted(_DIRECTORY.glob("_C*.pyd"))
    if not libraries:
        reason = build_info().get("cpu", {}).get("reason") or "it was never built"
        return [f"the compiled library is not installed ({reason})"]
    try:
        torch.ops.load_library(str(libraries[0]))
    except (OSError, RuntimeError) as error:
        first_line = str(error).splitlines()[0]
        return [f"the compiled library {libraries[0].name} does not load: {first_line}"]
    return []


def ops() -> Any:
    """The private operators `resunet_fast_native::*`; call only when nothing is unavailable."""
    return torch.ops.resunet_fast_native
