"""Kernels of a few lines: some meet every demand, each of the others breaks exactly one."""
# ruff: noqa: N803 (constexprs are capitals)

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from resunet_fast.ops.triton_build import Build

C = "constexpr"


@triton.jit
def copy_kernel(x, y, n, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + o, tl.load(x + o, o < n, other=0.0), o < n)


@triton.jit
def scatter_kernel(x, y, n, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + o * 3, tl.load(x + o, o < n, other=0.0), o < n)


@triton.jit
def narrow_program_kernel(x, y, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + o, tl.load(x + o, o < n, other=0.0), o < n)


@triton.jit
def narrow_row_kernel(x, y, stride, BLOCK: tl.constexpr):
    row = (tl.program_id(1) * stride).to(tl.int64)  # too late
    o = row + tl.arange(0, BLOCK)
    tl.store(y + o, tl.load(x + o))


@triton.jit
def narrow_loop_kernel(x, y, rows, stride, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    start = 0
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(rows):
        total += tl.load(x + start + o)
        start = i * stride
    tl.store(y + o, total)


@triton.jit
def narrow_branch_kernel(x, y, rows, stride, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    if tl.program_id(1) < 3:
        start = rows * stride
        tl.store(y + o, tl.load(x + o) + 1)
    else:
        start = 0
    tl.store(y + start + o, tl.load(x + o))


@triton.jit
def wide_row_kernel(x, y, channels, stride, tiles, BLOCK: tl.constexpr):
    # 32 bits are enough for an index along one axis; the row is 64 bits before it is multiplied.
    i_row = (tl.program_id(0) // tiles).to(tl.int64)
    o_channel = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    o = i_row * stride + o_channel
    m = o_channel < channels
    tl.store(y + o, tl.load(x + o, m, other=0.0), m)


@triton.jit
def hoard_kernel(x, y, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    b = tl.load(x + o)
    tl.store(y + o, b - tl.sum(b))


@triton.jit
def atomic_kernel(x, y, BLOCK: tl.constexpr):
    tl.atomic_add(y, tl.sum(tl.load(x + tl.arange(0, BLOCK))))


@triton.jit
def broken_kernel(x, y, BLOCK: tl.constexpr):
    tl.store(y + tl.arange(0, BLOCK), tl.load(x + tl.arange(0, 2 * BLOCK)))


@triton.jit
def matmul_kernel(
    x, w, y, K, M: tl.constexpr, N: tl.constexpr, BK: tl.constexpr, TF32: tl.constexpr
):
    o_m, o_n, o_k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BK)
    acc = tl.zeros((M, N), tl.float32)
    for k in range(0, K, BK):
        b_x = tl.load(x + o_m[:, None] * K + (k + o_k)[None, :])
        b_w = tl.load(w + o_n[None, :] * K + (k + o_k)[:, None])
        acc = tl.dot(b_x, b_w, acc, input_precision="tf32" if TF32 else "ieee")
    tl.store(y + o_m[:, None] * N + o_n[None, :], acc.to(y.dtype.element_ty))


@triton.jit
def tma_matmul_kernel(
    x, w, y, K, M: tl.constexpr, N: tl.constexpr, BK: tl.constexpr, THROUGH_REGISTERS: tl.constexpr
):
    i_m, i_n = tl.program_id(0) * M, tl.program_id(1) * N
    acc = tl.zeros((M, N), tl.float32)
    for k in tl.range(0, K, BK, num_stages=3):
        b_x = x.load([i_m, k])
        if THROUGH_REGISTERS:
            b_x = b_x * 2
        acc = tl.dot(b_x, w.load([i_n, k]).T, acc)
    y.store([i_m, i_n], acc.to(y.dtype))


def _copy(name: str, kernel: Any = copy_kernel, **options: Any) -> Build:
    sizes = list(kernel.arg_names[2:-1])
    return Build(
        name,
        kernel,
        {"x": "*fp32", "y": "*fp32", **dict.fromkeys(sizes, "i32"), "BLOCK": C},
        **{
            "constexprs": {"BLOCK": 1024},
            "aligned": ("x", "y", *sizes),
            "architectures": (90,),
            **options,
        },
    )


def _matmul(name: str, dtype: str = "fp16", **options: Any) -> Build:
    return Build(
        name,
        matmul_kernel,
        {
            **dict.fromkeys(("x", "w", "y"), f"*{dtype}"),
            **dict.fromkeys(("K", "M", "N", "BK", "TF32"), C),
        },
        {"K": 256, "M": 128, "N": 128, "BK": 64, "TF32": False},
        **{"aligned": ("x", "w", "y"), "num_warps": 8, **options},
    )


def _tma(name: str, size: int | None = 256, through_registers: bool = False) -> Build:
    box = "tensordesc<bf16[128, 64]>"
    constexprs = {"M": 128, "N": 128, "BK": 64, "THROUGH_REGISTERS": through_registers}
    signature = {"x": box, "w": box, "y": "tensordesc<bf16[128, 128]>"}
    kinds = {"K": "i32" if size is None else C, **dict.fromkeys(constexprs, C)}
    if size is not None:
        constexprs["K"] = size
    return Build(
        name,
        tma_matmul_kernel,
        {**signature, **kinds},
        constexprs,
        num_warps=8,
        architectures=(90,),
        demands=frozenset({"wgmma_from_shared_memory", "tma", "matrix_instruction"}),
    )


def demands(*names: str) -> frozenset[str]:
    return frozenset(names)


def good() -> list[Build]:
    every = (80, 90, 100)
    return [
        _copy("copy", demands=demands("vector_16_bytes"), architectures=every),
        _copy("wide-row", wide_row_kernel, demands=demands("vector_16_bytes")),
        _matmul(
            "matmul", demands=demands("matrix_instruction", "vector_16_bytes"), architectures=every
        ),
        _tma("tma-matmul"),
    ]


# The demand that each build breaks, and no other.
BROKEN: dict[str, tuple[Build, str]] = {
    build.name: (build, demand)
    for build, demand in (
        (_copy("unaligned", aligned=(), demands=demands("vector_16_bytes")), "vector_16_bytes"),
        (_copy("scatter", scatter_kernel, demands=demands("vector_16_bytes")), "vector_16_bytes"),
        (_copy("narrow-program", narrow_program_kernel), "addresses_64_bit"),
        (_copy("narrow-row", narrow_row_kernel), "addresses_64_bit"),
        (_copy("narrow-loop", narrow_loop_kernel), "addresses_64_bit"),
        (_copy("narrow-branch", narrow_branch_kernel), "addresses_64_bit"),
        (_copy("hoard", hoard_kernel, constexprs={"BLOCK": 32768}, num_warps=1), "no_spills"),
        (_copy("atomic", atomic_kernel), "no_atomics"),
        (_matmul("too-many-stages", num_stages=7, architectures=(80,)), "shared_memory_fits"),
        (
            _matmul(
                "on-cuda-cores", "fp32", architectures=(80,), demands=demands("matrix_instruction")
            ),
            "matrix_instruction",
        ),
        (_matmul("pointers", architectures=(90,), demands=demands("tma")), "tma"),
        (_tma("maybe-no-step", size=None), "matrix_pipelined"),
        (_tma("through-registers", through_registers=True), "wgmma_from_shared_memory"),
    )
}


def builds() -> list[Build]:
    return [*good(), *(build for build, _ in BROKEN.values()), _copy("broken", broken_kernel)]
