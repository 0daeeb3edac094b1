"""One convolution in Triton with everything that follows it, on whichever kernel can address it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ... import environment
from ...tuning import ConvConfig, ConvProblem, lookup, pick
from ..bn_act.triton_blocks import INPUT_MASK, NO_MASK
from ..layout import accumulator, channels_innermost, dense, empty
from ..triton_dtype import accumulator_type, precision, upcast
from .triton_epilogue import bn_stats_merge_kernel, bn_sums_merge_kernel
from .triton_pointer import conv2d_fwd_pointer_kernel
from .triton_tma import conv2d_fwd_tma_kernel

MERGED_TILES = 128
MERGED_FILTERS = 16
# Sums of so many tiles are left to bn_act's merge, which reads them with few programs.
MOST_SUMS = 1024


class Geometry(NamedTuple):
    """How a result's pixels read the sources': pixel o reads (o * stride + tap - padding) / spread.

    Args:
        kernel: (R, S).
        stride, padding: (vertical, horizontal); a padding may be negative.
        spread: pixels of the source lie so far apart, with zeros between: the stride of the
            convolution whose data gradient this is.
        flip: take the weight's taps in reverse.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    spread: tuple[int, int] = (1, 1)
    flip: bool = False


class Normalised(NamedTuple):
    """z = relu(batch_norm(x)), where a convolution returns dz.

    Args:
        x: [N, C, H, W] of dz's dtype.
        mean, var: [C].
        weight, bias: [C] or None.
        eps: of the batch norm.
        relu: whether there is the ReLU.
    """

    x: Tensor
    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    relu: bool


@dataclass(frozen=True)
class Epilogue:
    """What happens to a sum before it is rounded and stored, in this order.

    Args:
        scale, shift: [K], per filter, or None.
        residual: added; of the result's shape and dtype, or None.
        relu: rectify.
        pool: return max_pool2d(result, 2) as well.
        statistics: return mean and biased variance of every filter, of the values as rounded;
            without residual and ReLU.
        sums: return what the backward of this batch norm sums over tiles, of the values as rounded;
            without pool and statistics.
    """

    scale: Tensor | None = None
    shift: Tensor | None = None
    residual: Tensor | None = None
    relu: bool = False
    pool: bool = False
    statistics: bool = False
    sums: Normalised | None = None


class Result(NamedTuple):
    """What a convolution returns; None for what was not asked for.

    `sums` are [tiles, 3, K], as bn_act's backward takes them.
    """

    output: Tensor
    pooled: Tensor | None = None
    mean: Tensor | None = None
    var: Tensor | None = None
    sums: Tensor | None = None


class Operands(NamedTuple):
    """One launch: sources, packed weight, result and the rest of the epilogue's tensors."""

    x: Tensor
    skip: Tensor | None
    weight: Tensor
    residual: Tensor | None
    norm_x: Tensor | None
    output: Tensor


def pack(weight: Tensor, dtype: torch.dtype, *, transpose: bool = False) -> Tensor:
    """Return a weight [K, C, R, S] as [K, R * S, C], or transposed as [C, R * S, K], in `dtype`."""
    rows = weight.permute((1, 2, 3, 0) if transpose else (0, 2, 3, 1))
    if rows.dtype != dtype or not rows.is_contiguous():
        rows = torch.empty(rows.shape, dtype=dtype, device=weight.device).copy_(rows)
    return rows.flatten(1, 2)


def convolve(
    operator: str,
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    geometry: Geometry,
    size: tuple[int, int],
    layout: torch.memory_format,
    epilogue: Epilogue,
) -> Result:
    """Convolve one source, or two as if concatenated, and apply an epilogue.

    Args:
        operator: on whose behalf, for the table of measurements.
        x: [N, C, H, W].
        skip: [N, C', H, W] in the same dtype, or None.
        weight: [K, R * S, C + C'], as :func:`pack` returns it, same dtype.
        geometry: which pixels are read.
        size: of the result.
        layout: of the result.
        epilogue: what follows.
    """
    if layout == torch.channels_last:
        x = channels_innermost(x)
        skip = None if skip is None else channels_innermost(skip)
    y = empty(x, (x.shape[0], weight.shape[0], *size), layout)
    residual = None if epilogue.residual is None else dense(epilogue.residual, layout)
    norm_x = None if epilogue.sums is None else dense(epilogue.sums.x, layout)
    operands = Operands(x, skip, weight, residual, norm_x, y)
    if y.numel() == 0:
        return Result(y, F.max_pool2d(y, 2) if epilogue.pool else None)
    config = _config(operator, operands, geometry)
    tiles = _tiles(config, y)
    partial = None
    if epilogue.statistics or epilogue.sums:
        dtype = accumulator(x.dtype)
        partial = x.new_empty((y.shape[0] * tiles[0] * tiles[1], 3, y.shape[1]), dtype=dtype)
    with torch.cuda.device_of(x):
        if config.family == "tma":
            pooled = _launch_boxes(operands, geometry, epilogue, config, tiles, partial)
        else:
            _launch_pointers(operands, geometry, epilogue, config, tiles, partial)
            pooled = F.max_pool2d(y, 2) if epilogue.pool else None
        if partial is None:
            return Result(y, pooled)
        if epilogue.statistics:
            return Result(y, pooled, *merge(partial))
        return Result(y, pooled, sums=merge_sums(partial))


