"""Running statistics by Triton: one launch of one program, which also counts the batch."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_build import Build, launch

BLOCK_C = 1024


@triton.jit
def update_running_stats_kernel(
    p_mean,
    p_var,
    p_bias,
    p_running_mean,
    p_running_var,
    p_counter,
    C,
    momentum: tl.float64,
    unbias: tl.float64,
    BLOCK_C: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_COUNTER: tl.constexpr,
    CUMULATIVE: tl.constexpr,
):
    """Count, then move C running values towards the batch's, in float64."""
    if HAS_COUNTER:
        batches = tl.load(p_counter) + 1
        # Every thread reads the counter: none may write it before all have.
        tl.debug_barrier()
        tl.store(p_counter, batches)
    if CUMULATIVE:
        b_factor = tl.full((1,), 1.0, tl.float64) / batches
    else:
        b_factor = tl.full((1,), momentum, tl.float64)
    for first in range(0, C, BLOCK_C):
        b_c = first + tl.arange(0, BLOCK_C)
        m = b_c < C
        b_mean = tl.load(p_mean + b_c, mask=m, other=0.0).to(tl.float64)  # [BLOCK_C]
        if HAS_BIAS:
            b_mean += tl.load(p_bias + b_c, mask=m, other=0.0).to(tl.float64)
        b_var = tl.load(p_var + b_c, mask=m, other=0.0).to(tl.float64) * unbias
        move(p_running_mean + b_c, b_mean, b_factor, m)
        move(p_running_var + b_c, b_var, b_factor, m)


@triton.jit
def move(p, b_new, b_factor, m):
    """Replace a part, `b_factor` [1], of the running values [BLOCK_C] by new ones."""
    b_running = tl.load(p, mask=m, other=0.0).to(tl.float64)
    b_running = b_running * (1.0 - b_factor) + b_new * b_factor
    if p.dtype.element_ty != tl.float64:
        b_running = b_running.to(tl.float32)  # there is no conversion from float64 to bfloat16
    tl.store(p, b_running.to(p.dtype.element_ty), mask=m)


def update(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    mean: Tensor,
    var: Tensor,
    conv_bias: Tensor | None,
    count: int,
    momentum: float | None,
) -> None:
    """Compute as the reference does."""
    new_mean, new_var = running_mean.contiguous(), running_var.contiguous()
    with torch.cuda.device_of(mean):
        # One program, because nobody else may read the counter while it is written.
        update_running_stats_kernel[(1,)](
            mean.contiguous(),
            var.contiguous(),
            None if conv_bias is None else conv_bias.contiguous(),
            new_mean,
            new_var,
            num_batches_tracked,
            mean.numel() if count > 0 else 0,
            0.0 if momentum is None else momentum,
            count / max(count - 1, 1),
            BLOCK_C=BLOCK_C,
            HAS_BIAS=conv_bias is not None,
            HAS_COUNTER=num_batches_tracked is not None,
            CUMULATIVE=momentum is None,
        )
    for running, new in ((running_mean, new_mean), (running_var, new_var)):
        if running is not new:
            running.copy_(new)


def builds() -> list[Build]:
    """With every option: the largest code."""
    vectors = ("p_mean", "p_var", "p_bias", "p_running_mean", "p_running_var")
    operands: dict[str, Any] = {**dict.fromkeys(vectors, "*fp32"), "p_counter": "*i64", "C": 64}
    operands |= dict.fromkeys(("momentum", "unbias"), "fp64")
    flags = dict.fromkeys(("HAS_BIAS", "HAS_COUNTER", "CUMULATIVE"), True)
    constants = {"BLOCK_C": BLOCK_C, **flags}
    return [
        launch(
            "update_running_stats", update_running_stats_kernel, operands, constants, vector=False
        )
    ]
