"""Device code of bn_act's forward: statistics of tiles, their merge, and one sweep."""

import triton
import triton.language as tl

from .triton_blocks import (
    NO_RESIDUAL,
    NORMALISED_RESIDUAL,
    affine,
    cell,
    innermost,
    normalise,
    offsets,
    program,
    replaces,
    window,
)


@triton.jit
def bn_act_stats_fwd_kernel(
    p_x,
    p_moments,
    C,
    pixels,
    spans,
    steps,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UNIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACC: tl.constexpr,
):
    """Mean and sum of squared distances from it of every tile: p_moments[tile, 2, C]."""
    C, pixels = innermost(C, pixels, UNIT, CHANNELS_LAST)
    i_tile, i_run, first, b_c, m_c = program(C, spans, steps, BLOCK_P, BLOCK_C)
    b_p = first + tl.arange(0, BLOCK_P)
    m = (b_p < pixels)[:, None] & m_c[None, :]
    o = offsets(i_run, b_p, b_c, C, pixels, CHANNELS_LAST)
    b_x = tl.load(p_x + o, mask=m, other=0.0).to(ACC)  # [BLOCK_P, BLOCK_C]
    left = pixels - first
    b_shift = tl.sum(b_x, axis=0) / tl.minimum(left, BLOCK_P).to(ACC)  # [BLOCK_C]
    # A shift that is not finite would turn infinite sums into NaN.
    b_shift = tl.where(tl.abs(b_shift) < float("inf"), b_shift, 0.0)
    b_sum = tl.where(m, b_x - b_shift[None, :], 0.0)  # [BLOCK_P, BLOCK_C]
    b_squares = b_sum * b_sum
    for step in range(1, steps):
        b_p = first + step * BLOCK_P + tl.arange(0, BLOCK_P)
        m = (b_p < pixels)[:, None] & m_c[None, :]
        o = offsets(i_run, b_p, b_c, C, pixels, CHANNELS_LAST)
        b_x = tl.load(p_x + o, mask=m, other=0.0).to(ACC)  # [BLOCK_P, BLOCK_C]
        b_distance = tl.where(m, b_x - b_shift[None, :], 0.0)
        b_sum += b_distance
        b_squares += b_distance * b_distance
    count = tl.minimum(left, steps * BLOCK_P).to(ACC)
    b_total = tl.sum(b_sum, axis=0)  # [BLOCK_C]
    b_m2 = tl.sum(b_squares, axis=0) - b_total * (b_total / count)
    p_mean = p_moments + i_tile * 2 * C + b_c
    tl.store(p_mean, b_shift + b_total / count, mask=m_c)
    tl.store(p_mean + C, tl.where(b_m2 < 0.0, 0.0, b_m2), mask=m_c)


