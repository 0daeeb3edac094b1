"""conv_bn_act composed of a convolution and a bn_act, for every backend that has both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..conv2d.op import ConvArguments

Outputs = tuple["Tensor | None", ...]


def composed(
    convolve: Callable[..., Tensor], normalise: Callable[..., Outputs], *, in_place: bool
) -> Callable[..., Outputs]:
    """Return the forward of conv_bn_act.

    Args:
        convolve: forward of conv2d.
        normalise: forward of bn_act.
        in_place: `normalise` can write over its input (keyword `in_place`); used when nothing is
            kept for backward.
    """

    def forward(*arguments: Any) -> Outputs:
        conv = ConvArguments(*arguments[:9])
        *norm, keep = arguments[9:]
        batch_stats = norm[2] is None
        if batch_stats:
            # A constant per channel cancels in (y - mean): see the operator's docstring.
            conv = conv._replace(bias=None)
        y = convolve(*conv)
        over_y = {"in_place": True} if in_place and not keep else {}
        output, pooled, *stats = normalise(y, *norm, **over_y)
        return output, pooled, y if keep else None, *stats

    return forward
