"""Transposed convolution of kernel 2 and stride 2 in Triton: matrix products over pixels.

A pixel's C channels times a matrix [C, 2 * 2 * K] are the K channels of its four pixels of the
result, stored where they belong. Backward reads those four again: the input's gradient is the
product with the transposed matrix; the weight's is that of a convolution of kernel 2 and stride 2
from the result to the input. Nothing here has run on a GPU yet.

Source: docs/math.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..conv2d.op import output_layout
from ..conv2d.triton_wgrad import bias_gradient, block, weight_gradient
from ..layout import channels_innermost, dense, empty, layout_of
from ..triton_build import Build, signature_of
from ..triton_dtype import accumulator_type, upcast


@triton.jit
def conv_transpose2d_fwd_kernel(
    p_input,  # [N, C, H, W]
    p_weight,  # [C, 2 * 2 * K]
    p_bias,  # [K] or None
    p_output,  # [N, K, OH, OW]
    cells,  # N * CH * CW
    CH,  # the result's 2x2 cells; output padding adds some that no input pixel fills
    CW,
    H,
    W,
    OH,
    OW,
    s_xn,
    s_xc,
    s_xh,
    s_xw,
    s_yn,
    s_yk,
    s_yh,
    s_yw,
    C: tl.constexpr,
    K: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UPCAST: tl.constexpr,
    ACC: tl.constexpr,
):
    """One program: one tile of [cells, 2 * 2 * K]."""
    tiles_j = tl.cdiv(4 * K, BLOCK_J)
    i_p = (tl.program_id(0) // tiles_j).to(tl.int64)
    i_j = tl.program_id(0) % tiles_j
    o_p = i_p * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
    o_j = i_j * BLOCK_J + tl.arange(0, BLOCK_J)  # [BLOCK_J], the (r, s, k)
    o_w = o_p % CW
    o_h = o_p // CW % CH
    o_n = o_p // CW // CH
    m_p = o_p < cells
    m_j = o_j < 4 * K
    m_input = m_p & (o_h < H) & (o_w < W)
    o_input = o_n * s_xn + o_h * s_xh + o_w * s_xw
    acc = tl.zeros((BLOCK_P, BLOCK_J), ACC)
    for start in range(0, C, BLOCK_C):
        o_c = start + tl.arange(0, BLOCK_C)  # [BLOCK_C]
        m_c = o_c < C
        b_input = tl.load(  # [BLOCK_P, BLOCK_C]
            p_input + o_input[:, None] + o_c.to(tl.int64)[None, :] * s_xc,
            mask=m_input[:, None] & m_c[None, :],
            other=0.0,
        )
        b_weight = tl.load(  # [BLOCK_C, BLOCK_J]
            p_weight + o_c[:, None] * (4 * K) + o_j[None, :],
            mask=m_c[:, None] & m_j[None, :],
            other=0.0,
        )
        if UPCAST:
            b_input = b_input.to(ACC)
            b_weight = b_weight.to(ACC)
        acc = tl.dot(b_input, b_weight, acc, input_precision="ieee", out_dtype=ACC)
    # A cell without a pixel holds the bias alone, even where the weight is not finite.
    acc = tl.where(m_input[:, None], acc, 0.0)
    o_k = o_j % K
    if BIAS:
        acc += tl.load(p_bias + o_k, mask=m_j, other=0.0).to(ACC)[None, :]
    o_r = o_j // K // 2
    o_s = o_j // K % 2
    m_y = (2 * o_h[:, None] + o_r[None, :] < OH) & (2 * o_w[:, None] + o_s[None, :] < OW)
    o_cell = o_n * s_yn + 2 * o_h * s_yh + 2 * o_w * s_yw
    o_inner = o_r.to(tl.int64) * s_yh + o_s.to(tl.int64) * s_yw + o_k.to(tl.int64) * s_yk
    tl.store(
        p_output + o_cell[:, None] + o_inner[None, :],
        acc.to(p_output.dtype.element_ty),
        mask=m_p[:, None] & m_j[None, :] & m_y,
    )


@triton.jit
def conv_transpose2d_bwd_input_kernel(
    p_grad,  # [N, K, OH, OW]
    p_weight,  # [C, 2 * 2 * K]
    p_output,  # [N, C, H, W]
    pixels,  # N * H * W
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
    C: tl.constexpr,
    K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_J: tl.constexpr,
    UPCAST: tl.constexpr,
    ACC: tl.constexpr,
):
    """One program: one tile of [pixels, C]."""
    tiles_c = tl.cdiv(C, BLOCK_C)
    i_p = (tl.program_id(0) // tiles_c).to(tl.int64)
    i_c = tl.program_id(0) % tiles_c
    o_p = i_p * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    o_w = o_p % W
    o_h = o_p // W % H
    o_n = o_p // W // H
    m_p = o_p < pixels
    m_c = o_c < C
    o_cell = o_n * s_gn + 2 * o_h * s_gh + 2 * o_w * s_gw
    acc = tl.zeros((BLOCK_P, BLOCK_C), ACC)
    for start in range(0, 4 * K, BLOCK_J):
        o_j = start + tl.arange(0, BLOCK_J)  # [BLOCK_J], the (r, s, k)
        m_j = o_j < 4 * K
        o_tap = (o_j // K // 2).to(tl.int64) * s_gh + (o_j // K % 2).to(tl.int64) * s_gw
        o_inner = o_tap + (o_j % K).to(tl.int64) * s_gk
        b_grad = tl.load(  # [BLOCK_P, BLOCK_J]
            p_grad + o_cell[:, None] + o_inner[None, :],
            mask=m_p[:, None] & m_j[None, :],
            other=0.0,
        )
        b_weight = tl.load(  # [BLOCK_C, BLOCK_J]
            p_weight + o_c[:, None] * (4 * K) + o_j[None, :],
            mask=m_c[:, None] & m_j[None, :],
            other=0.0,
        )
        if UPCAST:
            b_grad = b_grad.to(ACC)
            b_weight = b_weight.to(ACC)
        acc = tl.dot(b_grad, tl.trans(b_weight), acc, input_precision="ieee", out_dtype=ACC)
    o_output = o_n * s_xn + o_h * s_xh + o_w * s_xw
    tl.store(
        p_output + o_output[:, None] + o_c.to(tl.int64)[None, :] * s_xc,
        acc.to(p_output.dtype.element_ty),
        mask=m_p[:, None] & m_c[None, :],
    )


@dataclass(frozen=True)
class Config:
    """How a product over pixels is cut into programs.

    Args:
        block_p, block_n: tile of the result, pixels by channels.
        block_k: terms per matrix product.
        num_warps, num_stages: as Triton has them.
    """

    block_p: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def configure(pixels: int, columns: int, terms: int) -> Config:
    """Choose a configuration from sizes alone: rows and columns of the result, length of sums."""
    block_p, block_n = block(pixels, 128), block(columns, 128)
    return Config(
        block_p,
        block_n,
        block(terms, 64),
        num_warps=8 if block_p * block_n == 128 * 128 else 4,
        num_stages=3,
    )


def forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, output_padding: Sequence[int]
) -> Tensor:
    """Compute as the reference does."""
    n, c, h, w = input.shape
    k, oh, ow = weight.shape[1], 2 * h + output_padding[0], 2 * w + output_padding[1]
    x = channels_innermost(input)
    output = empty(x, (n, k, oh, ow), output_layout(input, weight))
    ch, cw = triton.cdiv(oh, 2), triton.cdiv(ow, 2)
    config = configure(n * ch * cw, 4 * k, c)
    grid = (triton.cdiv(n * ch * cw, config.block_p) * triton.cdiv(4 * k, config.block_n),)
    shift = None if bias is None else bias.contiguous()
    with torch.cuda.device_of(x):
        # One program owns one tile of the result in its cells; column tiles vary fastest.
        conv_transpose2d_fwd_kernel[grid](
            *(x, _matrix(weight, x.dtype), shift, output, n * ch * cw, ch, cw, h, w, oh, ow),
            *(*x.stride(), *output.stride(), c, k, bias is not None),
            *(config.block_p, config.block_n, config.block_k, upcast(x), accumulator_type(x)),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return output


def backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Compute as the reference does."""
    grad = channels_innermost(grad_output)
    dx = _input_gradient(grad, input, weight) if output_mask[0] else None
    dweight, dbias = None, None
    if output_mask[1]:
        # The transposed convolution backwards is a convolution whose input is the gradient.
        exact = weight_gradient(input, grad, (2, 2), (2, 2), (0, 0))
        dweight = dense(exact.to(weight.dtype), layout_of(weight))
    if output_mask[2] and bias is not None:
        dbias = bias_gradient(grad).to(bias.dtype)
    return dx, dweight, dbias


