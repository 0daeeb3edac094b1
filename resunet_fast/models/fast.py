"""The networks with fused blocks: the wiring's arguments and state dict, less time and memory."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import eager
from ..modules import fused
from .catalogue import build
from .wiring import ListingWiring, Stages, Wiring

FUSED_STAGES = Stages(
    fused.DoubleConv, fused.ResBlock, fused.PreActResBlock, fused.down, fused.up, fused.enlarge
)


class _Fast(Wiring):
    stages: ClassVar[Stages] = FUSED_STAGES

    def __init__(self, *arguments: int, recompute: bool = False, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # Convolutions of channels_last activations would copy a contiguous weight at every call.
        for parameter in self.parameters():
            if parameter.dim() == 4:
                # Not Module.to, which cannot exchange fake tensors.
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        self.set_recompute(recompute)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits in the layout of `x`; inside, activations are channels_last."""
        if eager.required():
            # Transforms run the plain operations, and vmap cannot change the layout.
            return super().forward(x)
        contiguous = x.is_contiguous()
        if contiguous and x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        logits = super().forward(x)
        return logits.contiguous() if contiguous else logits

    def set_recompute(self, recompute: bool) -> None:
        """Choose whether every block computes its first ReLU again in backward, to save memory.

        Args:
            recompute: True keeps about a quarter less for backward and costs one more sweep over
                memory per block.
        """
        for module in self.modules():
            if isinstance(module, fused.BLOCKS):
                module.recompute = recompute


class ResUNet(_Fast):
    """A residual U-Net with fused blocks: [N, in_channels, H, W] to logits [N, num_classes, H, W].

    Same arguments, state-dict keys and values as :class:`resunet_fast.reference.ResUNet`. Weights
    of convolutions lie in channels_last memory, as after `.to(memory_format=torch.channels_last)`.

    Args:
        in_channels, num_classes: channels of the image and of the logits.
        recompute: see :meth:`set_recompute`.
        options: every other keyword of :class:`resunet_fast.models.wiring.Wiring`: base_width,
            width_factors, encoder, order, downsample, upsample, decoder_residual.

    Raises:
        ValueError: an argument is out of its range; the sentence names it.
    """

    def __init__(
        self, in_channels: int, num_classes: int, *, recompute: bool = False, **options: Any
    ) -> None:
        super().__init__(in_channels, num_classes, recompute=recompute, **options)


class UNetWithResidualConnections(_Fast, ListingWiring):
    """The article's network, repaired, with fused blocks.

    Args:
        n_channels, n_classes: channels of the image and of the logits.
        recompute: see :meth:`set_recompute`.
    """

    def __init__(self, n_channels: int, n_classes: int, *, recompute: bool = False) -> None:
        _Fast.__init__(self, n_channels, n_classes, recompute=recompute)


def create_model(
    name: str, *, in_channels: int = 3, num_classes: int = 1, **overrides: Any
) -> ResUNet:
    """Return a new fused network by its name.

    Args:
        name: one of :func:`resunet_fast.list_models`.
        in_channels, num_classes: channels of the image and of the logits.
        overrides: keyword arguments of :class:`ResUNet`, such as `base_width=16`.

    Raises:
        ValueError: an unknown name (the message lists the known ones) or a bad value.
        TypeError: an unknown keyword.
    """
    return build(ResUNet, name, in_channels, num_classes, **overrides)
