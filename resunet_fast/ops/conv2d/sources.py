"""What a convolution of two sources reads: one buffer, written in a single sweep and then dropped.

Two convolutions that accumulate would read and write the result once more and copy two slices of
the weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import computed_by
from ..layout import dense, empty, layout_of
from ..upsample_concat.op import UPSAMPLE_CONCAT


def join(input: Tensor, skip: Tensor | None, mode: str, backend: str) -> Tensor:
    """Return the tensor that is convolved: the input, or both sources in one buffer.

    Args:
        input, skip, mode: as conv2d has them.
        backend: whose upsample_concat writes the buffer; empty takes the selected one.
    """
    if skip is None:
        return input
    if mode == "none":
        return dense(torch.cat([input, skip], 1), layout_of(input))
    n, channels, *size = skip.shape
    x = empty(input, (n, input.shape[1] + channels, *size), layout_of(input))
    computed_by(backend, UPSAMPLE_CONCAT)(input, skip, x, mode)
    return x
