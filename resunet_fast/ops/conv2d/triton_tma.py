"""3x3 stride-1 convolution, channels_last, fed by the tensor memory accelerator.

A box of pixels shifted by one tap is one copy: what lies outside the image arrives as zeros, which
is the padding, and what a tile writes outside is dropped. With pixels as the second operand the
[rows, columns, channels] box becomes a matrix without moving anything.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..bn_act.triton_blocks import affine as bn_affine
from .triton_epilogue import (
    affine,
    gradient_sums,
    moments,
    multiply,
    relu,
    store_partial,
    store_sums,
)


@triton.jit
def _accumulate(
    b_acc,
    d_x,  # [N, H, W, C], boxes [1, BLOCK_H, BLOCK_W, BLOCK_C]
    d_w,  # [9, K, all channels], boxes [1, BLOCK_K, BLOCK_C]
    i_n,
    o_h,
    o_w,
    o_k,
    FIRST: tl.constexpr,
    C: tl.constexpr,
    FLIP: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add the nine taps of one source, whose channels begin at FIRST in the weight."""
    steps: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    for i in tl.range(0, 9 * steps, num_stages=STAGES):
        tap = i // steps
        o_c = (i % steps) * BLOCK_C
        b_x = d_x.load([i_n, o_h + tap // 3 - 1, o_w + tap % 3 - 1, o_c])
        b_w = d_w.load([8 - tap if FLIP else tap, o_k, FIRST + o_c])
        b_x = b_x.reshape(BLOCK_H * BLOCK_W, BLOCK_C)
        b_acc = multiply(b_w.reshape(BLOCK_K, BLOCK_C), b_x, b_acc, UPCAST, PRECISION)
    return b_acc


@triton.jit
def _max_pool(
    b_z, ACC: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_K: tl.constexpr
):
    """2x2 maxima of [BLOCK_H * BLOCK_W, BLOCK_K]; a window with a NaN gives NaN."""
    shape: tl.constexpr = (BLOCK_H // 2, 2, BLOCK_W // 2, 2, BLOCK_K)
    b_windows = b_z.to(ACC).reshape(shape)
    b_nan = (b_windows != b_windows).to(tl.int32)
    b_max = tl.max(tl.max(b_windows, 3), 1)  # [BLOCK_H / 2, BLOCK_W / 2, BLOCK_K]
    return tl.where(tl.max(tl.max(b_nan, 3), 1) > 0, float("nan"), b_max)


@triton.jit
def _add_moments(
    n,
    b_mean,
    b_squares,
    b_part,  # [BLOCK_K, rows of BLOCK_W pixels]
    height,
    width,
    ACC: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Merge the moments of further rows, of which `height` rows and `width` columns count."""
    o_p = tl.arange(0, b_part.shape[1])
    m_p = (o_p // BLOCK_W < height) & (o_p % BLOCK_W < width)
    n_2, b_mean_2, b_squares_2 = moments(b_part, m_p, ACC)
    total = n + n_2  # the first rows have a pixel at least
    b_delta = tl.where(n_2 > 0, b_mean_2 - b_mean, 0.0)
    b_squares += b_squares_2 + b_delta * b_delta * (n * n_2 / total)
    return total, (n * b_mean + n_2 * b_mean_2) / total, b_squares


@triton.jit
def _tile_moments(
    b_stored,  # [BLOCK_K, BLOCK_H * BLOCK_W]
    height,
    width,
    ACC: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Moments of the first `height` rows and `width` columns.

    By quarters: a whole tile would not fit into registers beside the accumulator.
    """
    rows: tl.constexpr = BLOCK_H // 4
    quarters: tl.constexpr = (BLOCK_K, 2, 2, rows * BLOCK_W)
    b_even, b_odd = tl.split(b_stored.reshape(quarters).permute(0, 3, 1, 2))
    b_0, b_2 = tl.split(b_even)
    b_1, b_3 = tl.split(b_odd)
    b_zero = tl.zeros((BLOCK_K,), ACC)
    n, b_mean, b_squares = _add_moments(
        tl.zeros((), ACC), b_zero, b_zero, b_0, height, width, ACC, BLOCK_W
    )
    n, b_mean, b_squares = _add_moments(
        n, b_mean, b_squares, b_1, height - rows, width, ACC, BLOCK_W
    )
    n, b_mean, b_squares = _add_moments(
        n, b_mean, b_squares, b_2, height - 2 * rows, width, ACC, BLOCK_W
    )
    return _add_moments(n, b_mean, b_squares, b_3, height - 3 * rows, width, ACC, BLOCK_W)


@triton.jit
def _add_sums(
    b_sum,
    b_with_x,
    b_dz,  # [rows of BLOCK_W pixels, BLOCK_K]
    d_norm_x,  # [N, H, W, K], boxes [1, rows, BLOCK_W, BLOCK_K]
    i_n,
    o_h,
    o_w,
    o_k,
    m_k,
    height,
    width,
    b_mean,
    b_scale,
    b_bias,
    MASK: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Add the sums of further rows, of which `height` rows and `width` columns count."""
    o_p = tl.arange(0, b_dz.shape[0])
    m_p = (o_p // BLOCK_W < height) & (o_p % BLOCK_W < width)
    b_x = d_norm_x.load([i_n, o_h, o_w, o_k]).reshape(b_dz.shape[0], b_dz.shape[1])
    m = m_p[:, None] & m_k[None, :]
    b_sum_2, b_with_x_2 = gradient_sums(b_dz, b_x, m, b_mean, b_scale, b_bias, MASK, ACC)
    return b_sum + b_sum_2, b_with_x + b_with_x_2


@triton.jit
def _tile_sums(
    b_stored,  # [BLOCK_H * BLOCK_W, BLOCK_K]
    d_norm_x,
    i_n,
    o_h,
    o_w,
    o_k,
    m_k,
    height,
    width,
    b_mean,
    b_scale,
    b_bias,
    MASK: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sums over the first `height` rows and `width` columns, by quarters as the moments are."""
    rows: tl.constexpr = BLOCK_H // 4
    quarters: tl.constexpr = (2, 2, rows * BLOCK_W, BLOCK_K)
    b_even, b_odd = tl.split(b_stored.reshape(quarters).permute(2, 3, 0, 1))
    b_0, b_2 = tl.split(b_even)
    b_1, b_3 = tl.split(b_odd)
    b_sum = tl.zeros((BLOCK_K,), ACC)
    b_with_x = b_sum
    b_sum, b_with_x = _add_sums(
        b_sum, b_with_x, b_0, d_norm_x, i_n, o_h, o_w, o_k, m_k, height, width,
        b_mean, b_scale, b_bias, MASK, ACC, BLOCK_W,
    )  # fmt: skip
    b_sum, b_with_x = _add_sums(
        b_sum, b_with_x, b_1, d_norm_x, i_n, o_h + rows, o_w, o_k, m_k, height - rows, width,
        b_mean, b_scale, b_bias, MASK, ACC, BLOCK_W,
    )  # fmt: skip
    b_sum, b_with_x = _add_sums(
        b_sum, b_with_x, b_2, d_norm_x, i_n, o_h + 2 * rows, o_w, o_k, m_k, height - 2 * rows,
        width, b_mean, b_scale, b_bias, MASK, ACC, BLOCK_W,
    )  # fmt: skip
    return _add_sums(
        b_sum, b_with_x, b_3, d_norm_x, i_n, o_h + 3 * rows, o_w, o_k, m_k, height - 3 * rows,
        width, b_mean, b_scale, b_bias, MASK, ACC, BLOCK_W,
    )  # fmt: skip


@triton.jit
def conv2d_fwd_tma_kernel(
    d_x,  # [N, H, W, C_X]
    d_skip,  # [N, H, W, C_SKIP], or None
    d_w,  # [9, K, C_X + C_SKIP]
    d_residual,  # [N, H, W, K], or None
    p_scale,  # [K], or None
    p_shift,  # [K], or None
    d_norm_x,  # [N, H, W, K] by quarters of a tile, or None, as are the four vectors
    p_mean,  # [K]
    p_var,  # [K]
    p_weight,  # [K], or None
    p_bias,  # [K], or None
    d_y,  # [N, H, W, K]
    d_pooled,  # [N, H // 2, W // 2, K], or None
    p_partial,  # [tiles, 3, K], or None
    H,
    W,
    K,
    tiles_h,
    tiles_w,
    tiles_k,
    eps: tl.float64,
    C_X: tl.constexpr,
    C_SKIP: tl.constexpr,
    FLIP: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    POOL: tl.constexpr,
    STATISTICS: tl.constexpr,
    SUMS: tl.constexpr,
    MASK: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program owns BLOCK_K filters of BLOCK_H x BLOCK_W pixels of one image.

    Programs that share pixels run side by side, because the weight is the smaller operand.
    """
    i_tile = tl.program_id(0) // tiles_k
    o_k = (tl.program_id(0) % tiles_k) * BLOCK_K
    i_n = i_tile // (tiles_h * tiles_w)
    o_h = (i_tile // tiles_w % tiles_h) * BLOCK_H
    o_w = (i_tile % tiles_w) * BLOCK_W
    b_acc = tl.zeros((BLOCK_K, BLOCK_H * BLOCK_W), ACC)
    b_acc = _accumulate(
        b_acc, d_x, d_w, i_n, o_h, o_w, o_k, 0, C_X, FLIP,
        BLOCK_H, BLOCK_W, BLOCK_C, BLOCK_K, STAGES, UPCAST, PRECISION,
    )  # fmt: skip
    if C_SKIP > 0:
        b_acc = _accumulate(
            b_acc, d_skip, d_w, i_n, o_h, o_w, o_k, C_X, C_SKIP, FLIP,
            BLOCK_H, BLOCK_W, BLOCK_C, BLOCK_K, STAGES, UPCAST, PRECISION,
        )  # fmt: skip
    o_ks = o_k + tl.arange(0, BLOCK_K)
    m_k = o_ks < K
    b_v = affine(b_acc, p_scale, p_shift, o_ks, m_k, HAS_SCALE, HAS_SHIFT)
    if STATISTICS:
        n, b_mean, b_squares = _tile_moments(
            b_v.to(d_y.dtype), H - o_h, W - o_w, ACC, BLOCK_H, BLOCK_W, BLOCK_K
        )
        store_partial(p_partial, i_tile, n, b_mean, b_squares, K, o_ks, m_k)
    b_z = tl.trans(b_v)  # [BLOCK_H * BLOCK_W, BLOCK_K]
    if HAS_RESIDUAL:
        b_r = d_residual.load([i_n, o_h, o_w, o_k])
        b_z = b_z + b_r.reshape(BLOCK_H * BLOCK_W, BLOCK_K).to(ACC)
    if RELU:
        b_z = relu(b_z)
    b_stored = b_z.to(d_y.dtype)
    d_y.store([i_n, o_h, o_w, o_k], b_stored.reshape(1, BLOCK_H, BLOCK_W, BLOCK_K))
    if SUMS:
        b_mean, b_scale, b_bias = bn_affine(
            p_mean, p_var, p_weight, p_bias, eps, o_ks, m_k, HAS_WEIGHT, HAS_BIAS, ACC
        )
        b_sum, b_with_x = _tile_sums(
            b_stored, d_norm_x, i_n, o_h, o_w, o_k, m_k, H - o_h, W - o_w,
            b_mean, b_scale, b_bias, MASK, ACC, BLOCK_H, BLOCK_W, BLOCK_K,
        )  # fmt: skip
        store_sums(p_partial, i_tile, b_sum, b_with_x, K, o_ks, m_k)
    if POOL:
        b_pooled = _max_pool(b_stored, ACC, BLOCK_H, BLOCK_W, BLOCK_K).to(d_y.dtype)
        box: tl.constexpr = (1, BLOCK_H // 2, BLOCK_W // 2, BLOCK_K)
        d_pooled.store([i_n, o_h // 2, o_w // 2, o_k], b_pooled.reshape(box))