def _config(operator: str, operands: Operands, geometry: Geometry) -> ConvConfig:
    x, weight, y = operands.x, operands.weight, operands.output
    n, k, h, w = y.shape
    dtype = str(x.dtype).removeprefix("torch.")
    stride = geometry.stride if geometry.spread == (1, 1) else geometry.spread
    shape = (n, h, w, weight.shape[2], k, geometry.kernel, stride)
    problem = ConvProblem(operator, *shape, dtype, x.itemsize)
    boxes = _addressable(operands, geometry)
    capability = environment.compute_capability(x.device)
    measured = lookup(problem, capability)
    config = None if measured is None else measured.config
    usable = config is not None and (boxes or config.family == "pointer")
    return config if config is not None and usable else pick(problem, boxes=boxes)


def _addressable(operands: Operands, geometry: Geometry) -> bool:
    """Whether the tensor memory accelerator can fetch every operand of a 3x3 convolution."""
    if not environment.has_tensor_memory_accelerator(operands.x.device):
        return False
    if (geometry.kernel, geometry.stride, geometry.padding) != ((3, 3), (1, 1), (1, 1)):
        return False
    if geometry.spread != (1, 1):
        return False
    x, skip, _, *others = operands
    return _aligned(operands.weight, operands.weight.shape[2]) and all(
        image is None
        or (
            image.is_contiguous(memory_format=torch.channels_last)
            and _aligned(image, image.shape[1])
        )
        for image in (x, skip, *others)
    )


def _aligned(tensor: Tensor, row: int) -> bool:
    return tensor.data_ptr() % 16 == 0 and row * tensor.itemsize % 16 == 0


def _tiles(config: ConvConfig, y: Tensor) -> tuple[int, int]:
    """Number of tiles along the height and the width of one image, or (1, pixels)."""
    _, _, h, w = y.shape
    if config.family == "pointer":
        return 1, triton.cdiv(h * w, config.columns)
    return triton.cdiv(h, config.rows), triton.cdiv(w, config.columns)


def _flags(operands: Operands, epilogue: Epilogue) -> dict[str, Any]:
    x, norm = operands.x, epilogue.sums
    mask = INPUT_MASK if norm is not None and norm.relu else NO_MASK
    return {
        "HAS_SCALE": epilogue.scale is not None,
        "HAS_SHIFT": epilogue.shift is not None,
        "HAS_RESIDUAL": operands.residual is not None,
        "RELU": epilogue.relu,
        "STATISTICS": epilogue.statistics,
        "SUMS": norm is not None,
        "MASK": mask.value,
        "HAS_WEIGHT": norm is not None and norm.weight is not None,
        "HAS_BIAS": norm is not None and norm.bias is not None,
        "ACC": accumulator_type(x),
        "UPCAST": upcast(x),
        "PRECISION": precision(x),
    }


def _vectors(*vectors: Tensor | None) -> list[Tensor | None]:
    return [None if vector is None else vector.contiguous() for vector in vectors]


def _norm_vectors(epilogue: Epilogue) -> list[Tensor | None]:
    norm = epilogue.sums
    return [None] * 4 if norm is None else _vectors(norm.mean, norm.var, norm.weight, norm.bias)


def _channels(operands: Operands) -> dict[str, int]:
    skip = operands.skip
    return {"C_X": operands.x.shape[1], "C_SKIP": 0 if skip is None else skip.shape[1]}


