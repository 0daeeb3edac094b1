"""Device code of bn_act's backward: sums of tiles, their merge, and one sweep.

With POOL the gradient of the pooled image reaches its cell here, without a buffer in between.
"""

import triton
import triton.language as tl

from .triton_blocks import (
    INPUT_MASK,
    OUTPUT_MASK,
    affine,
    cell,
    innermost,
    normalise,
    program,
    replaces,
    window,
)


@triton.jit
def routed(
    p_grad_pooled,
    p_z,
    i_run,
    b_p,
    b_c,
    m_c,
    C,
    pixels,
    positions,
    H,
    W,
    CHANNELS_LAST: tl.constexpr,
    ACC: tl.constexpr,
):
    """Of every window the cell that holds its maximum, and the gradient that this cell gets."""
    b_winner = tl.zeros((b_p.shape[0], b_c.shape[0]), tl.int32)
    b_best = tl.full((b_p.shape[0], b_c.shape[0]), float("-inf"), ACC)
    for K in tl.static_range(4):
        o, m = cell(i_run, b_p, b_c, m_c, C, pixels, positions, H, W, K, True, CHANNELS_LAST)
        b_z = tl.load(p_z + o, mask=m, other=0.0).to(ACC)  # [BLOCK_P, BLOCK_C]
        m_wins = replaces(b_z, b_best)
        b_best = tl.where(m_wins, b_z, b_best)
        b_winner = tl.where(m_wins, K, b_winner)
    o, m = window(i_run, b_p, b_c, m_c, C, positions, H, W, CHANNELS_LAST)
    return b_winner, tl.load(p_grad_pooled + o, mask=m, other=0.0).to(ACC)


@triton.jit
def masked(b_g, b_x, b_mean, b_scale, b_bias, p_z, o, m, DTYPE, MASK: tl.constexpr):
    """The gradient where the ReLU let the value through: above zero, and at NaN."""
    if MASK == OUTPUT_MASK:
        b_z = tl.load(p_z + o, mask=m, other=0.0)  # [BLOCK_P, BLOCK_C]
        return tl.where(b_z.to(b_g.dtype) <= 0.0, 0.0, b_g)
    if MASK == INPUT_MASK:
        b_z = normalise(b_x, b_mean, b_scale, b_bias).to(DTYPE)  # as it was stored
        return tl.where(b_z.to(b_g.dtype) <= 0.0, 0.0, b_g)
    return b_g


@triton.jit
def bn_act_sums_bwd_kernel(
    p_grad,
    p_grad_pooled,
    p_x,
    p_z,
    p_mean,
    p_var,
    p_weight,
    p_bias,
    p_r,
    p_rmean,
    p_sums,
    C,
    pixels,
    positions,
    H,
    W,
    spans,
    steps,
    eps: tl.float64,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UNIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACC: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    POOL: tl.constexpr,
    MASK: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORMALISED: tl.constexpr,
):
    """Sums of g, g (x - mean) and g (r - rmean) over every tile: p_sums[tile, 3, C]."""
    C, pixels = innermost(C, pixels, UNIT, CHANNELS_LAST)
    i_tile, i_run, first, b_c, m_c = program(C, spans, steps, BLOCK_P, BLOCK_C)
    b_mean, b_scale, b_bias = affine(
        p_mean, p_var, p_weight, p_bias, eps, b_c, m_c, HAS_WEIGHT, HAS_BIAS, ACC
    )
    b_sum = tl.zeros((BLOCK_P, BLOCK_C), ACC)
    b_with_x = tl.zeros((BLOCK_P, BLOCK_C), ACC)
    if NORMALISED:
        b_rmean = tl.load(p_rmean + b_c, mask=m_c, other=0.0).to(ACC)  # [BLOCK_C]
        b_with_r = tl.zeros((BLOCK_P, BLOCK_C), ACC)
    for step in range(0, steps):
        b_p = first + step * BLOCK_P + tl.arange(0, BLOCK_P)
        if POOL:
            b_winner, b_pooled = routed(
                p_grad_pooled, p_z, i_run, b_p, b_c, m_c, C, pixels, positions, H, W,
                CHANNELS_LAST, ACC,
            )  # fmt: skip
        for K in tl.static_range(4 if POOL else 1):
            o, m = cell(i_run, b_p, b_c, m_c, C, pixels, positions, H, W, K, POOL, CHANNELS_LAST)
            b_g = tl.zeros((BLOCK_P, BLOCK_C), ACC)
            if HAS_GRAD:
                b_g = tl.load(p_grad + o, mask=m, other=0.0).to(ACC)  # [BLOCK_P, BLOCK_C]
            if POOL:
                b_g += tl.where(b_winner == K, b_pooled, 0.0)
            b_x = tl.load(p_x + o, mask=m, other=0.0).to(ACC)  # [BLOCK_P, BLOCK_C]
            b_g = masked(b_g, b_x, b_mean, b_scale, b_bias, p_z, o, m, p_x.dtype.element_ty, MASK)
            b_sum += b_g
            b_with_x += tl.where(m, b_g * (b_x - b_mean[None, :]), 0.0)
            if NORMALISED:
                b_r = tl.load(p_r + o, mask=m, other=0.0).to(ACC)  # [BLOCK_P, BLOCK_C]
                b_with_r += tl.where(m, b_g * (b_r - b_rmean[None, :]), 0.0)
    p_tile = p_sums + i_tile * 3 * C + b_c
    tl.store(p_tile, tl.sum(b_sum, axis=0), mask=m_c)
    tl.store(p_tile + C, tl.sum(b_with_x, axis=0), mask=m_c)
    if NORMALISED:
        tl.store(p_tile + 2 * C, tl.sum(b_with_r, axis=0), mask=m_c)


