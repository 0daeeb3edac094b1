"""The networks' blocks, frozen, and how they are strung together.

Which batch norm can be folded: the one that follows a convolution whose result nobody else reads.
In post-activation blocks that is every one. In pre-activation blocks it is the second; the first
one reads the block's input, which the shortcut, the skip connection or the pooling reads as well,
or which is a concatenation: it stays a pass of its own, together with its ReLU.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..modules.fused import UPSAMPLE as MODES
from ..ops.layout import dense, layout_of
from ..ops.scratch import scratch
from ..ops.upsample.op import UPSAMPLE
from ..ops.upsample_concat.op import UPSAMPLE_CONCAT
from ..registry import forced_backend
from .layers import FrozenConv, FrozenNorm
from .sealed import Sealed, symbolic


class FrozenBlock(Sealed):
    """conv2(conv1([norm(x)])) [+ x | + shortcut(x)]: every block of every network.

    Args:
        norm: the batch norm and ReLU in front of a pre-activation block, or None.
        conv1, conv2: with everything that follows them folded in.
        shortcut: the projection, or None.
        identity: x itself is added.
    """

    def __init__(
        self,
        norm: FrozenNorm | None,
        conv1: FrozenConv,
        conv2: FrozenConv,
        shortcut: FrozenConv | None = None,
        *,
        identity: bool = False,
    ) -> None:
        super().__init__()
        self.norm = norm
        self.conv1 = conv1
        self.conv2 = conv2
        self.shortcut = shortcut
        self.identity = identity

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to [N, K, H', W']."""
        residual = x if self.identity else None
        if self.shortcut is not None:
            residual = self.shortcut(x)
        y = self.conv1(x if self.norm is None else self.norm(x))
        z: Tensor = self.conv2(y, residual)
        return z

    def reservations(self) -> list[str]:
        """Say what is not folded, or whose weight is not packed."""
        own = ["norm is a pass of its own: others read its input"] if self.norm is not None else []
        convolutions = {"conv1": self.conv1, "conv2": self.conv2, "shortcut": self.shortcut}
        return own + [
            f"{name} is not packed: {reason}"
            for name, convolution in convolutions.items()
            if convolution is not None
            for reason in convolution.reservations()
        ]


def up(block: nn.Module, low: Tensor, skip: Tensor, mode: str) -> Tensor:
    """Run a decoder block on the upsampled features and the skip."""
    result: Tensor
    if mode == "none" or symbolic(skip):
        if mode != "none":
            low = UPSAMPLE(low, skip.shape[2:], MODES[mode], forced_backend())
        result = block(dense(torch.cat([low, skip], 1), layout_of(skip)))
        return result
    n, channels, h, w = skip.shape
    with scratch(skip, (n, low.shape[1] + channels, h, w)) as x:
        UPSAMPLE_CONCAT(low, skip, x, MODES[mode], forced_backend())
        result = block(x)
    return result
