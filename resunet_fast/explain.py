"""Why something runs the way it does: an operator on some inputs, or every block of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from . import registry
from .frozen import FrozenResUNet
from .frozen.blocks import FrozenBlock
from .frozen.graphs import GraphCache
from .frozen.layers import FrozenConv, FrozenTransposed
from .models.wiring import Wiring
from .modules import fused
from .registry import Explanation


@dataclass(frozen=True)
class ModelExplanation:
    """Every block and transposed convolution, with what stands against fusing it (empty: it is).

    Attributes:
        blocks: by name; for a frozen model, what is not folded, or whose weight is not packed.
        otherwise: what a block without reasons is.
        calls: how a frozen model's calls run.
    """

    blocks: dict[str, list[str]]
    otherwise: str = "fused"
    calls: str = ""

    def __str__(self) -> str:
        lines = [
            f"{name}: " + ("; ".join(reasons) if reasons else self.otherwise)
            for name, reasons in self.blocks.items()
        ]
        return "\n".join([*lines, *filter(None, [self.calls])])


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
    if isinstance(subject, FrozenResUNet):
        return _explain_frozen(subject)
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


def _explain_frozen(model: FrozenResUNet) -> ModelExplanation:
    kinds = (FrozenBlock, FrozenTransposed)
    blocks = {
        name: module.reservations()
        for name, module in model.named_modules()
        if isinstance(module, kinds) or (isinstance(module, FrozenConv) and name == "outc")
    }
    if model.device.type != "cuda":
        return ModelExplanation(blocks, "folded and packed", "calls run layer by layer")
    return ModelExplanation(
        blocks,
        "folded",
        "calls replay a CUDA graph, captured at the first of each shape, layout and stream; the"
        f" last {GraphCache.LIMIT} are kept",
    )
