"""The upsampling kernels that are compiled ahead of time: a decoder's, doubling, beside a skip."""

from __future__ import annotations

from typing import Any

import triton.language as tl

from ..triton_build import DTYPES, Build, launch
from . import triton_device as device
from .reference import MODES
from .triton_tiling import BACKWARD, FORWARD, Blocks, block_of, readers

CHANNELS, SIZE = 64, 256


def builds() -> list[Build]:
    """Every mode in bfloat16, the others in the default mode."""
    bilinear = [(dtype, last, "bilinear") for dtype in DTYPES for last in (True, False)]
    others = [("bf16", True, mode) for mode in MODES if mode != "bilinear"]
    return [make(*kind) for kind in (*bilinear, *others) for make in (_forward, _backward)]


def _blocks(blocks: Blocks, side: int, last: bool, mode: str) -> dict[str, Any]:
    block_p, block_c = block_of(blocks, CHANNELS, side * side, last)
    sizes = {"BLOCK_P": block_p, "BLOCK_C": block_c, "UNIT": 16 if last else 1}
    return {**sizes, "CHANNELS_LAST": last, "MODE": MODES.index(mode), "ACC": tl.float32}


def _sizes() -> dict[str, int]:
    return {"C": CHANNELS, "H": SIZE, "W": SIZE, "OH": 2 * SIZE, "OW": 2 * SIZE}


def _name(kernel: str, dtype: str, last: bool, mode: str) -> str:
    return f"upsample_{kernel}-{mode}-{dtype}-{'nhwc' if last else 'nchw'}"


def _forward(dtype: str, last: bool, mode: str) -> Build:
    images = dict.fromkeys(("p_x", "p_skip", "p_y"), f"*{dtype}")
    operands: dict[str, Any] = {**images, "S": CHANNELS, **_sizes()}
    constants = {**_blocks(FORWARD, 2 * SIZE, last, mode), "HAS_SKIP": True}
    name = _name("fwd", dtype, last, mode)
    return launch(name, device.upsample_fwd_kernel, operands, constants, vector=last)


def _backward(dtype: str, last: bool, mode: str) -> Build:
    images = dict.fromkeys(("p_dy", "p_dx"), f"*{dtype}")
    operands: dict[str, Any] = {**images, **_sizes()}
    terms = dict.fromkeys(("ROWS", "COLUMNS"), readers(SIZE, 2 * SIZE, mode))
    constants = {**_blocks(BACKWARD, SIZE, last, mode), **terms}
    name = _name("bwd", dtype, last, mode)
    return launch(name, device.upsample_bwd_kernel, operands, constants, vector=last)