@triton.jit
def bn_act_merge_fwd_kernel(
    p_moments,
    p_mean,
    p_var,
    C,
    pixels,
    spans,
    span,
    tiles,
    count,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean and biased variance from the tiles' moments, in float64 and a fixed order."""
    b_c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = b_c < C
    total = tl.cast(count, tl.float64)
    b_mean = tl.zeros((BLOCK_C,), tl.float64)
    for first in range(0, tiles, BLOCK_T):
        b_t = first + tl.arange(0, BLOCK_T)
        m = (b_t < tiles)[:, None] & m_c[None, :]
        o = (b_t.to(tl.int64) * 2 * C)[:, None] + b_c[None, :]
        b_part = tl.load(p_moments + o, mask=m, other=0.0).to(tl.float64)  # [BLOCK_T, BLOCK_C]
        b_count = tile_positions(b_t, pixels, spans, span)  # [BLOCK_T]
        b_mean += tl.sum(b_part * b_count[:, None], axis=0)
    b_mean /= total
    b_var = tl.zeros((BLOCK_C,), tl.float64)
    for first in range(0, tiles, BLOCK_T):
        b_t = first + tl.arange(0, BLOCK_T)
        m = (b_t < tiles)[:, None] & m_c[None, :]
        o = (b_t.to(tl.int64) * 2 * C)[:, None] + b_c[None, :]
        b_part = tl.load(p_moments + o, mask=m, other=0.0).to(tl.float64)  # [BLOCK_T, BLOCK_C]
        b_m2 = tl.load(p_moments + o + C, mask=m, other=0.0).to(tl.float64)
        b_distance = tl.where(m, b_part - b_mean[None, :], 0.0)
        b_count = tile_positions(b_t, pixels, spans, span)  # [BLOCK_T]
        b_var += tl.sum(b_m2 + b_distance * b_distance * b_count[:, None], axis=0)
    tl.store(p_mean + b_c, b_mean.to(p_mean.dtype.element_ty), mask=m_c)
    b_var /= total
    tl.store(p_var + b_c, b_var.to(p_var.dtype.element_ty), mask=m_c)


@triton.jit
def tile_positions(b_t, pixels, spans, span):
    """How many positions each tile has: [BLOCK_T], float64."""
    b_first = (b_t % spans).to(tl.int64) * span
    return tl.minimum(pixels - b_first, span).to(tl.float64)


@triton.jit
def bn_act_fwd_kernel(
    p_x,
    p_mean,
    p_var,
    p_weight,
    p_bias,
    p_r,
    p_rmean,
    p_rvar,
    p_rweight,
    p_rbias,
    p_z,
    p_pooled,
    C,
    pixels,
    positions,
    H,
    W,
    spans,
    steps,
    eps: tl.float64,
    reps: tl.float64,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UNIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACC: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    HAS_RWEIGHT: tl.constexpr,
    HAS_RBIAS: tl.constexpr,
    RELU: tl.constexpr,
    POOL: tl.constexpr,
):
    """z = relu((x - mean) * scale + bias [+ r | + the same of r]) and its 2x2 maxima."""
    C, pixels = innermost(C, pixels, UNIT, CHANNELS_LAST)
    _, i_run, first, b_c, m_c = program(C, spans, steps, BLOCK_P, BLOCK_C)
    b_mean, b_scale, b_bias = affine(
        p_mean, p_var, p_weight, p_bias, eps, b_c, m_c, HAS_WEIGHT, HAS_BIAS, ACC
    )
    if RESIDUAL == NORMALISED_RESIDUAL:
        b_rmean, b_rscale, b_rbias = affine(
            p_rmean, p_rvar, p_rweight, p_rbias, reps, b_c, m_c, HAS_RWEIGHT, HAS_RBIAS, ACC
        )
    for step in range(0, steps):
        b_p = first + step * BLOCK_P + tl.arange(0, BLOCK_P)
        b_best = tl.full((BLOCK_P, BLOCK_C), float("-inf"), ACC)
        for K in tl.static_range(4 if POOL else 1):
            o, m = cell(i_run, b_p, b_c, m_c, C, pixels, positions, H, W, K, POOL, CHANNELS_LAST)
            b_x = tl.load(p_x + o, mask=m, other=0.0).to(ACC)  # [BLOCK_P, BLOCK_C]
            b_v = normalise(b_x, b_mean, b_scale, b_bias)
            if RESIDUAL != NO_RESIDUAL:
                b_r = tl.load(p_r + o, mask=m, other=0.0).to(ACC)  # [BLOCK_P, BLOCK_C]
                if RESIDUAL == NORMALISED_RESIDUAL:
                    b_r = normalise(b_r, b_rmean, b_rscale, b_rbias)
                b_v += b_r
            if RELU:  # not a maximum: NaN and -0. stay
                b_v = tl.where(b_v < 0.0, 0.0, b_v)
            b_z = b_v.to(p_z.dtype.element_ty)
            tl.store(p_z + o, b_z, mask=m)
            if POOL:
                b_cell = b_z.to(ACC)  # as stored
                b_best = tl.where(replaces(b_cell, b_best), b_cell, b_best)
        if POOL:
            o, m = window(i_run, b_p, b_c, m_c, C, positions, H, W, CHANNELS_LAST)
            tl.store(p_pooled + o, b_best.to(p_pooled.dtype.element_ty), mask=m)
