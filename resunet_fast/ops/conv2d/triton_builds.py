"""Convolutions that are compiled ahead of time, with the tiles that their launches would pick."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton.language as tl

from ...tuning import ConvConfig, ConvProblem, pick
from ..bn_act.triton_blocks import INPUT_MASK, NO_MASK
from ..triton_build import Build, signature_of
from .triton_epilogue import bn_stats_merge_kernel, bn_sums_merge_kernel
from .triton_launch import MERGED_FILTERS, MERGED_TILES
from .triton_pointer import conv2d_fwd_pointer_kernel
from .triton_tma import conv2d_fwd_tma_kernel

_ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
_AFFINE = ("HAS_SCALE", "HAS_SHIFT", "HAS_RESIDUAL", "RELU", "POOL", "STATISTICS")
# "MASK" is that of a ReLU, of sums.
EPILOGUES = (*_AFFINE, "SUMS", "MASK", "HAS_WEIGHT", "HAS_BIAS")


def _constants(dtype: str, config: ConvConfig, epilogue: tuple[str, ...]) -> dict[str, Any]:
    return {
        **{name: name in epilogue for name in EPILOGUES},
        "MASK": (INPUT_MASK if "MASK" in epilogue else NO_MASK).value,
        "ACC": tl.float32,
        "UPCAST": False,
        "PRECISION": "tf32" if dtype == "fp32" else "ieee",
        "BLOCK_C": config.channels,
        "BLOCK_K": config.filters,
        "STAGES": config.stages,
    }


def _vectors(epilogue: tuple[str, ...]) -> dict[str, tuple[bool, str]]:
    flags = {
        "p_scale": ("HAS_SCALE",),
        "p_shift": ("HAS_SHIFT",),
        "p_mean": ("SUMS",),
        "p_var": ("SUMS",),
        "p_weight": ("HAS_WEIGHT",),
        "p_bias": ("HAS_BIAS",),
        "p_partial": ("STATISTICS", "SUMS"),
    }
    return {name: (not set(needed).isdisjoint(epilogue), "*fp32") for name, needed in flags.items()}


def _picked(
    dtype: str, c: int, k: int, kernel: int, stride: int, size: int, boxes: bool
) -> ConvConfig:
    shape = (16, size, size, c, k, (kernel, kernel), (stride, stride))
    return pick(ConvProblem("conv2d", *shape, dtype, _ITEMSIZE[dtype]), boxes=boxes)


def box_build(
    name: str,
    dtype: str,
    c: int,
    k: int,
    *epilogue: str,
    skip: int = 0,
    size: int = 256,
    flip: bool = False,
) -> Build:
    """A 3x3 convolution fed by tensor descriptors.

    Args:
        name: of what it is for.
        dtype: of operands and result, in Triton's words.
        c, k: channels and filters.
        epilogue: those of :data:`EPILOGUES` that are on.
        skip: channels of the second source, 0 without one.
        size: of the image.
        flip: whether it is a data gradient.
    """
    config = _picked(dtype, c + skip, k, 3, 1, size, boxes=True)
    rows, columns = config.rows, config.columns

    def boxes(*block: int) -> str:
        return f"tensordesc<{dtype}[{','.join(map(str, block))}]>"

    optional = {
        "d_skip": (skip > 0, boxes(1, rows, columns, config.channels)),
        "d_residual": ("HAS_RESIDUAL" in epilogue, boxes(1, rows, columns, config.filters)),
        "d_pooled": ("POOL" in epilogue, boxes(1, rows // 2, columns // 2, config.filters)),
        "d_norm_x": ("SUMS" in epilogue, boxes(1, rows // 4, columns, config.filters)),
        **_vectors(epilogue),
    }
    constants = {
        **_constants(dtype, config, epilogue),
        **{"C_X": c, "C_SKIP": skip, "FLIP": flip, "BLOCK_H": rows, "BLOCK_W": columns},
    }
    given = {
        "d_x": boxes(1, rows, columns, config.channels),
        "d_w": boxes(1, config.filters, config.channels),
        "d_y": boxes(1, rows, columns, config.filters),
    }
    return _build(
        f"conv2d_fwd_tma-{dtype}-{c + skip}to{k}-{name}",
        conv2d_fwd_tma_kernel,
        given,
        optional,
        constants,
        config,
        aligned=("H", "W", "K"),
        architectures=(90, 100),
        demands=frozenset({"tma", "wgmma_from_shared_memory"}),
    )


def pointer_build(
    name: str,
    dtype: str,
    c: int,
    k: int,
    *epilogue: str,
    kernel: int = 3,
    stride: int = 1,
    spread: int = 1,
    channels_last: bool = True,
    size: int = 256,
) -> Build:
    """A convolution fed by pointers; arguments as for :func:`box_build`.

    Args:
        name, dtype, c, k, epilogue, size: see there.
        kernel, stride: of the convolution.
        spread: for the data gradient of a strided one, its stride.
        channels_last: or contiguous.
    """
    config = _picked(dtype, c, k, kernel, stride, size, boxes=False)
    images = ("x", "y")
    unit = {f"stride_{i}{'c' if channels_last else 'w'}": 1 for i in images}
    whole = c % 16 == 0
    axes = ("n", "h", "w") if channels_last else ("n", "c", "h")
    strides = tuple(f"stride_{i}{a}" for i in ("x", "y") if whole or i == "y" for a in axes)
    absent = {f"stride_s{a}": "i32" for a in "nchw"}
    optional = {
        "p_skip": (False, f"*{dtype}"),
        "p_residual": ("HAS_RESIDUAL" in epilogue, f"*{dtype}"),
        "p_norm_x": ("SUMS" in epilogue, f"*{dtype}"),
        **_vectors(epilogue),
    }
    constants = {
        **_constants(dtype, config, epilogue),
        **unit,
        **{"C_X": c, "C_SKIP": 0, "R": kernel, "S": kernel, "FLIP": spread > 1},
        **{"STRIDE_H": stride, "STRIDE_W": stride, "SPREAD_H": spread, "SPREAD_W": spread},
        **{"PADDING_H": kernel // 2, "PADDING_W": kernel // 2, "BLOCK_P": config.columns},
    }
    del constants["POOL"]
    pointers = dict.fromkeys(("p_x", "p_w", "p_y"), f"*{dtype}")
    return _build(
        f"conv2d_fwd_pointer-{dtype}-{c}to{k}-{name}",
        conv2d_fwd_pointer_kernel,
        {**pointers, **absent},
        optional,
        constants,
        config,
        aligned=("H", "W", "OH", "OW", "K", *strides),
        demands=frozenset(
            {"matrix_instruction", *(["vector_16_bytes"] if whole and channels_last else [])}
        ),
    )


def _build(
    name: str,
    kernel: Any,
    given: Mapping[str, str],
    optional: Mapping[str, tuple[bool, str]],
    constants: Mapping[str, Any],
    config: ConvConfig,
    *,
    aligned: tuple[str, ...],
    demands: frozenset[str],
    architectures: tuple[int, ...] = (80, 90, 100),
) -> Build:
    present = {argument: kind for argument, (there, kind) in optional.items() if there}
    absent = {argument: None for argument, (there, _) in optional.items() if not there}
    types = {**given, **present, "eps": "fp64"}
    constants = {**constants, **absent}
    pointers = tuple(argument for argument, kind in types.items() if kind.startswith("*"))
    return Build(
        name,
        kernel,
        signature_of(kernel, types, constants),
        constants,
        aligned=(*pointers, *aligned),
        num_warps=config.warps,
        num_stages=config.stages,
        architectures=architectures,
        demands=demands,
    )


def builds() -> list[Build]:
    """Forward and data gradients in the shapes that differ in code, and the merge of statistics."""
    return [
        box_build("plain", "bf16", 64, 64),
        box_build("plain", "bf16", 128, 128),
        box_build("plain", "fp16", 128, 128),
        box_build("plain", "fp32", 128, 128),
        box_build("small", "bf16", 512, 512, size=16),
        box_build("gradient", "bf16", 128, 64, flip=True),
        box_build("two-sources", "bf16", 128, 64, skip=64),
        pointer_build("first-layer", "bf16", 3, 64, "HAS_SHIFT"),
        pointer_build("3x3", "bf16", 128, 128),
        pointer_build("3x3", "fp16", 128, 128),
        pointer_build("3x3", "fp32", 128, 128),
        pointer_build("3x3-contiguous", "bf16", 128, 128, channels_last=False),
        pointer_build("1x1", "bf16", 64, 128, kernel=1),
        pointer_build("stride2", "bf16", 64, 128, stride=2),
        pointer_build("stride2-gradient", "bf16", 128, 64, spread=2),
        *(_merge_build(final) for final in (False, True)),
        _merge_sums_build(),
    ]


def _merge_build(final: bool) -> Build:
    given = {"p_partial": "*fp32", "p_merged": "*fp32", "p_var": "*fp32" if final else "constexpr"}
    constants: dict[str, Any] = {} if final else {"p_var": None}
    constants |= {"FINAL": final, "BLOCK_T": MERGED_TILES, "BLOCK_K": MERGED_FILTERS}
    pointers = tuple(name for name, kind in given.items() if kind.startswith("*"))
    return Build(
        f"bn_stats_merge-{'final' if final else 'partial'}",
        bn_stats_merge_kernel,
        signature_of(bn_stats_merge_kernel, given, constants),
        constants,
        aligned=(*pointers, "K"),
    )


def _merge_sums_build() -> Build:
    given = {"p_partial": "*fp32", "p_merged": "*fp64"}
    constants = {"BLOCK_T": MERGED_TILES, "BLOCK_K": MERGED_FILTERS}
    return Build(
        "bn_sums_merge",
        bn_sums_merge_kernel,
        signature_of(bn_sums_merge_kernel, given, constants),
        constants,
        aligned=(*given, "K"),
    )
