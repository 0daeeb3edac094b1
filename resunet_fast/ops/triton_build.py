"""What is compiled of a Triton kernel ahead of time, and what the machine code must look like.

Every `ops/<op>/triton_kernel.py` lists its builds in `builds()`; the offline check compiles each
for every architecture without a GPU, looks at the machine code, and compares it with a committed
table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ARCHITECTURES = (80, 90, 100)
DTYPES = ("bf16", "fp16", "fp32")


@dataclass(frozen=True)
class Build:
    """One compilation of one kernel.

    Args:
        name: unique, such as "bn_act_fwd-bf16-nhwc".
        kernel: the `@triton.jit` function.
        signature: type of every argument, in order, in Triton's words: "*bf16", "i64", "fp32",
            "tensordesc<bf16[1, 16, 16, 64]>", "constexpr".
        constexprs: values of the arguments that are "constexpr".
        aligned: arguments (pointers, sizes) that are divisible by 16, as a launch would find.
        num_warps, num_stages: as in a launch.
        architectures: compute capabilities (80: sm_80) that it is compiled for.
        demands: what must hold of the machine code, by the names that the offline check knows,
            such as "wgmma_from_shared_memory" or "vector_16_bytes".
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    aligned: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 2
    architectures: tuple[int, ...] = ARCHITECTURES
    demands: frozenset[str] = field(default_factory=frozenset)


def signature_of(
    kernel: Any, given: Mapping[str, str], constexprs: Mapping[str, Any]
) -> dict[str, str]:
    """Types of all arguments of a kernel: those given, constexprs, and else 32-bit integers.

    Args:
        kernel: the `@triton.jit` function.
        given: types of its pointers and descriptors, and of what else is no 32-bit integer.
        constexprs: values of what is known at compile time.
    """
    return {
        name: given.get(name, "constexpr" if name in constexprs else "i32")
        for name in kernel.arg_names
    }


def launch(
    name: str,
    kernel: Any,
    operands: Mapping[str, str | int | None],
    constants: Mapping[str, Any],
    *,
    vector: bool,
    num_warps: int = 4,
) -> Build:
    """Describe a launch as Triton would specialise it: sizes of 1, and of multiples of 16.

    Args:
        name: of the build.
        kernel: the `@triton.jit` function.
        operands: of every argument that is no constant, its type, a representative size, or None.
        constants: the rest.
        vector: whether images are aligned and must be read and written 16 bytes at a time.
        num_warps: as in a launch.
    """
    folded = {k: v for k, v in operands.items() if v is None or (isinstance(v, int) and v == 1)}
    constants = {**constants, **folded}
    types = {k: v for k, v in operands.items() if isinstance(v, str)}
    aligned = tuple(
        k
        for k, v in operands.items()
        if k not in folded and (v % 16 == 0 if isinstance(v, int) else str(v).startswith("*"))
    )
    demands = {"no_spills", "vector_16_bytes"} if vector else {"no_spills"}
    return Build(
        name,
        kernel,
        signature_of(kernel, types, constants),
        constants,
        aligned=aligned,
        num_warps=num_warps,
        demands=frozenset(demands),
    )