@triton.jit
def bn_act_merge_bwd_kernel(
    p_sums,
    p_var,
    p_rvar,
    p_slopes,
    p_dweight,
    p_dbias,
    p_drweight,
    p_drbias,
    C,
    tiles,
    count,
    eps: tl.float64,
    reps: tl.float64,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_DWEIGHT: tl.constexpr,
    HAS_DBIAS: tl.constexpr,
    HAS_DRWEIGHT: tl.constexpr,
    HAS_DRBIAS: tl.constexpr,
    NORMALISED: tl.constexpr,
):
    """Gradients of the affine vectors, and what the sweep subtracts: p_slopes[3, C].

    The three are mean(g), mean(g xhat) / deviation, and the latter for the residual; sums in
    float64, in a fixed order.
    """
    b_c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = b_c < C
    total = tl.cast(count, tl.float64)
    b_sum = tile_sum(p_sums + b_c, m_c, C, tiles, BLOCK_T, BLOCK_C)  # [BLOCK_C]
    tl.store(p_slopes + b_c, (b_sum / total).to(p_slopes.dtype.element_ty), mask=m_c)
    b_rstd = deviation(p_var, eps, b_c, m_c)
    b_dweight = tile_sum(p_sums + C + b_c, m_c, C, tiles, BLOCK_T, BLOCK_C) * b_rstd
    b_slope = b_dweight * b_rstd / total
    tl.store(p_slopes + C + b_c, b_slope.to(p_slopes.dtype.element_ty), mask=m_c)
    put(p_dbias, b_c, b_sum, m_c, HAS_DBIAS)
    put(p_dweight, b_c, b_dweight, m_c, HAS_DWEIGHT)
    put(p_drbias, b_c, b_sum, m_c, HAS_DRBIAS)
    if NORMALISED:
        b_rstd = deviation(p_rvar, reps, b_c, m_c)
        b_dweight = tile_sum(p_sums + 2 * C + b_c, m_c, C, tiles, BLOCK_T, BLOCK_C) * b_rstd
        b_slope = b_dweight * b_rstd / total
        tl.store(p_slopes + 2 * C + b_c, b_slope.to(p_slopes.dtype.element_ty), mask=m_c)
        put(p_drweight, b_c, b_dweight, m_c, HAS_DRWEIGHT)


