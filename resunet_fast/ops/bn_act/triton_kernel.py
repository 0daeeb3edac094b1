"""bn_act by Triton: two sweeps over memory forward, two backward, with either layout as it lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ..layout import accumulator, dense, empty, layout_of
from ..triton_dtype import accumulator_type
from . import triton_backward as bwd
from . import triton_blocks as device
from . import triton_forward as fwd
from .triton_builds import builds as builds
from .triton_tiling import Extent, Tiling, blocks_for, extent_of, power_of_two, tiling

# Tiles, and values of one kind, that a program of a merge holds: with many tiles few channels, to
# spread the reading over the GPU.
MERGE_TILES, MERGE_ELEMENTS = 1024, 4096


Pair = tuple["Tensor | None", "Tensor | None"]


def statistics(x: Tensor, layout: torch.memory_format) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of a tensor that is dense in `layout`."""
    dtype = accumulator(x.dtype)
    n, c, h, w = x.shape
    if x.numel() == 0:
        return x.new_full((c,), torch.nan, dtype=dtype), x.new_full((c,), torch.nan, dtype=dtype)
    mean = x.new_empty(c, dtype=dtype)
    var = torch.empty_like(mean)
    extent = extent_of(x, layout, pool=False)
    tiles = tiling(extent, blocks_for(reduces=True, pool=False))
    moments = x.new_empty((tiles.tiles, 2, c), dtype=dtype)
    # One program: a span of positions of one run, a block of channels.
    fwd.bn_act_stats_fwd_kernel[(tiles.programs,)](
        x,
        moments,
        c,
        extent.pixels,
        tiles.spans,
        tiles.steps,
        **_blocks(x, extent, tiles),
        num_warps=tiles.num_warps,
    )
    block_t, block_c = _merge_blocks(tiles.tiles, c)
    # One program: all tiles of a few channels.
    fwd.bn_act_merge_fwd_kernel[(triton.cdiv(c, block_c),)](
        moments,
        mean,
        var,
        c,
        extent.pixels,
        tiles.spans,
        tiles.steps * tiles.block_p,
        tiles.tiles,
        n * h * w,
        BLOCK_T=block_t,
        BLOCK_C=block_c,
    )
    return mean, var


