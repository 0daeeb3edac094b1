"""bn_act in plain torch: the specification.

    xhat = (x - mean) / sqrt(var + eps)            mean, var: over N, H, W where none are given
    v    = xhat * weight + bias [+ r | + batch norm of r]
    z    = relu(v),   pooled = max_pool2d(z, 2)

    g    = (dz + max_pool2d'(dpooled)) * [z > 0 or z is NaN]
    dbias = sum g,   dweight = sum g * xhat,   dr = g, or the next line with r's statistics
    dx   = weight / sqrt(var + eps) * (g - dbias / P - xhat * dweight / P)      P = N * H * W

Source: Ioffe and Szegedy 2015 (arXiv:1502.03167); backward derived in docs/math.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layout import accumulator, dense, layout_of

Norm = tuple["Tensor | None", "Tensor | None"]


def _per_channel(vector: Tensor, dtype: torch.dtype) -> Tensor:
    return vector.to(dtype)[:, None, None]


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of an NCHW tensor."""
    # Not var_mean, whose mean of a channel with an infinity is NaN.
    return x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)


def normalise(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return v, xhat and the factor weight / sqrt(var + eps), all in x's dtype."""
    rstd = torch.rsqrt(_per_channel(var, x.dtype) + eps)
    xhat = (x - _per_channel(mean, x.dtype)) * rstd
    scale = rstd if weight is None else rstd * _per_channel(weight, x.dtype)
    v = xhat if weight is None else xhat * _per_channel(weight, x.dtype)
    return v if bias is None else v + _per_channel(bias, x.dtype), xhat, scale


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
) -> tuple[Tensor | None, ...]:
    """Compute (z, pooled, mean, var, residual_mean, residual_var), None for what was given."""
    x = input.to(accumulator(input.dtype))
    own = (None, None) if mean is not None else statistics(x)
    v, _, _ = normalise(x, *_given(mean, var, own), weight, bias, eps)
    residual_own: Norm = (None, None)
    if residual is not None:
        r = residual.to(x.dtype)
        if residual_norm:
            residual_own = (None, None) if residual_mean is not None else statistics(r)
            given = _given(residual_mean, residual_var, residual_own)
            r, _, _ = normalise(r, *given, residual_weight, residual_bias, residual_eps)
        v = v + r
    z = dense((v.relu() if relu else v).to(input.dtype), layout_of(input))
    pooled = F.max_pool2d(z, 2) if pool else None
    return z, pooled, *own, *residual_own


def _given(mean: Tensor | None, var: Tensor | None, own: Norm) -> tuple[Tensor, Tensor]:
    chosen = own if mean is None else (mean, var)
    assert chosen[0] is not None
    assert chosen[1] is not None
    return chosen[0], chosen[1]


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
    """Compute the gradients of (input, weight, bias, residual, residual_weight, residual_bias)."""
    x = input.to(accumulator(input.dtype))
    v, _, _ = normalise(x, mean, var, weight, bias, eps)
    z = v.to(input.dtype) if output is None else output
    g = _upstream(grad_output, grad_pooled, z).to(x.dtype)
    if relu:
        g = torch.where((z > 0) | z.isnan(), g, 0)
    dx, dweight, dbias = _norm_backward(g, x, mean, var, weight, eps, batch_stats)
    dr, drweight, drbias = g, None, None
    if residual_mean is not None:
        assert residual is not None
        assert residual_var is not None
        r = residual.to(x.dtype)
        dr, drweight, drbias = _norm_backward(
            g, r, residual_mean, residual_var, residual_weight, residual_eps, residual_batch_stats
        )
    layout = layout_of(input)
    grads = (dx, dweight, dbias, dr, drweight, drbias)
    dtypes = (input, weight, weight, input, residual_weight, residual_weight)
    return tuple(
        grad.to(like.dtype if like is not None else grad.dtype).contiguous(
            memory_format=layout if grad.dim() == 4 else torch.contiguous_format
        )
        if wanted and grad is not None
        else None
        for grad, like, wanted in zip(grads, dtypes, output_mask, strict=True)
    )


def _upstream(grad_output: Tensor | None, grad_pooled: Tensor | None, z: Tensor) -> Tensor:
    if grad_pooled is None:
        return torch.zeros_like(z) if grad_output is None else grad_output
    _, indices = F.max_pool2d(z, 2, return_indices=True)
    # Not max_unpool2d, which torch.use_deterministic_algorithms forbids.
    zeros = z.new_zeros(z.shape).flatten(2)
    scattered = zeros.scatter(2, indices.flatten(2), grad_pooled.flatten(2)).view(z.shape)
    return scattered if grad_output is None else grad_output + scattered


def _norm_backward(
    g: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    eps: float,
    batch_stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if batch_stats:
        # The statistics are functions of x: recomputing them keeps second derivatives right.
        mean, var = statistics(x)
    _, xhat, scale = normalise(x, mean, var, weight, None, eps)
    dbias = g.sum((0, 2, 3))
    dweight = (g * xhat).sum((0, 2, 3))
    if not batch_stats:
        return scale * g, dweight, dbias
    positions = max(g.numel() // max(g.shape[1], 1), 1)
    centred = g - (dbias[:, None, None] + xhat * dweight[:, None, None]) / positions
    return scale * centred, dweight, dbias
