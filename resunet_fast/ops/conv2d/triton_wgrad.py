"""Weight and bias gradients of a convolution in Triton, the same bits at every call.

dW[k, r, s, c] = sum over pixels p of g[p, k] x[p * stride + (r, s) - padding, c] is a matrix
product over pixels. They are split, in a fixed order, into runs whose sums (partials) a second
kernel adds in a fixed order: no atomics. Operands come as boxes through the tensor memory
accelerator where it can address them, else through pointers. Nothing here has run on a GPU yet.

Source: docs/math.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ... import environment
from ..layout import accumulator, channels_innermost
from ..triton_build import Build, signature_of
from ..triton_dtype import accumulator_type, precision, upcast
from .triton_wgrad_kernels import (
    conv2d_bwd_bias_kernel,
    conv2d_bwd_weight_kernel,
    conv2d_bwd_weight_tma_kernel,
    sum_partials_kernel,
)

# A partial adds so many pixels at most: few enough for float32, many enough that the partials of up
# to 1024 channels take less memory than the operands.
MAX_PIXELS_PER_PARTIAL = 16384
_MIN_PIXELS_PER_PARTIAL = 512
_PROGRAMS_PER_MULTIPROCESSOR = 2
_BOX = 64  # pixels per matrix product


@dataclass(frozen=True)
class Config:
    """How a weight gradient is cut into programs.

    Args:
        block_k, block_c: tile of the result, output channels by input channels (by all of r, s, c
            where operands come through pointers).
        block_p: pixels per matrix product.
        split: pixels per partial, a multiple of `block_p`.
        num_warps, num_stages: as Triton has them.
    """

    block_k: int
    block_c: int
    block_p: int
    split: int
    num_warps: int
    num_stages: int


def configure(pixels: int, k: int, columns: int, repeats: int, multiprocessors: int) -> Config:
    """Choose a configuration from sizes alone.

    Args:
        pixels: that are summed.
        k, columns: rows and columns of the result that is cut into tiles.
        repeats: results of that size, one per tap where tiles do not run across taps.
        multiprocessors: of the GPU.
    """
    block_k, block_c, block_p = block(k, 128), block(columns, 128), block(pixels, _BOX)
    tiles = repeats * math.ceil(k / block_k) * math.ceil(columns / block_c)
    splits = math.ceil(multiprocessors * _PROGRAMS_PER_MULTIPROCESSOR / tiles)
    return Config(
        block_k,
        block_c,
        block_p,
        _split(pixels, splits, block_p),
        num_warps=8 if block_k * block_c == 128 * 128 else 4,
        num_stages=3,
    )


def block(size: int, largest: int) -> int:
    """Return the power of two that covers a size, within what matrix instructions take."""
    return min(largest, max(16, 1 << (size - 1).bit_length()))


def _split(pixels: int, splits: int, block_p: int) -> int:
    bounded = max(_MIN_PIXELS_PER_PARTIAL, min(math.ceil(pixels / splits), MAX_PIXELS_PER_PARTIAL))
    return math.ceil(bounded / block_p) * block_p


def weight_gradient(
    grad_output: Tensor,
    x: Tensor,
    kernel_size: tuple[int, int],
    stride: Sequence[int],
    padding: Sequence[int],
    *,
    skip: Tensor | None = None,
) -> Tensor:
    """Gradient of the weight of a convolution without dilation and groups.

    Args:
        grad_output: [N, K, OH, OW], any strides (copied where the channels do not lie innermost).
        x: [N, C, H, W], the convolution's input, same dtype.
        kernel_size, stride, padding: (vertical, horizontal).
        skip: [N, C', H, W], a second source, convolved behind `x` along the channels.

    Returns:
        [K, C + C', R, S], channels_last, in the accumulator's dtype (float64 or float32).
    """
    sources = [x] if skip is None else [x, skip]
    shape = (grad_output.shape[1], *kernel_size, sum(source.shape[1] for source in sources))
    result = torch.zeros if grad_output.numel() == 0 else torch.empty
    dweight = result(shape, dtype=accumulator(x.dtype), device=x.device)
    if dweight.numel() and grad_output.numel():
        grad, start = channels_innermost(grad_output), 0
        with torch.cuda.device_of(x):
            for source in sources:
                part = dweight[..., start : start + source.shape[1]].flatten(1, 2)
                _sum(grad, channels_innermost(source), part, kernel_size, stride, padding)
                start += source.shape[1]
    return dweight.permute(0, 3, 1, 2)


def _sum(
    grad: Tensor,
    x: Tensor,
    result: Tensor,
    kernel_size: tuple[int, int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> None:
    """Write the gradient of one source's weight into `result`, [K, R * S, C]."""
    k, taps, c = result.shape
    box = box_of(grad, x, stride)
    pixels = grad.shape[0] * grad.shape[2] * grad.shape[3]
    sizes = (k, taps * c, 1) if box is None else (k, c, taps)
    config = configure(pixels, *sizes, _multiprocessors(x))
    if box is None:
        config = replace(config, block_p=_narrowed(config.block_p, x.itemsize))
    splits = math.ceil(pixels / config.split)
    partials = result[None] if splits == 1 else result.new_empty(splits, k, taps, c)
    if box is None:
        _launch(grad, x, partials, kernel_size, stride, padding, config)
    else:
        _launch_tma(grad, x, partials, kernel_size, padding, box, config)
    if splits > 1:
        _sum_partials(partials.flatten(1, 2), result.flatten(0, 1))


def _narrowed(block_p: int, itemsize: int) -> int:
    """Pixels per product that take the bytes of 16-bit ones: more overflow shared memory."""
    return max(16, block_p * 2 // max(itemsize, 2))


def box_of(grad: Tensor, x: Tensor, stride: Sequence[int]) -> tuple[int, int] | None:
    """Return (rows, columns) of the boxes that both operands are read in, None for pointers.

    A box's pixels follow each other in the gradient: as rows of a matrix they are operands in
    shared memory, otherwise they would pass through registers. Boxes tile the image without a rest:
    a rest would multiply zeros by values that belong to no pixel of the sum, and 0 * inf is not 0.
    """
    if not environment.has_tensor_memory_accelerator(x.device):
        return None
    n, _, h, w = grad.shape
    dense_rows = grad.is_contiguous(memory_format=torch.channels_last) and n * h * w < 2**31
    if tuple(stride) != (1, 1) or not (dense_rows and _boxes_reach(grad) and _boxes_reach(x)):
        return None
    columns = min(w & -w, _BOX)
    rows = min(h & -h, _BOX // columns) if columns == w else 1
    return (rows, columns) if rows * columns >= _BOX // 2 else None


def _boxes_reach(tensor: Tensor) -> bool:
    n, c, h, w = tensor.stride()
    whole = all(step > 0 and step * tensor.element_size() % 16 == 0 for step in (n, h, w))
    return c == 1 and whole and tensor.shape[1] % 8 == 0 and tensor.data_ptr() % 16 == 0


def _launch(
    grad: Tensor,
    x: Tensor,
    partials: Tensor,
    kernel_size: tuple[int, int],
    stride: Sequence[int],
    padding: Sequence[int],
    config: Config,
) -> None:
    splits, k, taps, c = partials.shape
    n, _, oh, ow = grad.shape
    tiles = triton.cdiv(k, config.block_k) * triton.cdiv(taps * c, config.block_c)
    # One program owns one tile of the result in one split; tiles vary fastest, so that those which
    # read the same pixels run together.
    conv2d_bwd_weight_kernel[(tiles * splits,)](
        *(grad, x, partials, n * oh * ow, config.split, oh, ow, *x.shape[2:]),
        *(*grad.stride(), *x.stride(), *partials.stride()[:3]),
        *(k, c, *kernel_size, *stride, *padding),
        *(config.block_k, config.block_c, config.block_p),
        *(upcast(x), precision(x), accumulator_type(x)),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _launch_tma(
    grad: Tensor,
    x: Tensor,
    partials: Tensor,
    kernel_size: tuple[int, int],
    padding: Sequence[int],
    box: tuple[int, int],
    config: Config,
) -> None:
    splits, k, taps, c = partials.shape
    n, _, oh, ow = grad.shape
    boxes_h, boxes_w, pixels = oh // box[0], ow // box[1], box[0] * box[1]
    rows = grad.permute(0, 2, 3, 1).view(-1, k)
    d_grad = TensorDescriptor.from_tensor(rows, [pixels, config.block_k])
    d_input = TensorDescriptor.from_tensor(x.permute(0, 2, 3, 1), [1, *box, config.block_c])
    tiles = triton.cdiv(k, config.block_k) * triton.cdiv(c, config.block_c) * taps
    # One program owns one tap and tile of the result in one split.
    conv2d_bwd_weight_tma_kernel[(tiles * splits,)](
        *(d_grad, d_input, partials),
        *(n * boxes_h * boxes_w, config.split // pixels, boxes_h, boxes_w),
        *(*partials.stride()[:3], k, c, *kernel_size, *padding),
        *(*box, config.block_k, config.block_c, config.num_stages),
        *(upcast(x), precision(x), accumulator_type(x)),
        num_warps=config.num_warps,
    )


def bias_gradient(grad_output: Tensor) -> Tensor:
    """Sum of a gradient over its pixels: [N, K, H, W] to [K] in the accumulator's dtype."""
    n, k, h, w = grad_output.shape
    dtype, pixels = accumulator(grad_output.dtype), n * h * w
    if grad_output.numel() == 0:
        return grad_output.new_zeros(k, dtype=dtype)
    grad = channels_innermost(grad_output)
    block_k, block_p = block(k, 64), block(pixels, 64)
    tiles = triton.cdiv(k, block_k)
    wanted = triton.cdiv(_multiprocessors(grad) * _PROGRAMS_PER_MULTIPROCESSOR, tiles)
    split = _split(pixels, wanted, block_p)
    splits = triton.cdiv(pixels, split)
    partials = grad.new_empty(splits, 1, k, dtype=dtype)
    with torch.cuda.device_of(grad):
        # One program owns one tile of the channels in one split.
        conv2d_bwd_bias_kernel[(tiles * splits,)](
            *(grad, partials, pixels, split, h, w, *grad.stride()),
            *(k, block_k, block_p, accumulator_type(grad)),
        )
        if splits == 1:
            return partials.flatten()
        result = grad.new_empty(1, k, dtype=dtype)
        _sum_partials(partials, result)
    return result.flatten()


def _sum_partials(partials: Tensor, result: Tensor) -> None:
    """Write the sum of [splits, rows, C] over its first axis into `result`, [rows, C]."""
    splits, rows, c = partials.shape
    block_s, block_e = block(splits, 16), 128
    # One program owns one block of elements, in all splits.
    sum_partials_kernel[(triton.cdiv(rows * c, block_e),)](
        *(partials, result, splits, rows * c, result.stride(0)),
        *(c, block_s, block_e, accumulator_type(result)),
    )


def _multiprocessors(tensor: Tensor) -> int:
    if not tensor.is_cuda:
        return 1
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


def builds() -> list[Build]:
    """What is compiled ahead of time: both forms at the networks' widths, and the sums."""
    boxed = [
        _boxed_build(dtype, channels, box)
        for dtype, channels, box in (
            ("bf16", 64, (1, 64)),
            ("bf16", 128, (1, 64)),
            ("bf16", 128, (1, 32)),
            ("bf16", 128, (8, 8)),
            ("fp16", 128, (1, 64)),
        )
    ]
    pointed = [
        _pointed_build(dtype, c, k, kernel, stride)
        for dtype, c, k, kernel, stride in (
            ("bf16", 3, 64, 3, 1),
            ("bf16", 64, 64, 3, 1),
            ("bf16", 64, 128, 3, 2),
            ("bf16", 128, 128, 1, 1),
            ("bf16", 128, 256, 2, 2),
            ("fp16", 128, 128, 3, 1),
            ("fp32", 128, 128, 3, 1),
        )
    ]
    return [*boxed, *pointed, *_sum_builds()]


def _boxed_build(dtype: str, channels: int, box: tuple[int, int]) -> Build:
    config = configure(2**20, channels, channels, 9, 132)
    constexprs = {
        **{"K": channels, "C": channels, "R": 3, "S": 3, "PADDING_H": 1, "PADDING_W": 1},
        **{"BOX_H": box[0], "BOX_W": box[1], "BLOCK_K": config.block_k, "BLOCK_C": config.block_c},
        **{"STAGES": config.num_stages, "UPCAST": False, "PRECISION": "ieee"},
        **{"ACC": tl.float32},
    }
    given = {
        "p_partials": "*fp32",
        "d_grad": f"tensordesc<{dtype}[{box[0] * box[1]}, {config.block_k}]>",
        "d_input": f"tensordesc<{dtype}[1, {box[0]}, {box[1]}, {config.block_c}]>",
    }
    return Build(
        f"conv2d_bwd_weight_tma-{dtype}-{channels}-{box[0]}x{box[1]}",
        conv2d_bwd_weight_tma_kernel,
        signature_of(conv2d_bwd_weight_tma_kernel, given, constexprs),
        constexprs,
        aligned=("p_partials", "s_split", "s_k", "s_tap"),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        architectures=(90, 100),
        demands=frozenset({"no_spills", "matrix_instruction", "wgmma_from_shared_memory"}),
    )


def _pointed_build(dtype: str, c: int, k: int, kernel: int, stride: int) -> Build:
    config = configure(2**20, k, kernel * kernel * c, 1, 132)
    block_p = _narrowed(config.block_p, 4 if dtype == "fp32" else 2)
    constexprs = {
        **{"s_gk": 1, "s_xc": 1, "K": k, "C": c, "R": kernel, "S": kernel},
        **{"STRIDE_H": stride, "STRIDE_W": stride},
        **{"PADDING_H": kernel % 2 * (kernel // 2), "PADDING_W": kernel % 2 * (kernel // 2)},
        **{"BLOCK_K": config.block_k, "BLOCK_J": config.block_c, "BLOCK_P": block_p},
        **{"UPCAST": False, "PRECISION": "tf32" if dtype == "fp32" else "ieee"},
        **{"ACC": tl.float32},
    }
    pointers = {"p_grad": f"*{dtype}", "p_input": f"*{dtype}", "p_partials": "*fp32"}
    strides = ("s_gn", "s_gh", "s_gw", *(("s_xn", "s_xh", "s_xw", "s_tap") if c % 16 == 0 else ()))
    # 32-bit operands are turned on their way into shared memory, four bytes at a time.
    wide = c % 16 == 0 and dtype != "fp32"
    demands = {"no_spills", "matrix_instruction"} | ({"vector_16_bytes"} if wide else set())
    return Build(
        f"conv2d_bwd_weight-{dtype}-{c}to{k}-{kernel}x{kernel}-stride{stride}",
        conv2d_bwd_weight_kernel,
        signature_of(conv2d_bwd_weight_kernel, pointers, constexprs),
        constexprs,
        aligned=(*pointers, "split", "s_split", "s_k", *strides),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        demands=frozenset(demands),
    )


def _sum_builds() -> list[Build]:
    bias = {"s_gk": 1, "K": 64, "BLOCK_K": 64, "BLOCK_P": 64, "ACC": tl.float32}
    gradient = {"p_grad": "*bf16", "p_partials": "*fp32"}
    partials = {"C": 64, "BLOCK_S": 16, "BLOCK_E": 128, "ACC": tl.float32}
    sums = {"p_partials": "*fp32", "p_result": "*fp32"}
    streaming = frozenset({"no_spills", "vector_16_bytes"})
    return [
        Build(
            "conv2d_bwd_bias-bf16",
            conv2d_bwd_bias_kernel,
            signature_of(conv2d_bwd_bias_kernel, gradient, bias),
            bias,
            aligned=(*gradient, "split", "s_gn", "s_gh", "s_gw"),
            demands=streaming,
        ),
        Build(
            "sum_partials-fp32",
            sum_partials_kernel,
            signature_of(sum_partials_kernel, sums, partials),
            partials,
            aligned=(*sums, "elements", "s_row"),
            demands=streaming,
        ),
    ]
