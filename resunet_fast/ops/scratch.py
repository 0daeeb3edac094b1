"""Memory for what one layer writes and the next one reads, kept between calls.

The concatenation at the top level is the largest tensor of a frozen network, so large that the C
library returns it to the system each time it is freed, and the system clears every page of it
again: 3 to 4% of a float32 call at 256x256. So are the weights that are packed for one call.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

_LIMIT = 256 * 2**20  # bytes kept per thread
_kept = threading.local()


@contextmanager
def scratch(like: Tensor, shape: Sequence[int]) -> Iterator[Tensor]:
    """Lend an uninitialised channels_last tensor of `like`'s dtype and device.

    It must not be used after the `with`. A call inside the `with` gets memory of its own. On a GPU
    torch's allocator keeps memory already.

    Args:
        like: settles dtype and device.
        shape: [N, C, H, W].
    """
    n, c, h, w = shape
    size = math.prod(shape) * like.element_size()
    if like.device.type != "cpu" or size > _LIMIT:
        yield like.new_empty(n, h, w, c).permute(0, 3, 1, 2)
        return
    buffer: Tensor | None = _kept.__dict__.pop("buffer", None)
    if buffer is None or buffer.numel() < size:
        with torch.inference_mode(False):
            buffer = torch.empty(size, dtype=torch.uint8)
    try:
        yield buffer[:size].view(like.dtype).view(n, h, w, c).permute(0, 3, 1, 2)
    finally:
        _kept.buffer = buffer
