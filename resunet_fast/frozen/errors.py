"""How far every folded layer is from the layers it stands for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .folding import affine
from .layers import FrozenConv

if TYPE_CHECKING:
    from ..models.wiring import Wiring
    from .network import FrozenResUNet


@dataclass(frozen=True)
class LayerErrors:
    """Relative error of every folded layer, ||frozen - float64|| / ||float64||, by name."""

    by_layer: dict[str, float]

    def __str__(self) -> str:
        width = max(map(len, self.by_layer))
        return "\n".join(f"{name:{width}s}  {error:.2e}" for name, error in self.by_layer.items())


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return ||actual - expected|| / ||expected|| in float64; 0 where both are zero."""
    judge = expected.double()
    difference, norm = float((actual.double() - judge).norm()), float(judge.norm())
    return 0.0 if difference == 0 else difference / norm if norm else float("inf")


def layer_errors(frozen: FrozenResUNet, model: Wiring, x: Tensor) -> LayerErrors:
    """Run the frozen network on `x` and recompute every convolution's result in float64."""
    errors: dict[str, float] = {}

    def compare(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        assert isinstance(layer, FrozenConv)
        source, residual = (*inputs, None)[:2]
        expected = _unfolded(layer, model, source, residual)
        errors[layer.sources[0]] = relative_error(output, expected)

    layers = [module for module in frozen.modules() if isinstance(module, FrozenConv)]
    handles = [layer.register_forward_hook(compare) for layer in layers]
    try:
        with torch.no_grad():
            frozen.run(x)
    finally:
        for handle in handles:
            handle.remove()
    return LayerErrors(errors)


def _unfolded(layer: FrozenConv, model: nn.Module, x: Tensor, residual: Tensor | None) -> Tensor:
    conv, norm = (model.get_submodule(name) if name else None for name in layer.sources)
    assert isinstance(conv, nn.Conv2d)
    bias = None if conv.bias is None else conv.bias.double()
    z = F.conv2d(x.double(), conv.weight.double(), bias, *layer.geometry)
    if isinstance(norm, nn.BatchNorm2d):
        scale, shift = affine(norm)
        z = z * scale[:, None, None] + shift[:, None, None]
    if residual is not None:
        z = z + residual.double()
    return z.relu() if layer.relu else z
