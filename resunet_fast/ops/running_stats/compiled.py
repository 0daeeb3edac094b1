"""Running statistics by the compiled libraries, CPU or CUDA, in one call."""

from __future__ import annotations

from torch import Tensor

from ... import native


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
    bias = None if conv_bias is None else conv_bias.to(mean.dtype).contiguous()
    factor = -1.0 if momentum is None else momentum
    new_mean, new_var = running_mean.contiguous(), running_var.contiguous()
    native.ops().update_running_stats(
        mean.contiguous(),
        var.contiguous(),
        bias,
        count,
        factor,
        new_mean,
        new_var,
        num_batches_tracked,
    )
    for running, new in ((running_mean, new_mean), (running_var, new_var)):
        if running is not new:
            running.copy_(new)
