"""Kernels of the weight and bias gradients; `triton_wgrad.py` launches them.

Every program sums over one split of the pixels; what they leave is added by `sum_partials_kernel`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def conv2d_bwd_weight_kernel(
    p_grad,  # [N, K, OH, OW]
    p_input,  # [N, C, H, W]
    p_partials,  # [splits, K, R * S, C], C innermost
    pixels,  # N * OH * OW
    split,  # pixels per partial
    OH,
    OW,
    H,
    W,
    s_gn,
    s_gk,
    s_gh,
    s_gw,
    s_xn,
    s_xc,
    s_xh,
    s_xw,
    s_split,
    s_k,
    s_tap,
    K: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_P: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """One program: the sums over one split of the pixels for one tile of [K, R * S * C]."""
    tiles_k = tl.cdiv(K, BLOCK_K)
    tiles = tiles_k * tl.cdiv(R * S * C, BLOCK_J)
    i_split = (tl.program_id(0) // tiles).to(tl.int64)
    i_tile = tl.program_id(0) % tiles
    o_k = (i_tile % tiles_k) * BLOCK_K + tl.arange(0, BLOCK_K)  # [BLOCK_K]
    o_j = (i_tile // tiles_k) * BLOCK_J + tl.arange(0, BLOCK_J)  # [BLOCK_J], the (r, s, c)
    m_k = o_k < K
    m_j = o_j < R * S * C
    o_tap = o_j // C
    o_c = o_j % C
    o_r = o_tap // S - PADDING_H
    o_s = o_tap % S - PADDING_W
    o_column = o_r.to(tl.int64) * s_xh + o_s.to(tl.int64) * s_xw + o_c.to(tl.int64) * s_xc

    # Positions inside a split fit 32 bits, and so do their divisions; the split's own does not.
    first = i_split * split
    count = tl.minimum(pixels - first, split).to(tl.int32)
    w_first = (first % OW).to(tl.int32)
    h_first = (first // OW % OH).to(tl.int32)
    n_first = first // OW // OH
    acc = tl.zeros((BLOCK_K, BLOCK_J), ACC)
    # No split is empty; the compiler keeps products in flight only where it knows that.
    for start in range(0, tl.maximum(count, 1), BLOCK_P):
        o_p = start + tl.arange(0, BLOCK_P)  # [BLOCK_P]
        m_p = o_p < count
        o_row = h_first + (w_first + o_p) // OW
        o_w = (w_first + o_p) % OW
        o_h = o_row % OH
        o_n = n_first + o_row // OH
        o_grad = o_n * s_gn + o_h.to(tl.int64) * s_gh + o_w.to(tl.int64) * s_gw
        b_grad = tl.load(  # [BLOCK_P, BLOCK_K]
            p_grad + o_grad[:, None] + o_k.to(tl.int64)[None, :] * s_gk,
            mask=m_p[:, None] & m_k[None, :],
            other=0.0,
        )
        o_y = o_h * STRIDE_H
        o_x = o_w * STRIDE_W
        y = o_y[:, None] + o_r[None, :]
        x = o_x[:, None] + o_s[None, :]
        o_input = o_n * s_xn + o_y.to(tl.int64) * s_xh + o_x.to(tl.int64) * s_xw
        b_input = tl.load(  # [BLOCK_P, BLOCK_J]
            p_input + o_input[:, None] + o_column[None, :],
            mask=m_p[:, None] & m_j[None, :] & (y >= 0) & (y < H) & (x >= 0) & (x < W),
            other=0.0,
        )
        if UPCAST:
            b_grad = b_grad.to(ACC)
            b_input = b_input.to(ACC)
        acc = tl.dot(tl.trans(b_grad), b_input, acc, input_precision=PRECISION, out_dtype=ACC)
    o_partial = o_k.to(tl.int64)[:, None] * s_k + (o_tap.to(tl.int64) * s_tap + o_c)[None, :]
    tl.store(p_partials + i_split * s_split + o_partial, acc, mask=m_k[:, None] & m_j[None, :])


@triton.jit
def conv2d_bwd_weight_tma_kernel(
    d_grad,  # [N * OH * OW, K] in boxes [BOX_H * BOX_W, BLOCK_K]
    d_input,  # [N, H, W, C] in boxes [1, BOX_H, BOX_W, BLOCK_C]; what lies outside reads as zero
    p_partials,  # [splits, K, R * S, C], C innermost
    boxes,  # in all
    split,  # boxes per partial
    boxes_h,
    boxes_w,
    s_split,
    s_k,
    s_tap,
    K: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    BOX_H: tl.constexpr,
    BOX_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """One program: the sums over one split of the boxes for one tap and tile of [K, C]."""
    tiles_k = tl.cdiv(K, BLOCK_K)
    tiles_c = tl.cdiv(C, BLOCK_C)
    tiles = tiles_k * tiles_c * R * S
    i_split = tl.program_id(0) // tiles
    i_tile = tl.program_id(0) % tiles
    i_c = i_tile % tiles_c * BLOCK_C
    i_k = i_tile // tiles_c % tiles_k * BLOCK_K
    i_tap = i_tile // tiles_c // tiles_k
    i_r = i_tap // S - PADDING_H
    i_s = i_tap % S - PADDING_W
    acc = tl.zeros((BLOCK_K, BLOCK_C), ACC)
    first = i_split * split
    last = tl.maximum(tl.minimum(first + split, boxes), first + 1)  # as above
    for i_box in tl.range(first, last, num_stages=STAGES):
        w = i_box % boxes_w * BOX_W
        h = i_box // boxes_w % boxes_h * BOX_H
        n = i_box // boxes_w // boxes_h
        b_grad = d_grad.load([i_box * (BOX_H * BOX_W), i_k])  # [BOX_H * BOX_W, BLOCK_K]
        b_input = d_input.load([n, h + i_r, w + i_s, i_c]).reshape(BOX_H * BOX_W, BLOCK_C)
        if UPCAST:
            b_grad = b_grad.to(ACC)
            b_input = b_input.to(ACC)
        acc = tl.dot(tl.trans(b_grad), b_input, acc, input_precision=PRECISION, out_dtype=ACC)
    o_k = i_k + tl.arange(0, BLOCK_K)  # [BLOCK_K]
    o_c = i_c + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    o_partial = o_k.to(tl.int64)[:, None] * s_k + o_c[None, :]
    p_tile = p_partials + i_split.to(tl.int64) * s_split + i_tap.to(tl.int64) * s_tap
    tl.store(p_tile + o_partial, acc, mask=(o_k < K)[:, None] & (o_c < C)[None, :])


@triton.jit
def conv2d_bwd_bias_kernel(
    p_grad,  # [N, K, OH, OW]
    p_partials,  # [splits, K]
    pixels,  # N * OH * OW
    split,  # pixels per partial
    OH,
    OW,
    s_gn,
    s_gk,
    s_gh,
    s_gw,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ACC: tl.constexpr,
):
    """One program: the sums over one split of the pixels for one tile of the channels."""
    tiles_k = tl.cdiv(K, BLOCK_K)
    i_split = (tl.program_id(0) // tiles_k).to(tl.int64)
    o_k = (tl.program_id(0) % tiles_k) * BLOCK_K + tl.arange(0, BLOCK_K)  # [BLOCK_K]
    m_k = o_k < K
    first = i_split * split
    count = tl.minimum(pixels - first, split).to(tl.int32)
    w_first = (first % OW).to(tl.int32)
    h_first = (first // OW % OH).to(tl.int32)
    n_first = first // OW // OH
    acc = tl.zeros((BLOCK_P, BLOCK_K), ACC)
    for start in range(0, count, BLOCK_P):
        o_p = start + tl.arange(0, BLOCK_P)  # [BLOCK_P]
        o_row = h_first + (w_first + o_p) // OW
        o_w = ((w_first + o_p) % OW).to(tl.int64)
        o_h = (o_row % OH).to(tl.int64)
        o_grad = (n_first + o_row // OH) * s_gn + o_h * s_gh + o_w * s_gw
        acc += tl.load(  # [BLOCK_P, BLOCK_K]
            p_grad + o_grad[:, None] + o_k.to(tl.int64)[None, :] * s_gk,
            mask=(o_p < count)[:, None] & m_k[None, :],
            other=0.0,
        ).to(ACC)
    tl.store(p_partials + i_split * K + o_k, tl.sum(acc, 0), mask=m_k)


@triton.jit
def sum_partials_kernel(
    p_partials,  # [splits, rows, C], dense
    p_result,  # [rows, C], C innermost
    splits,
    elements,  # rows * C
    s_row,
    C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ACC: tl.constexpr,
):
    """One program: the sums of all partials for one block of elements."""
    o_e = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)  # [BLOCK_E]
    m_e = o_e < elements
    acc = tl.zeros((BLOCK_S, BLOCK_E), ACC)
    for start in range(0, splits, BLOCK_S):
        o_s = start + tl.arange(0, BLOCK_S)  # [BLOCK_S]
        acc += tl.load(  # [BLOCK_S, BLOCK_E]
            p_partials + o_s.to(tl.int64)[:, None] * elements + o_e[None, :],
            mask=(o_s < splits)[:, None] & m_e[None, :],
            other=0.0,
        )
    tl.store(p_result + o_e // C * s_row + o_e % C, tl.sum(acc, 0), mask=m_e)
