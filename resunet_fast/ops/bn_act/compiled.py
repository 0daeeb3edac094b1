"""bn_act by the compiled libraries, CPU or CUDA: two sweeps over memory forward, two backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import native
from ..layout import accumulator, dense, empty, layout_of


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of a dense tensor."""
    mean = x.new_empty(x.shape[1], dtype=accumulator(x.dtype))
    var = torch.empty_like(mean)
    native.ops().bn_stats(x, mean, var)
    return mean, var


def _vector(vector: Tensor | None, x: Tensor) -> Tensor | None:
    """The vector contiguous and in a dtype that the kernels read: x's or the accumulator's."""
    if vector is None or (vector.dtype == x.dtype and vector.is_contiguous()):
        return vector
    return vector.to(accumulator(x.dtype)).contiguous()


def _statistics_vector(vector: Tensor | None, x: Tensor) -> Tensor | None:
    return None if vector is None else vector.to(accumulator(x.dtype)).contiguous()


def forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    residual: Tensor | None,
    residual_norm: bool,
    residual_weight: Tensor | None,
    residual_bias: Tensor | None,
    residual_mean: Tensor | None,
    residual_var: Tensor | None,
    residual_eps: float,
    relu: bool,
    pool: bool,
    *,
    in_place: bool = False,
) -> tuple[Tensor | None, ...]:
    """Compute as the reference does; `in_place` writes the result over a dense `input`."""
    layout = layout_of(input)
    x = dense(input, layout)
    r = None if residual is None else dense(residual, layout)
    own = (None, None) if mean is not None else statistics(x)
    residual_own = (
        statistics(r) if r is not None and residual_norm and residual_mean is None else (None, None)
    )
    n, c, h, w = x.shape
    output = x if in_place else empty(x, x.shape, layout)
    pooled = empty(x, (n, c, h // 2, w // 2), layout) if pool else None
    native.ops().bn_act_forward(
        x,
        own[0] if mean is None else _statistics_vector(mean, x),
        own[1] if var is None else _statistics_vector(var, x),
        _vector(weight, x),
        _vector(bias, x),
        eps,
        r,
        residual_own[0] if residual_mean is None else _statistics_vector(residual_mean, x),
        residual_own[1] if residual_var is None else _statistics_vector(residual_var, x),
        _vector(residual_weight, x),
        _vector(residual_bias, x),
        residual_eps,
        relu,
        output,
        pooled,
    )
    return output, pooled, *own, *residual_own


def backward(
    grad_output: Tensor | None,
    grad_pooled: Tensor | None,
    input: Tensor,
    output: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    batch_stats: bool,
    residual: Tensor | None,
    residual_weight: Tensor | None,
    residual_mean: Tensor | None,
    residual_var: Tensor | None,
    residual_eps: float,
    residual_batch_stats: bool,
    relu: bool,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Compute as the reference does."""
    layout = layout_of(input)
    x = dense(input, layout)
    z = None if output is None else dense(output, layout)
    owned = None
    if grad_pooled is not None:
        assert z is not None
        owned = empty(x, x.shape, layout)
        dz = None if grad_output is None else dense(grad_output, layout)
        native.ops().max_pool_backward(dz, dense(grad_pooled, layout), z, owned)
        g = owned
    else:
        assert grad_output is not None
        g = dense(grad_output, layout)
    # The gradient of the pooled tensor was summed into a buffer of our own: reuse it for the
    # result.
    dx = (owned if owned is not None else empty(x, x.shape, layout)) if output_mask[0] else None
    grads = (
        dx,
        *(_like(weight, x) if wanted else None for wanted in output_mask[1:3]),
        empty(x, x.shape, layout) if output_mask[3] else None,
        *(_like(residual_weight, x) if wanted else None for wanted in output_mask[4:6]),
    )
    native.ops().bn_act_backward(
        g,
        x,
        z,
        _statistics_vector(mean, x),
        _statistics_vector(var, x),
        _vector(weight, x),
        _vector(bias, x),
        eps,
        batch_stats,
        None if residual is None else dense(residual, layout),
        _statistics_vector(residual_mean, x),
        _statistics_vector(residual_var, x),
        _vector(residual_weight, x),
        residual_eps,
        residual_batch_stats,
        relu,
        *grads,
    )
    return grads


def _like(weight: Tensor | None, x: Tensor) -> Tensor:
    dtype = accumulator(x.dtype) if weight is None else weight.dtype
    return x.new_empty(x.shape[1], dtype=dtype)
