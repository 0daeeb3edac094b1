"""A residual U-Net with fused kernels, validated against plain PyTorch.

import resunet_fast as rf

model = rf.ResUNet(3, 2)                # fused; rf.reference.ResUNet has the same state dict
z = rf.functional.bn_act(x, rf.functional.Norm.of(bn), residual=r)
print(rf.explain("bn_act", x))          # which implementation runs, and why not the others
"""

from __future__ import annotations

from importlib import import_module as _import_module
from typing import TYPE_CHECKING, Any

try:
    import torch as _torch
except ImportError as error:  # pragma: no cover - exercised by the build tests, without torch
    raise ImportError(
        "resunet_fast needs PyTorch 2.11 or newer, which is not installed: choose a build for your"
        " machine (CPU or CUDA) and install it first"
    ) from error

from . import export, functional, ops, reference
from .explain import explain
from .freeze import freeze
from .frozen import FrozenError
from .models import ResUNet, UNetWithResidualConnections, create_model, list_models
from .registry import BackendError, use_backend

if TYPE_CHECKING:
    from . import testing
    from .hub import from_pretrained, save_pretrained
    from .segmentation import segment

__version__ = "0.1.0"
__all__ = [
    "BackendError",
    "FrozenError",
    "ResUNet",
    "UNetWithResidualConnections",
    "create_model",
    "explain",
    "export",
    "freeze",
    "from_pretrained",
    "functional",
    "list_models",
    "ops",
    "reference",
    "save_pretrained",
    "segment",
    "testing",
    "use_backend",
]

if tuple(int(part) for part in _torch.__version__.split(".")[:2]) < (2, 11):
    raise ImportError(f"resunet_fast needs PyTorch 2.11 or newer, got {_torch.__version__}")


# What few programs use, and what needs more packages than torch, is imported when it is asked for.
_LAZY = {
    "from_pretrained": "resunet_fast.hub",
    "save_pretrained": "resunet_fast.hub",
    "segment": "resunet_fast.segmentation",
}


def __getattr__(name: str) -> Any:
    if name == "testing":
        return _import_module("resunet_fast.testing")
    if name in _LAZY:
        return getattr(_import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
