"""The two ceilings of a machine, measured: a large copy and a large matrix product."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F

from .roofline import Ceilings
from .timing import Clock

# Elements per side of the product, and bytes of the copy: far beyond the caches, about a second.
SIDE = {"cuda": 8192, "cpu": 2048}
BYTES = {"cuda": 4 << 30, "cpu": 256 << 20}
RUNS = 9


@cache
def measure(device: str, dtype: torch.dtype, *, small: bool = False) -> Ceilings:
    """Measure both ceilings, each the best of a few runs on random data.

    Args:
        device: "cpu" or "cuda".
        dtype: of the matrix product; zeros would run faster than real data does.
        small: sizes for a dry run, whose results mean nothing.
    """
    kind = torch.device(device).type
    side = 64 if small else SIDE[kind]
    count = (1 << 12) if small else BYTES[kind] // 4
    clock = Clock(device)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    # The same product as a 1x1 convolution: on a CPU another library computes it, and which of the
    # two is faster depends on the processor.
    image = a.view(1, 16, side // 16, side).permute(0, 3, 1, 2)
    filters = b.t().contiguous().view(side, side, 1, 1)
    products = [
        min(clock(lambda: torch.mm(a, b, out=out)), clock(lambda: F.conv2d(image, filters)))
        for _ in range(RUNS)
    ]
    copies = [clock(lambda: target.copy_(source)) for _ in range(RUNS)]
    return Ceilings(
        bytes_per_second=2e3 * source.numel() * source.element_size() / min(copies[2:]),
        flops_per_second=2e3 * side**3 / min(products[2:]),
        dtype=str(dtype).removeprefix("torch."),
    )
