"""Why something runs the way it does: an operator on some inputs, or every block of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from . import registry
from .models.wiring import Wiring
from .modules import fused
from .registry import Explanation


@dataclass(frozen=True)
class ModelExplanation:
    """Every block and transposed convolution, with what stands against fusing it (empty: it is)."""

    blocks: dict[str, list[str]]

    def __str__(self) -> str:
        return "\n".join(
            f"{name}: " + ("; ".join(reasons) if reasons else "fused")
            for name, reasons in self.blocks.items()
        )


def explain(subject: str | nn.Module, *inputs: Any) -> Explanation | ModelExplanation:
    """Say which implementation an operator chooses, or which blocks of a model run fused.

    Args:
        subject: an operator's name such as "bn_act", or a model.
        inputs: the operator's leading arguments; none for a model.

    Returns:
        The reasons, readable when printed.

    Raises:
        ValueError: there is no such operator, or inputs were given for a model.
    """
    if not isinstance(subject, nn.Module):
        return registry.explain(subject, *inputs)
    if inputs:
        raise ValueError(f"inputs: expected none for a model, got {len(inputs)}")
    ups = _transposed_convolutions(subject)
    blocks = {}
    for name, module in subject.named_modules():
        if isinstance(module, fused.BLOCKS):
            blocks[name or type(module).__name__] = fused.reasons_against(module)
        elif module in ups:
            blocks[name] = fused.reasons_against_enlarging(module)
    return ModelExplanation(blocks)


def _transposed_convolutions(model: nn.Module) -> list[nn.Module]:
    """Those which a fused network hands to the operator; others are ordinary modules."""
    networks = [module for module in model.modules() if isinstance(module, Wiring)]
    fast = [network for network in networks if network.stages.enlarge is fused.enlarge]
    return [up for network in fast for up in network.ups]