def _launch_boxes(
    operands: Operands,
    geometry: Geometry,
    epilogue: Epilogue,
    config: ConvConfig,
    tiles: tuple[int, int],
    partial: Tensor | None,
) -> Tensor | None:
    x, skip, weight, residual, norm_x, y = operands
    n, k, h, w = y.shape
    rows, columns = config.rows, config.columns
    pooled = empty(x, (n, k, h // 2, w // 2), torch.channels_last) if epilogue.pool else None
    stored_pool = pooled if pooled is not None and pooled.numel() else None
    tiles_k = triton.cdiv(k, config.filters)
    taps = weight.transpose(0, 1)  # only a box whose first size is one is a matrix as it lies
    weight_box = [1, config.filters, config.channels]
    # Each program computes `filters` channels of rows x columns pixels of one image.
    conv2d_fwd_tma_kernel[(n * tiles[0] * tiles[1] * tiles_k,)](
        _boxes(x, rows, columns, config.channels),
        None if skip is None else _boxes(skip, rows, columns, config.channels),
        TensorDescriptor(taps, list(taps.shape), list(taps.stride()), weight_box),
        None if residual is None else _boxes(residual, rows, columns, config.filters),
        *_vectors(epilogue.scale, epilogue.shift),
        None if norm_x is None else _boxes(norm_x, rows // 4, columns, config.filters),
        *_norm_vectors(epilogue),
        _boxes(y, rows, columns, config.filters),
        None
        if stored_pool is None
        else _boxes(stored_pool, rows // 2, columns // 2, config.filters),
        partial,
        h,
        w,
        k,
        *tiles,
        tiles_k,
        epilogue.sums.eps if epilogue.sums else 0.0,
        **_channels(operands),
        FLIP=geometry.flip,
        POOL=stored_pool is not None,
        **_flags(operands, epilogue),
        BLOCK_H=rows,
        BLOCK_W=columns,
        BLOCK_C=config.channels,
        BLOCK_K=config.filters,
        STAGES=config.stages,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return pooled


def _boxes(image: Tensor, rows: int, columns: int, channels: int) -> TensorDescriptor:
    n, c, h, w = image.shape
    # Not the tensor's own strides, which are arbitrary where a size is one.
    return TensorDescriptor(
        image, [n, h, w, c], [h * w * c, w * c, c, 1], [1, rows, columns, channels]
    )


def _launch_pointers(
    operands: Operands,
    geometry: Geometry,
    epilogue: Epilogue,
    config: ConvConfig,
    tiles: tuple[int, int],
    partial: Tensor | None,
) -> None:
    x, skip, weight, residual, norm_x, y = operands
    n, k, oh, ow = y.shape
    tiles_k = triton.cdiv(k, config.filters)
    # Each program computes `filters` channels of consecutive pixels of one image.
    conv2d_fwd_pointer_kernel[(n * tiles[1] * tiles_k,)](
        x,
        skip,
        weight,
        residual,
        *_vectors(epilogue.scale, epilogue.shift),
        norm_x,
        *_norm_vectors(epilogue),
        y,
        partial,
        *x.shape[2:],
        oh,
        ow,
        k,
        tiles[1],
        tiles_k,
        *x.stride(),
        *((0, 0, 0, 0) if skip is None else skip.stride()),
        *y.stride(),
        epilogue.sums.eps if epilogue.sums else 0.0,
        **_channels(operands),
        R=geometry.kernel[0],
        S=geometry.kernel[1],
        STRIDE_H=geometry.stride[0],
        STRIDE_W=geometry.stride[1],
        PADDING_H=geometry.padding[0],
        PADDING_W=geometry.padding[1],
        SPREAD_H=geometry.spread[0],
        SPREAD_W=geometry.spread[1],
        FLIP=geometry.flip,
        **_flags(operands, epilogue),
        BLOCK_P=config.columns,
        BLOCK_C=config.channels,
        BLOCK_K=config.filters,
        STAGES=config.stages,
        num_warps=config.warps,
        num_stages=config.stages,
    )


def merge(partial: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance from tiles' partial results, always merged in the same order."""
    k = partial.shape[2]
    mean = partial.new_empty(k)
    var = partial.new_empty(k)
    while True:
        tiles = partial.shape[0]
        groups = triton.cdiv(tiles, MERGED_TILES)
        final = groups == 1
        merged = mean if final else partial.new_empty(groups, 3, k)
        # Each program merges up to 128 tiles of 16 filters.
        bn_stats_merge_kernel[(groups, triton.cdiv(k, MERGED_FILTERS))](
            partial,
            merged,
            var if final else None,
            tiles,
            k,
            FINAL=final,
            BLOCK_T=MERGED_TILES,
            BLOCK_K=MERGED_FILTERS,
        )
        if final:
            return mean, var
        partial = merged


def merge_sums(partial: Tensor) -> Tensor:
    """Add tiles' sums in groups, always in the same order, where there are more than a few."""
    tiles, _, k = partial.shape
    if tiles <= MOST_SUMS:
        return partial
    merged = partial.new_empty((triton.cdiv(tiles, MERGED_TILES), 3, k), dtype=torch.float64)
    # Each program adds up to 128 tiles of 16 filters.
    bn_sums_merge_kernel[(merged.shape[0], triton.cdiv(k, MERGED_FILTERS))](
        partial, merged, tiles, k, BLOCK_T=MERGED_TILES, BLOCK_K=MERGED_FILTERS
    )
    return merged
