"""Running statistics in plain torch.

    t += 1,   f = momentum, or 1 / t for a cumulative average
    running_mean = (1 - f) * running_mean + f * (mean + conv_bias)
    running_var  = (1 - f) * running_var  + f * var * P / (P - 1)          P = count

Nothing but t changes when count is 0; where it is 1, P / (P - 1) is
taken as 1. Source: torch.nn.BatchNorm2d.
"""

from __future__ import annotations

from torch import Tensor


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
    """Update the three running tensors in place."""
    if num_batches_tracked is not None:
        num_batches_tracked += 1
    if count == 0:
        return
    factor: Tensor | float
    if momentum is not None:
        factor = momentum
    else:
        assert num_batches_tracked is not None
        factor = 1.0 / num_batches_tracked.double()
    centre = mean if conv_bias is None else mean + conv_bias
    unbiased = var.double() * (count / max(count - 1, 1))
    for running, new in ((running_mean, centre.double()), (running_var, unbiased)):
        running.copy_(running.double() * (1 - factor) + new * factor)