def _input_gradient(grad: Tensor, input: Tensor, weight: Tensor) -> Tensor:
    n, c, h, w = input.shape
    k = weight.shape[1]
    output = empty(input, input.shape, output_layout(input, weight))
    config = configure(n * h * w, c, 4 * k)
    grid = (triton.cdiv(n * h * w, config.block_p) * triton.cdiv(c, config.block_n),)
    with torch.cuda.device_of(grad):
        # One program owns one tile of the result; channel tiles vary fastest.
        conv_transpose2d_bwd_input_kernel[grid](
            *(grad, _matrix(weight, grad.dtype), output, n * h * w, h, w),
            *(*grad.stride(), *output.stride(), c, k),
            *(config.block_p, config.block_n, config.block_k, upcast(grad), accumulator_type(grad)),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return output


def _matrix(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight, [C, K, 2, 2], as [C, 2 * 2 * K]; a view of one in channels_last memory."""
    return dense(weight.to(dtype), torch.channels_last).permute(0, 2, 3, 1).reshape(len(weight), -1)


def builds() -> list[Build]:
    """What is compiled ahead of time: both products at the networks' narrowest and widest."""
    shapes = (("bf16", 128, 64), ("bf16", 1024, 512), ("fp16", 256, 128))
    return [make(*shape) for shape in shapes for make in (_forward_build, _input_gradient_build)]


def _forward_build(dtype: str, c: int, k: int) -> Build:
    config = configure(2**20, 4 * k, c)
    return _build(
        f"conv_transpose2d_fwd-{dtype}-{c}to{k}",
        conv_transpose2d_fwd_kernel,
        {"p_input": dtype, "p_weight": dtype, "p_bias": "fp32", "p_output": dtype},
        {"BIAS": True, "s_xc": 1, "s_yk": 1, "C": c, "K": k, "BLOCK_J": config.block_n}
        | {"BLOCK_C": config.block_k},
        ("s_xn", "s_xh", "s_xw", "s_yn", "s_yh", "s_yw"),
        config,
    )


def _input_gradient_build(dtype: str, c: int, k: int) -> Build:
    config = configure(2**20, c, 4 * k)
    return _build(
        f"conv_transpose2d_bwd_input-{dtype}-{c}to{k}",
        conv_transpose2d_bwd_input_kernel,
        {"p_grad": dtype, "p_weight": dtype, "p_output": dtype},
        {"s_gk": 1, "s_xc": 1, "C": c, "K": k, "BLOCK_J": config.block_k}
        | {"BLOCK_C": config.block_n},
        ("s_gn", "s_gh", "s_gw", "s_xn", "s_xh", "s_xw"),
        config,
    )


def _build(
    name: str,
    kernel: Any,
    pointers: dict[str, str],
    sizes: dict[str, Any],
    strides: tuple[str, ...],
    config: Config,
) -> Build:
    constexprs = {**sizes, "BLOCK_P": config.block_p, "UPCAST": False, "ACC": tl.float32}
    given = {name: f"*{dtype}" for name, dtype in pointers.items()}
    return Build(
        name,
        kernel,
        signature_of(kernel, given, constexprs),
        constexprs,
        aligned=(*pointers, *strides),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        demands=frozenset({"no_spills", "matrix_instruction", "vector_16_bytes"}),
    )
