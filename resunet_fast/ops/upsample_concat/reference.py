"""upsample_concat in plain torch: cat([upsample(x), skip], channels), as the decoder reads it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import dense, layout_of
from ..upsample import reference as upsample


def forward(input: Tensor, skip: Tensor, mode: str) -> Tensor:
    """Resize `input` to the skip's size and put `skip` behind it, in the skip's layout."""
    low = upsample.forward(input, skip.shape[2:], mode)
    return dense(torch.cat([low, skip], 1), layout_of(skip))
