"""Modules whose state is settled when they are built."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

Self = TypeVar("Self", bound="Sealed")

# What torch itself notes on a module: that, and how, it is compiled.
_TORCHS_OWN = frozenset({"_compiled_call_impl", "_is_torch_compile"})


# Whether what flows through the network may hold a NaN, which packed convolutions make zero.
HOLDS_NAN: ContextVar[bool] = ContextVar("HOLDS_NAN", default=False)


class FrozenError(RuntimeError):
    """Something was asked of a frozen model that only the model it came from can do."""


def _refuse(what: str) -> NoReturn:
    raise FrozenError(
        f"{what}: a frozen model cannot be changed; change the model that it was frozen from and"
        " freeze that again"
    )


class Sealed(nn.Module):
    """A module that refuses every edit once :func:`seal` has run over it.

    It has neither parameters nor buffers: its tensors are private attributes, and `state_dict()`
    hands out copies. What Python cannot prevent is an edit of those private tensors.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        # torch.compile sets `training` to what it is.
        changes = name not in self.__dict__ or self.__dict__[name] is not value
        if "_sealed" in self.__dict__ and changes and name not in _TORCHS_OWN:
            _refuse(f"cannot set {name!r}")
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        _refuse(f"cannot delete {name!r}")

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """Refuse."""
        _refuse(f"cannot register the buffer {name!r}")

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Refuse."""
        _refuse(f"cannot register the parameter {name!r}")

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Refuse, once sealed."""
        if "_sealed" in self.__dict__:
            _refuse(f"cannot add the module {name!r}")
        super().add_module(name, module)

    def train(self: Self, mode: bool = True) -> Self:
        """Refuse training mode; evaluation mode is where it is."""
        if mode:
            _refuse("train()")
        return self

    def requires_grad_(self: Self, requires_grad: bool = True) -> Self:
        """Refuse gradients; without them it is already."""
        if requires_grad:
            _refuse("requires_grad_()")
        return self

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Refuse."""
        _refuse("load_state_dict()")

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Behind to(), cuda(), half() and their like: fine where nothing would change.
        for module in self.modules():
            for tensor in module.__dict__.values():
                if isinstance(tensor, Tensor):
                    moved = fn(tensor.new_empty(0))
                    if (moved.dtype, moved.device) != (tensor.dtype, tensor.device):
                        _refuse(f"cannot move from {tensor.dtype} on {tensor.device}")
                    break
        return self


class SealedList(Sealed, nn.ModuleList):
    """A list of modules that refuses every edit once sealed."""

    def insert(self, index: int, module: nn.Module) -> None:
        """Refuse."""
        _refuse(f"cannot insert at {index}")


def seal(module: nn.Module) -> None:
    """Refuse every edit of the module and of those inside from now on."""
    for part in module.modules():
        part.__dict__["training"] = False
        part.__dict__["_sealed"] = True


def symbolic(x: Tensor) -> bool:
    """Whether a call is being traced or transformed: then only dense tensors may be touched."""
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return torch.compiler.is_compiling() or tracing or type(x) is not Tensor
