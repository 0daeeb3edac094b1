"""Convolution of any size, stride, padding and layout, by 64-bit addresses and masks.

For what tensor descriptors cannot address, and for GPUs without them. A data gradient of a strided
convolution is the same gather: its input is the gradient with SPREAD - 1 zeros between pixels.
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
def _coordinate(o, tap, size, STRIDE: tl.constexpr, PADDING: tl.constexpr, SPREAD: tl.constexpr):
    """Where output coordinate `o` reads at `tap`, and whether that lies inside."""
    at = o * STRIDE + tap - PADDING
    inside = at >= 0
    if SPREAD > 1:
        inside = inside & (at % SPREAD == 0)
        at = at // SPREAD
    return at.to(tl.int64), inside & (at < size)


@triton.jit
def _accumulate(
    b_acc,
    p_x,  # one image, [H, W, C] by strides
    p_w,  # [K, R * S, all channels]
    o_h,
    o_w,
    m_p,
    o_k,
    m_k,
    H,
    W,
    stride_h,
    stride_w,
    stride_c,
    FIRST: tl.constexpr,
    C: tl.constexpr,
    C_ALL: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    SPREAD_H: tl.constexpr,
    SPREAD_W: tl.constexpr,
    FLIP: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add the taps of one source, whose channels begin at FIRST in the weight.

    Channels too few for a block share it with those of the next taps.
    """
    blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    steps: tl.constexpr = (R * S * C + BLOCK_C - 1) // BLOCK_C if C < BLOCK_C else R * S * blocks
    p_row = p_w + o_k.to(tl.int64)[:, None] * (R * S * C_ALL)
    for i in tl.range(0, steps, num_stages=STAGES):
        if C < BLOCK_C:
            o_i = i * BLOCK_C + tl.arange(0, BLOCK_C)
            o_tap, o_c = (o_i // C)[None, :], (o_i % C)[None, :]  # [1, BLOCK_C]
            m_c = o_tap < R * S
        else:
            o_tap = i // blocks
            o_c = (i % blocks * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
            m_c = o_c < C
        at_h, m_h = _coordinate(o_h, o_tap // S, H, STRIDE_H, PADDING_H, SPREAD_H)
        at_w, m_w = _coordinate(o_w, o_tap % S, W, STRIDE_W, PADDING_W, SPREAD_W)
        o_x = at_h * stride_h + at_w * stride_w + o_c.to(tl.int64) * stride_c
        b_x = tl.load(p_x + o_x, mask=m_p & m_h & m_w & m_c, other=0.0)  # [BLOCK_P, BLOCK_C]
        o_w_tap = R * S - 1 - o_tap if FLIP else o_tap
        b_w = tl.load(p_row + (o_w_tap * C_ALL + FIRST + o_c), mask=m_k & m_c, other=0.0)
        b_acc = multiply(b_w, b_x, b_acc, UPCAST, PRECISION)  # [BLOCK_K, BLOCK_P]
    return b_acc


@triton.jit
def conv2d_fwd_pointer_kernel(
    p_x,  # [N, C_X, H, W] by strides
    p_skip,  # [N, C_SKIP, H, W] by strides, or None
    p_w,  # [K, R * S, C_X + C_SKIP]
    p_residual,  # [N, K, OH, OW] by y's strides, or None
    p_scale,  # [K], or None
    p_shift,  # [K], or None
    p_norm_x,  # [N, K, OH, OW] by y's strides, or None, as are the four vectors
    p_mean,  # [K]
    p_var,  # [K]
    p_weight,  # [K], or None
    p_bias,  # [K], or None
    p_y,  # [N, K, OH, OW] by strides
    p_partial,  # [tiles, 3, K], or None
    H,
    W,
    OH,
    OW,
    K,
    tiles_p,
    tiles_k,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_sn,
    stride_sc,
    stride_sh,
    stride_sw,
    stride_yn,
    stride_yc,
    stride_yh,
    stride_yw,
    eps: tl.float64,
    C_X: tl.constexpr,
    C_SKIP: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    SPREAD_H: tl.constexpr,
    SPREAD_W: tl.constexpr,
    FLIP: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    STATISTICS: tl.constexpr,
    SUMS: tl.constexpr,
    MASK: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program owns BLOCK_K filters of BLOCK_P consecutive pixels of one image.

    Programs that share pixels run side by side, because the weight is the smaller operand.
    """
    i_tile = tl.program_id(0) // tiles_k
    i_n = (i_tile // tiles_p).to(tl.int64)
    o_p = i_tile % tiles_p * BLOCK_P + tl.arange(0, BLOCK_P)
    o_k = tl.program_id(0) % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)
    m_p = o_p < OH * OW
    m_k = o_k < K
    o_h, o_w = o_p // OW, o_p % OW
    b_acc = tl.zeros((BLOCK_K, BLOCK_P), ACC)
    b_acc = _accumulate(
        b_acc, p_x + i_n * stride_xn, p_w,
        o_h[:, None], o_w[:, None], m_p[:, None], o_k, m_k[:, None],
        H, W, stride_xh, stride_xw, stride_xc, 0, C_X, C_X + C_SKIP,
        R, S, STRIDE_H, STRIDE_W, PADDING_H, PADDING_W, SPREAD_H, SPREAD_W, FLIP,
        BLOCK_C, STAGES, UPCAST, PRECISION,
    )  # fmt: skip
    if C_SKIP > 0:
        b_acc = _accumulate(
            b_acc, p_skip + i_n * stride_sn, p_w,
            o_h[:, None], o_w[:, None], m_p[:, None], o_k, m_k[:, None],
            H, W, stride_sh, stride_sw, stride_sc, C_X, C_SKIP, C_X + C_SKIP,
            R, S, STRIDE_H, STRIDE_W, PADDING_H, PADDING_W, SPREAD_H, SPREAD_W, FLIP,
            BLOCK_C, STAGES, UPCAST, PRECISION,
        )  # fmt: skip
    b_v = affine(b_acc, p_scale, p_shift, o_k, m_k, HAS_SCALE, HAS_SHIFT)
    if STATISTICS:
        n, b_mean, b_squares = moments(b_v.to(p_y.dtype.element_ty), m_p, ACC)
        store_partial(p_partial, i_tile, n, b_mean, b_squares, K, o_k, m_k)
    o_pixel = o_h.to(tl.int64) * stride_yh + o_w.to(tl.int64) * stride_yw
    o_y = i_n * stride_yn + o_k.to(tl.int64)[:, None] * stride_yc + o_pixel[None, :]
    m = m_k[:, None] & m_p[None, :]
    if HAS_RESIDUAL:
        b_v = b_v + tl.load(p_residual + o_y, mask=m, other=0.0).to(ACC)
    if RELU:
        b_v = relu(b_v)
    b_stored = b_v.to(p_y.dtype.element_ty)
    tl.store(p_y + o_y, b_stored, mask=m)
    if SUMS:
        b_mean, b_scale, b_bias = bn_affine(
            p_mean, p_var, p_weight, p_bias, eps, o_k, m_k, HAS_WEIGHT, HAS_BIAS, ACC
        )
        b_x = tl.trans(tl.load(p_norm_x + o_y, mask=m, other=0.0))  # [BLOCK_P, BLOCK_K]
        b_sum, b_with_x = gradient_sums(
            tl.trans(b_stored), b_x, tl.trans(m), b_mean, b_scale, b_bias, MASK, ACC
        )
        store_sums(p_partial, i_tile, b_sum, b_with_x, K, o_k, m_k)
