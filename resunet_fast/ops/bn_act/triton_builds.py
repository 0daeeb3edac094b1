"""The kernels of bn_act that are compiled ahead of time, as launches at the network's top level."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import triton.language as tl

from ..triton_build import DTYPES, Build, launch
from . import triton_backward as bwd
from . import triton_blocks as device
from . import triton_forward as fwd
from .triton_tiling import (
    REDUCTION,
    SWEEP,
    WINDOW_REDUCTION,
    WINDOW_SWEEP,
    Blocks,
    Extent,
    Tiling,
    tiling,
)

IMAGES, CHANNELS, SIZE = 16, 64, 512


def builds() -> list[Build]:
    """Every kernel with the flags that change its code, in the dtypes and layouts that matter."""
    return [*_merges(), *_images(), _multiple_of_eight()]


def _images() -> Iterator[Build]:
    for dtype in DTYPES:
        for last in (True, False):
            yield _stats(dtype, last)
            yield from (make(dtype, last, "plain") for make in (_forward, _sums, _backward))
        yield from (make(dtype, True, "norm-pool") for make in (_forward, _sums, _backward))
        yield _forward(dtype, True, "residual")
    yield from (make("bf16", False, "norm-pool") for make in (_forward, _sums, _backward))


def _multiple_of_eight() -> Build:
    """As many channels as one access holds, of which Triton itself sees no multiple."""
    build = _forward("bf16", True, "plain")
    return replace(
        build,
        name=_name("fwd", "bf16", True, "eight"),
        aligned=tuple(name for name in build.aligned if name != "C"),
        constexprs={**build.constexprs, "UNIT": 8},
    )


def _sizes(blocks: Blocks, last: bool, pool: bool) -> tuple[dict[str, Any], Tiling]:
    plane = SIZE * SIZE
    positions = plane // 4 if pool else IMAGES * plane if last else plane
    runs = IMAGES if pool or not last else 1
    extent = Extent(runs, positions, plane if runs > 1 else IMAGES * plane, CHANNELS, last)
    tiles = tiling(extent, blocks)
    sizes = {
        "C": CHANNELS,
        "pixels": extent.pixels,
        "positions": extent.positions,
        "H": SIZE,
        "W": SIZE,
        "spans": tiles.spans,
        "steps": tiles.steps,
    }
    return sizes, tiles


def _constants(tiles: Tiling, last: bool) -> dict[str, Any]:
    blocks = {"BLOCK_P": tiles.block_p, "BLOCK_C": tiles.block_c, "UNIT": 16}
    return {**blocks, "CHANNELS_LAST": last, "ACC": tl.float32}


def _name(kernel: str, dtype: str, last: bool, kind: str) -> str:
    return f"bn_act_{kernel}-{kind}-{dtype}-{'nhwc' if last else 'nchw'}"


def _stats(dtype: str, last: bool) -> Build:
    sizes, tiles = _sizes(REDUCTION, last, False)
    operands = {"p_x": f"*{dtype}", "p_moments": "*fp32"}
    operands |= {k: sizes[k] for k in ("C", "pixels", "spans", "steps")}
    name = _name("stats_fwd", dtype, last, "plain")
    return launch(
        name,
        fwd.bn_act_stats_fwd_kernel,
        operands,
        _constants(tiles, last),
        vector=True,
        num_warps=tiles.num_warps,
    )


def _forward(dtype: str, last: bool, kind: str) -> Build:
    pool, image = kind == "norm-pool", f"*{dtype}"
    sizes, tiles = _sizes(WINDOW_SWEEP if pool else SWEEP, last, pool)
    vectors = dict.fromkeys(("p_mean", "p_var", "p_weight", "p_bias"), "*fp32")
    own = dict.fromkeys(
        ("p_rmean", "p_rvar", "p_rweight", "p_rbias"), "*fp32" if kind == "norm-pool" else None
    )
    operands = {"p_x": image, **vectors, "p_r": None if kind == "plain" else image, **own}
    operands |= {"p_z": image, "p_pooled": image if pool else None, **sizes}
    operands |= {"eps": "fp64", "reps": "fp64"}
    residual = {
        "plain": device.NO_RESIDUAL,
        "residual": device.PLAIN_RESIDUAL,
        "norm-pool": device.NORMALISED_RESIDUAL,
    }[kind]
    flags = dict.fromkeys(("HAS_WEIGHT", "HAS_BIAS", "RELU"), True)
    flags |= dict.fromkeys(("HAS_RWEIGHT", "HAS_RBIAS", "POOL"), pool)
    constants = {**_constants(tiles, last), **flags, "RESIDUAL": residual.value}
    name = _name("fwd", dtype, last, kind)
    # Windows of planes take every other pixel: no wide access there.
    return launch(
        name,
        fwd.bn_act_fwd_kernel,
        operands,
        constants,
        vector=last or not pool,
        num_warps=tiles.num_warps,
    )


def _gradient(
    dtype: str, last: bool, pool: bool, blocks: Blocks
) -> tuple[dict[str, Any], dict[str, Any], int]:
    image = f"*{dtype}"
    sizes, tiles = _sizes(blocks, last, pool)
    vectors = dict.fromkeys(("p_mean", "p_var", "p_weight", "p_bias"), "*fp32")
    operands: dict[str, Any] = {"p_grad": image, "p_x": image, **vectors, "eps": "fp64"}
    operands |= dict.fromkeys(("p_grad_pooled", "p_z", "p_r"), image if pool else None)
    operands |= {"p_rmean": "*fp32" if pool else None, **sizes}
    flags: dict[str, Any] = dict.fromkeys(("HAS_GRAD", "HAS_WEIGHT", "HAS_BIAS"), True)
    flags |= {"POOL": pool, "NORMALISED": pool}
    flags["MASK"] = (device.OUTPUT_MASK if pool else device.INPUT_MASK).value
    return operands, {**_constants(tiles, last), **flags}, tiles.num_warps


def _sums(dtype: str, last: bool, kind: str) -> Build:
    pool = kind == "norm-pool"
    blocks = WINDOW_REDUCTION if pool else REDUCTION
    operands, constants, warps = _gradient(dtype, last, pool, blocks)
    operands["p_sums"] = "*fp32"
    name = _name("sums_bwd", dtype, last, kind)
    return launch(
        name,
        bwd.bn_act_sums_bwd_kernel,
        operands,
        constants,
        vector=last or not pool,
        num_warps=warps,
    )


def _backward(dtype: str, last: bool, kind: str) -> Build:
    pool, image = kind == "norm-pool", f"*{dtype}"
    blocks = WINDOW_SWEEP if pool else SWEEP
    operands, constants, warps = _gradient(dtype, last, pool, blocks)
    operands |= dict.fromkeys(("p_rvar", "p_rweight"), "*fp32" if pool else None)
    operands |= {"p_slopes": "*fp32", "p_dx": image, "p_dr": image if pool else None}
    operands["reps"] = "fp64"
    flags = dict.fromkeys(("HAS_RWEIGHT", "RBATCH_STATS", "HAS_DR"), pool)
    constants = {**constants, **flags, "BATCH_STATS": True, "HAS_DX": True}
    name = _name("bwd", dtype, last, kind)
    return launch(
        name, bwd.bn_act_bwd_kernel, operands, constants, vector=last or not pool, num_warps=warps
    )


def _merges() -> Iterator[Build]:
    sizes, tiles = _sizes(REDUCTION, True, False)
    blocks = {"BLOCK_T": 1024, "BLOCK_C": 4}
    moments = dict.fromkeys(("p_moments", "p_mean", "p_var"), "*fp32")
    counts = {"C": CHANNELS, "tiles": tiles.tiles, "count": sizes["pixels"]}
    spans = {"pixels": sizes["pixels"], "spans": tiles.spans, "span": tiles.steps * tiles.block_p}
    operands: dict[str, Any] = {**moments, **counts, **spans}
    yield launch("bn_act_merge_fwd", fwd.bn_act_merge_fwd_kernel, operands, blocks, vector=False)
    names = ("p_sums", "p_var", "p_rvar", "p_slopes", "p_dweight", "p_dbias", "p_drweight")
    vectors = dict.fromkeys((*names, "p_drbias"), "*fp32")
    flags = dict.fromkeys(("HAS_DWEIGHT", "HAS_DBIAS", "HAS_DRWEIGHT", "HAS_DRBIAS"), True)
    operands = {**vectors, **counts, "eps": "fp64", "reps": "fp64"}
    constants = {**blocks, **flags, "NORMALISED": True}
    yield launch("bn_act_merge_bwd", bwd.bn_act_merge_bwd_kernel, operands, constants, vector=False)
