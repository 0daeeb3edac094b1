"""Device functions that the convolution kernels share: one k-step, and what follows the last.

An accumulator is [BLOCK_K, BLOCK_P], filters by pixels: with the weight as the first operand the
tensor cores read both from shared memory, and sums over pixels stay within a thread's registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..bn_act.triton_backward import masked


@triton.jit
def multiply(b_w, b_x, b_acc, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """Add [BLOCK_K, BLOCK_C] times the transpose of [BLOCK_P, BLOCK_C] to the accumulator."""
    if UPCAST:
        # Triton's interpreter would multiply the bit patterns of bfloat16.
        b_w = b_w.to(tl.float32)
        b_x = b_x.to(tl.float32)
    return tl.dot(b_w, tl.trans(b_x), b_acc, input_precision=PRECISION, out_dtype=b_acc.dtype)


@triton.jit
def affine(b_acc, p_scale, p_shift, o_k, m_k, HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr):
    """Scale and shift every filter."""
    if HAS_SCALE:
        b_scale = tl.load(p_scale + o_k, mask=m_k, other=0.0).to(b_acc.dtype)
        b_acc = b_acc * b_scale[:, None]
    if HAS_SHIFT:
        b_shift = tl.load(p_shift + o_k, mask=m_k, other=0.0).to(b_acc.dtype)
        b_acc = b_acc + b_shift[:, None]
    return b_acc


@triton.jit
def relu(b_v):
    """Rectify as torch does: NaN and -0. stay."""
    return tl.where(b_v < 0, 0.0, b_v)


@triton.jit
def moments(b_stored, m_p, ACC: tl.constexpr):
    """Count, mean and sum of squared deviations of the pixels in `m_p`, [BLOCK_K] but the count."""
    b_v = b_stored.to(ACC)  # [BLOCK_K, pixels]
    n = tl.sum(m_p.to(ACC), 0)
    n_1 = tl.maximum(n, 1.0)  # all may lie outside the image
    # The mean over pixels outside as well is near enough for a shift. One that is not finite would
    # turn infinite sums into NaN.
    b_shift = tl.sum(b_v, 1) / b_v.shape[1]
    b_shift = tl.where(tl.abs(b_shift) < float("inf"), b_shift, 0.0)
    b_delta = tl.where(m_p[None, :], b_v - b_shift[:, None], 0.0)
    b_sum = tl.sum(b_delta, 1)
    b_squares = tl.sum(b_delta * b_delta, 1) - b_sum * (b_sum / n_1)
    return n, b_shift + b_sum / n_1, tl.where(b_squares < 0, 0.0, b_squares)


@triton.jit
def store_partial(p_partial, i_tile, n, b_mean, b_squares, K, o_k, m_k):
    """Write a tile's moments into [tiles, 3, K]."""
    p_tile = p_partial + i_tile.to(tl.int64) * 3 * K + o_k
    tl.store(p_tile, tl.zeros_like(b_mean) + n, mask=m_k)
    tl.store(p_tile + K, b_mean, mask=m_k)
    tl.store(p_tile + 2 * K, b_squares, mask=m_k)


@triton.jit
def gradient_sums(
    b_dz,  # [pixels, BLOCK_K], as stored
    b_x,  # [pixels, BLOCK_K]
    m,
    b_mean,  # [BLOCK_K], as are scale and bias
    b_scale,
    b_bias,
    MASK: tl.constexpr,
    ACC: tl.constexpr,
):
    """Sums of g and of g (x - mean) over the pixels in `m`, [BLOCK_K] each.

    g is dz where the ReLU of the batch norm of x let it through: what bn_act's own kernel sums.
    """
    b_v = b_x.to(ACC)
    b_g = masked(b_dz.to(ACC), b_v, b_mean, b_scale, b_bias, None, 0, m, b_x.dtype, MASK)
    b_with_x = tl.where(m, b_g * (b_v - b_mean[None, :]), 0.0)
    return tl.sum(tl.where(m, b_g, 0.0), 0), tl.sum(b_with_x, 0)


@triton.jit
def store_sums(p_partial, i_tile, b_sum, b_with_x, K, o_k, m_k):
    """Write a tile's sums into [tiles, 3, K], as bn_act's merge reads them; the third is unused."""
    p_tile = p_partial + i_tile.to(tl.int64) * 3 * K + o_k
    tl.store(p_tile, b_sum, mask=m_k)
    tl.store(p_tile + K, b_with_x, mask=m_k)


@triton.jit
def bn_sums_merge_kernel(
    p_partial,  # [tiles, 3, K]: sums of g and of g (x - mean)
    p_merged,  # [ceil(tiles / BLOCK_T), 3, K], float64
    tiles,
    K,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Add BLOCK_T tiles' sums into one, in a fixed order."""
    i_group = tl.program_id(0).to(tl.int64)
    o_k = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    o_t = i_group * BLOCK_T + tl.arange(0, BLOCK_T)
    m_k = o_k < K
    p_tile = p_partial + o_t[:, None] * (3 * K) + o_k[None, :]
    for ROW in tl.static_range(2):
        b_part = tl.load(  # [BLOCK_T, BLOCK_K]
            p_tile + ROW * K, mask=(o_t < tiles)[:, None] & m_k[None, :], other=0.0
        )
        b_sum = tl.sum(b_part.to(tl.float64), 0)
        tl.store(p_merged + i_group * (3 * K) + ROW * K + o_k, b_sum, mask=m_k)


@triton.jit
def bn_stats_merge_kernel(
    p_partial,  # [tiles, 3, K]: count, mean, sum of squared deviations
    p_merged,  # [ceil(tiles / BLOCK_T), 3, K], or where FINAL the mean, [K]
    p_var,  # [K], or None
    tiles,
    K,
    FINAL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Merge BLOCK_T tiles into one, in a fixed order."""
    i_group = tl.program_id(0).to(tl.int64)
    o_k = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    o_t = i_group * BLOCK_T + tl.arange(0, BLOCK_T)
    m_k = o_k < K
    m = (o_t < tiles)[:, None] & m_k[None, :]
    p_tile = p_partial + o_t[:, None] * (3 * K) + o_k[None, :]
    b_n = tl.load(p_tile, mask=m, other=0.0).to(tl.float64)  # [BLOCK_T, BLOCK_K]
    b_mean = tl.load(p_tile + K, mask=m, other=0.0).to(tl.float64)
    b_square = tl.load(p_tile + 2 * K, mask=m, other=0.0).to(tl.float64)
    b_count = tl.maximum(tl.sum(b_n, 0), 1.0)  # [BLOCK_K]; 1 where there is no filter
    b_merged = tl.sum(b_n * b_mean, 0) / b_count
    b_delta = tl.where(m, b_mean - b_merged[None, :], 0.0)
    b_total = tl.sum(b_square + b_n * b_delta * b_delta, 0)
    element = p_merged.dtype.element_ty
    if FINAL:
        tl.store(p_merged + o_k, b_merged.to(element), mask=m_k)
        tl.store(p_var + o_k, (b_total / b_count).to(element), mask=m_k)
    else:
        p_group = p_merged + i_group * (3 * K) + o_k
        tl.store(p_group, b_count.to(element), mask=m_k)
        tl.store(p_group + K, b_merged.to(element), mask=m_k)
        tl.store(p_group + 2 * K, b_total.to(element), mask=m_k)