def _merge_blocks(tiles: int, channels: int) -> tuple[int, int]:
    block_t = min(power_of_two(tiles), MERGE_TILES)
    return block_t, min(power_of_two(channels), MERGE_ELEMENTS // block_t)


def _blocks(x: Tensor, extent: Extent, tiles: Tiling) -> dict[str, object]:
    """The constants that every kernel over an image takes."""
    return {
        "BLOCK_P": tiles.block_p,
        "BLOCK_C": tiles.block_c,
        "UNIT": extent.unit,
        "CHANNELS_LAST": extent.channels_last,
        "ACC": accumulator_type(x),
    }


def _vector(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    residual: Tensor | None,
    residual_norm: bool,
    residual_weight: Tensor | None,
    residual_bias: Tensor | None,
    residual_mean: Tensor | None,
    residual_var: Tensor | None,
    residual_eps: float,
    relu: bool,
    pool: bool,
) -> tuple[Tensor | None, ...]:
    """Compute as the reference does."""
    layout = layout_of(input)
    x = dense(input, layout)
    r = None if residual is None else dense(residual, layout)
    n, c, h, w = x.shape
    own: Pair = (None, None)
    residual_own: Pair = (None, None)
    with torch.cuda.device_of(x):
        if mean is None:
            own = statistics(x, layout)
        if r is not None and residual_norm and residual_mean is None:
            residual_own = statistics(r, layout)
        output = empty(x, x.shape, layout)
        pooled = empty(x, (n, c, h // 2, w // 2), layout) if pool else None
        main = (*(own if mean is None else (mean, var)), weight, bias)
        stats = residual_own if residual_mean is None else (residual_mean, residual_var)
        shortcut = (*stats, residual_weight, residual_bias)
        if x.numel() > 0:
            _sweep(x, main, eps, r, shortcut, residual_eps, output, pooled, relu)
    return output, pooled, *own, *residual_own


def _sweep(
    x: Tensor,
    main: Sequence[Tensor | None],
    eps: float,
    r: Tensor | None,
    shortcut: Sequence[Tensor | None],
    residual_eps: float,
    output: Tensor,
    pooled: Tensor | None,
    relu: bool,
) -> None:
    """Write the result; `main` and `shortcut` are mean, variance, weight and bias."""
    pool = pooled is not None
    extent = extent_of(x, layout_of(x), pool)
    tiles = tiling(extent, blocks_for(reduces=False, pool=pool))
    kind = device.NO_RESIDUAL
    if r is not None:
        kind = device.PLAIN_RESIDUAL if shortcut[0] is None else device.NORMALISED_RESIDUAL
    # One program: a few blocks of positions of one run, a block of channels.
    fwd.bn_act_fwd_kernel[(tiles.programs,)](
        x,
        *(_vector(v) for v in main),
        r,
        *(_vector(v) for v in shortcut),
        output,
        pooled,
        extent.channels,
        extent.pixels,
        extent.positions,
        *x.shape[2:],
        tiles.spans,
        tiles.steps,
        eps,
        residual_eps,
        **_blocks(x, extent, tiles),
        HAS_WEIGHT=main[2] is not None,
        HAS_BIAS=main[3] is not None,
        RESIDUAL=kind.value,
        HAS_RWEIGHT=shortcut[2] is not None,
        HAS_RBIAS=shortcut[3] is not None,
        RELU=relu,
        POOL=pool,
        num_warps=tiles.num_warps,
    )


def backward(
    grad_output: Tensor | None,
    grad_pooled: Tensor | None,
    input: Tensor,
    output: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    batch_stats: bool,
    residual: Tensor | None,
    residual_weight: Tensor | None,
    residual_mean: Tensor | None,
    residual_var: Tensor | None,
    residual_eps: float,
    residual_batch_stats: bool,
    relu: bool,
    output_mask: Sequence[bool],
    *,
    sums: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Compute as the reference does; `sums` are those of tiles, [tiles, 3, C], if already known."""
    assert grad_pooled is None or output is not None
    layout = layout_of(input)
    x = dense(input, layout)
    likes = (None, weight, weight, None, residual_weight, residual_weight)
    grads = tuple(
        _gradient(i, like, x, layout) if wanted else None
        for i, (like, wanted) in enumerate(zip(likes, output_mask, strict=True))
    )
    if x.numel() == 0:
        return tuple(None if grad is None else grad.zero_() for grad in grads)
    call = _Backward(
        grad=None if grad_output is None else dense(grad_output, layout),
        pooled=None if grad_pooled is None else dense(grad_pooled, layout),
        x=x,
        z=None if output is None else dense(output, layout),
        main=(mean.contiguous(), var.contiguous(), _vector(weight), _vector(bias)),
        eps=eps,
        batch_stats=batch_stats,
        r=None if residual is None else dense(residual, layout),
        shortcut=(_vector(residual_mean), _vector(residual_var), _vector(residual_weight)),
        residual_eps=residual_eps,
        residual_batch_stats=residual_mean is not None and residual_batch_stats,
        relu=relu,
        extent=extent_of(x, layout, grad_pooled is not None),
    )
    with torch.cuda.device_of(x):
        slopes = call.slopes(grads, sums)
        call.sweep(grads, slopes)
    return grads


def _gradient(i: int, like: Tensor | None, x: Tensor, layout: torch.memory_format) -> Tensor:
    if i in (0, 3):  # the input's and the residual's
        return empty(x, x.shape, layout)
    return x.new_empty(x.shape[1], dtype=accumulator(x.dtype) if like is None else like.dtype)


@dataclass(frozen=True)
class _Backward:
    """One call's operands, dense, and its two launches."""

    grad: Tensor | None
    pooled: Tensor | None
    x: Tensor
    z: Tensor | None
    main: tuple[Tensor, Tensor, Tensor | None, Tensor | None]
    eps: float
    batch_stats: bool
    r: Tensor | None
    shortcut: tuple[Tensor | None, Tensor | None, Tensor | None]
    residual_eps: float
    residual_batch_stats: bool
    relu: bool
    extent: Extent

    @property
    def normalised(self) -> bool:
        """Whether the residual has a batch norm of its own."""
        return self.shortcut[0] is not None

    def flags(self) -> dict[str, object]:
        """The constants that both sweeps take."""
        mask = device.NO_MASK
        if self.relu:
            mask = device.INPUT_MASK if self.z is None else device.OUTPUT_MASK
        return {
            "HAS_GRAD": self.grad is not None,
            "POOL": self.pooled is not None,
            "MASK": mask.value,
            "HAS_WEIGHT": self.main[2] is not None,
            "HAS_BIAS": self.main[3] is not None,
            "NORMALISED": self.normalised,
        }

    def sums(self) -> Tensor:
        """Read the images for the sums of every tile."""
        x, extent, c = self.x, self.extent, self.extent.channels
        tiles = tiling(extent, blocks_for(reduces=True, pool=self.pooled is not None))
        sums = x.new_empty((tiles.tiles, 3, c), dtype=accumulator(x.dtype))
        # One program: a span of positions of one run, a block of channels.
        bwd.bn_act_sums_bwd_kernel[(tiles.programs,)](
            self.grad,
            self.pooled,
            x,
            self.z,
            *self.main,
            self.r,
            self.shortcut[0],
            sums,
            c,
            extent.pixels,
            extent.positions,
            *x.shape[2:],
            tiles.spans,
            tiles.steps,
            self.eps,
            **_blocks(x, extent, tiles),
            **self.flags(),
            num_warps=tiles.num_warps,
        )
        return sums

    def slopes(self, grads: tuple[Tensor | None, ...], sums: Tensor | None) -> Tensor | None:
        """Write the vectors' gradients; return what the sweep subtracts, if anything needs it."""
        dx, dweight, dbias, dr, drweight, drbias = grads
        in_sweep = (dx is not None and self.batch_stats) or (
            dr is not None and self.residual_batch_stats
        )
        if not in_sweep and all(v is None for v in (dweight, dbias, drweight, drbias)):
            return None
        sums = self.sums() if sums is None else sums
        tiles, _, c = sums.shape
        slopes = sums.new_empty((3, c), dtype=accumulator(self.x.dtype))
        block_t, block_c = _merge_blocks(tiles, c)
        # One program: all tiles of a few channels.
        bwd.bn_act_merge_bwd_kernel[(triton.cdiv(c, block_c),)](
            sums,
            self.main[1],
            self.shortcut[1],
            slopes,
            dweight,
            dbias,
            drweight,
            drbias,
            c,
            tiles,
            self.x.numel() // c,
            self.eps,
            self.residual_eps,
            BLOCK_T=block_t,
            BLOCK_C=block_c,
            HAS_DWEIGHT=dweight is not None,
            HAS_DBIAS=dbias is not None,
            HAS_DRWEIGHT=drweight is not None,
            HAS_DRBIAS=drbias is not None,
            NORMALISED=self.normalised,
        )
        return slopes

    def sweep(self, grads: tuple[Tensor | None, ...], slopes: Tensor | None) -> None:
        """Write the images' gradients, if any is wanted."""
        dx, dr = grads[0], grads[3]
        if dx is None and dr is None:
            return
        tiles = tiling(self.extent, blocks_for(reduces=False, pool=self.pooled is not None))
        # One program: a few blocks of positions of one run, a block of channels.
        bwd.bn_act_bwd_kernel[(tiles.programs,)](
            self.grad,
            self.pooled,
            self.x,
            self.z,
            *self.main,
            self.r,
            *self.shortcut,
            slopes,
            dx,
            dr,
            self.extent.channels,
            self.extent.pixels,
            self.extent.positions,
            *self.x.shape[2:],
            tiles.spans,
            tiles.steps,
            self.eps,
            self.residual_eps,
            **_blocks(self.x, self.extent, tiles),
            **self.flags(),
            BATCH_STATS=self.batch_stats,
            HAS_RWEIGHT=self.shortcut[2] is not None,
            RBATCH_STATS=self.residual_batch_stats,
            HAS_DX=dx is not None,
            HAS_DR=dr is not None,
            num_warps=tiles.num_warps,
        )