@triton.jit
def tile_sum(p, m_c, C, tiles, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sum over the tiles of the sums that start at `p`: [BLOCK_C], float64, in a fixed order."""
    b_sum = tl.zeros((BLOCK_C,), tl.float64)
    for first in range(0, tiles, BLOCK_T):
        b_t = first + tl.arange(0, BLOCK_T)
        m = (b_t < tiles)[:, None] & m_c[None, :]
        o = (b_t.to(tl.int64) * 3 * C)[:, None]
        b_part = tl.load(p[None, :] + o, mask=m, other=0.0).to(tl.float64)  # [BLOCK_T, BLOCK_C]
        b_sum += tl.sum(b_part, axis=0)
    return b_sum


@triton.jit
def deviation(p_var, eps, b_c, m_c):
    """Reciprocal of the standard deviation in float64: [BLOCK_C]."""
    b_var = tl.load(p_var + b_c, mask=m_c, other=1.0).to(tl.float64)
    return 1.0 / tl.sqrt(b_var + eps)


@triton.jit
def put(p, b_c, b, m_c, PRESENT: tl.constexpr):
    """Store a vector [BLOCK_C] of float64 where it is wanted."""
    if PRESENT:
        if p.dtype.element_ty != tl.float64:
            b = b.to(tl.float32)  # there is no conversion from float64 to bfloat16
        tl.store(p + b_c, b.to(p.dtype.element_ty), mask=m_c)


@triton.jit
def norm_grad(b_g, b_x, b_mean, b_scale, b_mean_grad, b_slope, BATCH_STATS: tl.constexpr):
    """scale (g - mean(g) - xhat mean(g xhat)); fixed statistics do not depend on x."""
    if BATCH_STATS:
        b_g = b_g - b_mean_grad[None, :] - (b_x - b_mean[None, :]) * b_slope[None, :]
    return b_g * b_scale[None, :]


@triton.jit
def bn_act_bwd_kernel(
    p_grad,
    p_grad_pooled,
    p_x,
    p_z,
    p_mean,
    p_var,
    p_weight,
    p_bias,
    p_r,
    p_rmean,
    p_rvar,
    p_rweight,
    p_slopes,
    p_dx,
    p_dr,
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
    HAS_GRAD: tl.constexpr,
    POOL: tl.constexpr,
    MASK: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BATCH_STATS: tl.constexpr,
    NORMALISED: tl.constexpr,
    HAS_RWEIGHT: tl.constexpr,
    RBATCH_STATS: tl.constexpr,
    HAS_DX: tl.constexpr,
    HAS_DR: tl.constexpr,
):
    """Gradients of x and of the residual."""
    C, pixels = innermost(C, pixels, UNIT, CHANNELS_LAST)
    _, i_run, first, b_c, m_c = program(C, spans, steps, BLOCK_P, BLOCK_C)
    READS_X: tl.constexpr = MASK == INPUT_MASK or (HAS_DX and BATCH_STATS)
    b_mean, b_scale, b_bias = affine(
        p_mean, p_var, p_weight, p_bias, eps, b_c, m_c, HAS_WEIGHT, HAS_BIAS, ACC
    )
    b_mean_grad, b_slope = b_mean, b_mean
    if (HAS_DX and BATCH_STATS) or (HAS_DR and RBATCH_STATS):
        b_mean_grad = tl.load(p_slopes + b_c, mask=m_c, other=0.0)  # [BLOCK_C]
        b_slope = tl.load(p_slopes + C + b_c, mask=m_c, other=0.0)  # [BLOCK_C]
    if HAS_DR and NORMALISED:
        b_rmean, b_rscale, _ = affine(
            p_rmean, p_rvar, p_rweight, None, reps, b_c, m_c, HAS_RWEIGHT, False, ACC
        )
        b_rslope = b_rmean
        if RBATCH_STATS:
            b_rslope = tl.load(p_slopes + 2 * C + b_c, mask=m_c, other=0.0)  # [BLOCK_C]
    for step in range(0, steps):
        b_p = first + step * BLOCK_P + tl.arange(0, BLOCK_P)
        if POOL:
            b_winner, b_pooled = routed(
                p_grad_pooled, p_z, i_run, b_p, b_c, m_c, C, pixels, positions, H, W,
                CHANNELS_LAST, ACC,
            )  # fmt: skip
        for K in tl.static_range(4 if POOL else 1):
            o, m = cell(i_run, b_p, b_c, m_c, C, pixels, positions, H, W, K, POOL, CHANNELS_LAST)
            b_g = tl.zeros((BLOCK_P, BLOCK_C), ACC)
            if HAS_GRAD:
                b_g = tl.load(p_grad + o, mask=m, other=0.0).to(ACC)  # [BLOCK_P, BLOCK_C]
            if POOL:
                b_g += tl.where(b_winner == K, b_pooled, 0.0)
            b_x = b_g
            if READS_X:
                b_x = tl.load(p_x + o, mask=m, other=0.0).to(ACC)  # [BLOCK_P, BLOCK_C]
            b_g = masked(b_g, b_x, b_mean, b_scale, b_bias, p_z, o, m, p_x.dtype.element_ty, MASK)
            if HAS_DX:
                b_dx = norm_grad(b_g, b_x, b_mean, b_scale, b_mean_grad, b_slope, BATCH_STATS)
                tl.store(p_dx + o, b_dx.to(p_dx.dtype.element_ty), mask=m)
            if HAS_DR:
                b_dr = b_g
                if NORMALISED:
                    b_r = b_g
                    if RBATCH_STATS:
                        b_r = tl.load(p_r + o, mask=m, other=0.0).to(ACC)  # [BLOCK_P, BLOCK_C]
                    b_dr = norm_grad(
                        b_g, b_r, b_rmean, b_rscale, b_mean_grad, b_rslope, RBATCH_STATS
                    )
                tl.store(p_dr + o, b_dr.to(p_dr.dtype.element_ty), mask=m)
