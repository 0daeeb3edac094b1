"""Networks that see a window of a larger image enlarge their levels as in the whole image.

Bilinear interpolation with align_corners=True maps row i of H to row i (h - 1) / (H - 1) of h, and
nearest takes row floor(i h / H): both depend on the image's size, so that in a tile they would land
elsewhere, by up to half a row of the coarser level. Here rows and columns are counted in the whole
image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .models import Wiring
from .models.wiring import Interpolation

Window = tuple[slice, slice]


def windowed(network: Wiring, windows: Sequence[Window], size: tuple[int, int]) -> Wiring:
    """Return the network for one forward pass on windows of a larger image; weights are shared.

    Args:
        network: left as it is.
        windows: (rows, columns) of each image of the batch; they start at multiples of the
            network's coarsest pixel.
        size: (height, width) of the whole image.
    """
    sizes = [size]
    for _ in network.widths[1:]:
        # Pooling drops the last row of an odd size, a strided convolution keeps it.
        half = 1 if network.downsample == "stride" else 0
        sizes.append(((sizes[-1][0] + half) // 2, (sizes[-1][1] + half) // 2))
    up = _WindowedUp(network, windows, sizes)
    # Not copy.copy, which would run the network's own __setstate__ for every tile.
    twin = object.__new__(type(network))
    twin.__dict__.update(network.__dict__, stages=replace(network.stages, up=up))
    return twin


@dataclass
class _WindowedUp:
    """The stage `up` of a network, called once per level from the coarsest upwards."""

    network: Wiring
    windows: Sequence[Window]
    sizes: list[tuple[int, int]]

    def __call__(self, block: nn.Module, low: Tensor, skip: Tensor, mode: Interpolation) -> Tensor:
        if mode != "none":
            coarse, fine = self.sizes.pop(), self.sizes[-1]
            cell = 2 ** len(self.sizes)
            parts = []
            for image, window in zip(low, self.windows, strict=True):
                for axis in (0, 1):
                    first = window[axis].start // cell
                    rows = torch.arange(skip.shape[2 + axis], device=low.device) + 2 * first
                    where = _coordinates(rows, coarse[axis], fine[axis], mode) - first
                    image = _sample(image, where, 1 + axis)
                parts.append(image)
            low = torch.stack(parts) if len(parts) > 1 else parts[0][None]
        return self.network.stages.up(block, low, skip, "none")


def _coordinates(rows: Tensor, coarse: int, fine: int, mode: Interpolation) -> Tensor:
    """Where rows of the finer level lie on the coarser one, [rows] float64."""
    if mode == "nearest":
        return (rows * coarse // fine).double()
    return rows.double() * ((coarse - 1) / max(fine - 1, 1))


def _sample(image: Tensor, where: Tensor, dim: int) -> Tensor:
    """Interpolate linearly between the rows, or columns, of [C, H, W]."""
    where = where.clamp(0, image.shape[dim] - 1)
    below = where.long()
    share = (where - below).to(image.dtype)
    lower = image.index_select(dim, below)
    if not bool(share.any()):
        return lower
    upper = image.index_select(dim, (below + 1).clamp(max=image.shape[dim] - 1))
    shape = [-1 if axis == dim else 1 for axis in range(3)]
    return lower.lerp_(upper, share.view(shape))
