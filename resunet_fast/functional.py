"""The public operators: validation, autocast, the choice between the fused and the plain way.

Tensors are NCHW-shaped, `[N, C, H, W]`, contiguous or channels_last (results take the layout of the
first operand), in float64, float32, bfloat16 or float16. Statistics are computed in float32
(float64 for float64). Numbers, errors for bad batch-norm input, and NaN behaviour are PyTorch
eager's.

The plain way (ordinary torch operations) is taken inside torch.func transforms, which do not see
through custom operators, and for inputs that torch itself rejects, so that its own error is raised.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import eager, ops
from .arguments import (
    DTYPES,
    Conv,
    Norm,
    check_doubling,
    check_residual,
    check_sources,
    conv_shape,
    convolves,
    fits,
    normalises,
    transposes,
)
from .ops.bn_act import direct
from .ops.upsample.reference import MODES
from .registry import forced_backend

__all__ = [
    "Conv",
    "Norm",
    "bn_act",
    "bn_act_conv",
    "conv2d",
    "conv_bias_act",
    "conv_bn_act",
    "conv_transpose2d",
    "update_running_stats",
    "upsample",
]


def bn_act(
    input: Tensor,
    norm: Norm,
    *,
    residual: Tensor | None = None,
    residual_norm: Norm | None = None,
    relu: bool = True,
    pool: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Batch norm, residual addition and ReLU in one operator, differentiable to any order.

    z = relu(batch_norm(input)), relu(batch_norm(input) + residual), or, for a projection shortcut,
    relu(batch_norm(input) + batch_norm'(residual)).

    Args:
        input: [N, C, H, W].
        norm: the batch norm; its running statistics are updated in place when training.
        residual: same shape and dtype as `input` (autocast converts it), or None.
        residual_norm: the residual's own batch norm, or None.
        relu: apply the ReLU.
        pool: return also max_pool2d(z, 2), from the same sweep.

    Returns:
        z in `input`'s shape, dtype and layout; with `pool` the pair (z, [N, C, H // 2, W // 2]).

    Raises:
        ValueError: `residual` does not match, or `residual_norm` comes without it.
        Whatever torch.nn.functional.batch_norm raises for bad input.

    Source: resunet_fast/ops/bn_act/reference.py, docs/math.md.
    """
    if residual_norm is None and not pool:
        plain = direct.bn_act(input, norm, residual, relu)
        if plain is not None:
            return plain
    if residual is not None and _autocast_dtype(input) is not None:
        residual = residual.to(input.dtype)
    check_residual(input.shape, input.dtype, residual, residual_norm)
    if eager.required() or not fits(input, norm, pool) or not fits(residual, residual_norm):
        return eager.bn_act(input, norm, residual, residual_norm, relu, pool)
    z, pooled, *stats = ops.bn_act.BN_ACT(
        input, *_norm_arguments(norm, residual, residual_norm), relu, pool, forced_backend()
    )
    _track(input, norm, residual_norm, stats, None)
    return (z, pooled) if pool else z


def conv_bn_act(
    input: Tensor,
    conv: Conv,
    norm: Norm,
    *,
    skip: Tensor | None = None,
    upsample: str = "none",
    residual: Tensor | None = None,
    residual_norm: Norm | None = None,
    relu: bool = True,
    pool: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolution, batch norm, residual addition and ReLU in one differentiable operator.

    z = relu(batch_norm(conv(input)) [+ residual | + batch_norm'(residual)]). With batch statistics
    a bias of the convolution cancels: it is left out, added to the running mean, and its gradient
    is exactly zero (eager's is rounding noise).

    Args:
        input: [N, C, H, W]. Under autocast it is cast to the autocast dtype; the weight may stay
            float32 and no rounded copy of it is kept.
        conv: the convolution.
        norm: the batch norm; its running statistics are updated in place when training.
        skip: [N, C', H', W'], a second source, convolved behind `input` along the channels.
        upsample: how `input` reaches the skip's size: "none", "nearest", "bilinear" or
            "bilinear_align_corners".
        residual: same shape and dtype as the result (autocast converts it), or None.
        residual_norm: the residual's own batch norm, or None.
        relu: apply the ReLU.
        pool: return also max_pool2d(z, 2), from the same sweep.

    Returns:
        z, or with `pool` the pair (z, pooled).

    Raises:
        ValueError: `skip` and `upsample` do not go together, `residual` does not match the result,
            or `residual_norm` comes without it.
        Whatever torch.nn.functional.conv2d and batch_norm raise for bad input.
    """
    check_sources(input, skip, upsample)
    input, skip, residual = _autocast(input, skip, residual)
    plain = eager.required() or not _fuses(input, skip, conv, norm, pool)
    if plain or not fits(residual, residual_norm):
        y = eager.conv2d(input, conv, skip, upsample)
        check_residual(y.shape, y.dtype, residual, residual_norm)
        return eager.bn_act(y, norm, residual, residual_norm, relu, pool)
    check_residual(_result_shape(input, skip, conv), input.dtype, residual, residual_norm)
    sources = (input, skip, *conv, upsample)
    norms = _norm_arguments(norm, residual, residual_norm)
    keep = False  # autograd asks for it
    z, pooled, _, *stats = ops.conv_bn_act.CONV_BN_ACT(
        *sources, *norms, relu, pool, keep, forced_backend()
    )
    _track(z, norm, residual_norm, stats, conv.bias)
    return (z, pooled) if pool else z


def bn_act_conv(
    input: Tensor, norm: Norm, conv: Conv, *, relu: bool = True, recompute: bool = False
) -> Tensor:
    """Batch norm, ReLU and convolution in one differentiable operator: the pre-activation unit.

    y = conv(relu(batch_norm(input))).

    Args:
        input: [N, C, H, W].
        norm: the batch norm; its running statistics are updated in place when training.
        conv: the convolution.
        relu: apply the ReLU.
        recompute: do not keep relu(batch_norm(input)) for backward but compute it again there: one
            activation less, one sweep over memory more.

    Returns:
        y, [N, K, H', W'].
    """
    cast = _autocast_dtype(input)
    target = input.dtype if cast is None else cast
    if eager.required() or not fits(input, norm) or target != input.dtype:
        z = eager.bn_act(input, norm, None, None, relu, False)
        assert isinstance(z, Tensor)
        return F.conv2d(z, *conv)
    if not convolves(input, conv):
        z = bn_act(input, norm, relu=relu)
        assert isinstance(z, Tensor)
        return F.conv2d(z, *conv)
    weight, bias, mean, var, eps, *_ = _norm_arguments(norm, None, None)
    y: Tensor
    y, _, *stats = ops.bn_act_conv.BN_ACT_CONV(
        input, weight, bias, mean, var, eps, relu, *conv, recompute, False, forced_backend()
    )
    _track(input, norm, None, [*stats, None, None], None)
    return y


def conv2d(
    input: Tensor, conv: Conv, *, skip: Tensor | None = None, upsample: str = "none"
) -> Tensor:
    """Convolve one source, or two without keeping their concatenation.

    y = conv(cat([upsample(input), skip], channels)) with a skip, conv(input) without.

    Args:
        input: [N, C, H, W].
        conv: the convolution, over C channels or over C + C'.
        skip: [N, C', H', W'] or None.
        upsample: how `input` reaches the skip's size, as in :func:`conv_bn_act`.

    Returns:
        y, [N, K, H'', W''].

    Raises:
        ValueError: `skip` and `upsample` do not go together.
    """
    check_sources(input, skip, upsample)
    input, skip, _ = _autocast(input, skip, None)
    if eager.required() or not convolves(input, conv, skip):
        return eager.conv2d(input, conv, skip, upsample)
    y: Tensor = ops.conv2d.CONV2D(input, skip, *conv, upsample, forced_backend())
    return y


def conv_bias_act(
    input: Tensor, conv: Conv, *, residual: Tensor | None = None, relu: bool = True
) -> Tensor:
    """Convolution, bias, residual addition and ReLU in one kernel, for inference.

    z = relu(conv(input) + bias + residual).

    Args:
        input: [N, C, H, W].
        conv: the convolution with its bias.
        residual: same shape and dtype as the result (autocast converts it), or None.
        relu: apply the ReLU.

    Raises:
        RuntimeError: a derivative is asked for.
        ValueError: `residual` does not match the result.
    """
    input, _, residual = _autocast(input, None, residual)
    if eager.required() or not convolves(input, conv):
        z = F.conv2d(input, *conv)
        check_residual(z.shape, z.dtype, residual)
        z = z if residual is None else z + residual
        return z.relu() if relu else z
    check_residual(conv_shape(input, conv), input.dtype, residual)
    weight, bias, *geometry = conv
    fused: Tensor = ops.conv_bias_act.CONV_BIAS_ACT(
        input, weight, bias, residual, relu, *geometry, forced_backend()
    )
    return fused


def conv_transpose2d(
    input: Tensor, conv: Conv, *, output_padding: tuple[int, int] = (0, 0)
) -> Tensor:
    """Double the spatial size by a transposed convolution of kernel 2 and stride 2.

    y[n, k, 2 h + r, 2 w + s] = sum over c of input[n, c, h, w] weight[c, k, r, s] + bias[k].

    Args:
        input: [N, C, H, W].
        conv: weight [C, K, 2, 2], bias [K] or None, stride (2, 2).
        output_padding: 0 or 1 row below and column at the right, which hold the bias alone.

    Returns:
        y, [N, K, 2 H + output_padding[0], 2 W + output_padding[1]].

    Raises:
        ValueError: another kernel, stride, padding, dilation or number of groups.
        Whatever torch.nn.functional.conv_transpose2d raises for bad input.

    Source: resunet_fast/ops/conv_transpose2d/reference.py, docs/math.md.
    """
    check_doubling(conv)
    input, _, _ = _autocast(input, None, None)
    if eager.required() or not transposes(input, conv, output_padding):
        return eager.conv_transpose2d(input, conv, output_padding)
    y: Tensor = ops.conv_transpose2d.CONV_TRANSPOSE2D(
        input, conv.weight, conv.bias, output_padding, forced_backend()
    )
    return y


def upsample(input: Tensor, size: tuple[int, int], mode: str = "bilinear") -> Tensor:
    """Resize the spatial axes; the backward is deterministic on every device.

    Args:
        input: [N, C, H, W].
        size: (H', W'), at least (1, 1).
        mode: "nearest", "bilinear" (half-pixel centres) or "bilinear_align_corners".

    Returns:
        [N, C, H', W'], as torch.nn.functional.interpolate gives it.

    Raises:
        ValueError: an unknown mode, or a size below 1.
    """
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {list(MODES)}, got {mode!r}")
    if size[0] < 1 or size[1] < 1:
        raise ValueError(f"size: expected two numbers of at least 1, got {tuple(size)}")
    if eager.required() or input.dim() != 4 or input.dtype not in DTYPES or input.numel() == 0:
        return eager.upsample(input, size, mode)
    result: Tensor = ops.upsample.UPSAMPLE(input, size, mode, forced_backend())
    return result


def update_running_stats(
    norm: Norm, mean: Tensor, var: Tensor, count: int, conv_bias: Tensor | None = None
) -> None:
    """Update a batch norm's running statistics and counter in place, in one operator.

    Args:
        norm: the batch norm with `running_mean`, `running_var` and, for a cumulative average,
            `num_batches_tracked`.
        mean, var: [C], the batch's mean and biased variance.
        count: positions per channel, N * H * W; 0 leaves the running statistics alone.
        conv_bias: [C], added to `mean`: a convolution bias that was left out.

    Raises:
        ValueError: one position, which has no unbiased variance, or a negative momentum.
    """
    if norm.momentum is not None and norm.momentum < 0:
        raise ValueError(f"momentum: expected None or a number from 0 on, got {norm.momentum}")
    if count == 1:
        raise ValueError("count: expected 0 or at least 2 positions per channel, got 1")
    if direct.update_running_stats(norm, mean, var, count, conv_bias):
        return
    running = (norm.running_mean, norm.running_var, norm.num_batches_tracked)
    ops.running_stats.UPDATE_RUNNING_STATS(
        *running, mean, var, conv_bias, count, norm.momentum, forced_backend()
    )


def _autocast_dtype(input: Tensor) -> torch.dtype | None:
    device = input.device.type
    if input.dtype == torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def _autocast(
    input: Tensor, skip: Tensor | None, residual: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Cast the activations as autocast does for a convolution; the weight is cast inside."""
    dtype = _autocast_dtype(input)
    if dtype is None:
        return input, skip, residual
    behind = None if skip is None else skip.to(dtype)
    return input.to(dtype), behind, None if residual is None else residual.to(dtype)


def _fuses(input: Tensor, skip: Tensor | None, conv: Conv, norm: Norm, pool: bool) -> bool:
    """Whether the fused convolution takes the sources, and the fused batch norm its result."""
    if not convolves(input, conv, skip):
        return False
    return normalises(_result_shape(input, skip, conv), input.dtype, norm, pool)


def _result_shape(input: Tensor, skip: Tensor | None, conv: Conv) -> tuple[int, ...]:
    return conv_shape(input if skip is None else skip, conv)


def _norm_arguments(
    norm: Norm, residual: Tensor | None, residual_norm: Norm | None
) -> tuple[Tensor | float | bool | None, ...]:
    mean, var = (None, None) if norm.batch_stats else (norm.running_mean, norm.running_var)
    own = (norm.weight, norm.bias, mean, var, norm.eps)
    if residual_norm is None:
        return (*own, residual, False, None, None, None, None, 0.0)
    other = residual_norm
    frozen = not other.batch_stats
    rmean, rvar = (other.running_mean, other.running_var) if frozen else (None, None)
    return (*own, residual, True, other.weight, other.bias, rmean, rvar, other.eps)


def _track(
    normalised: Tensor,
    norm: Norm,
    residual_norm: Norm | None,
    stats: Sequence[Tensor | None],
    conv_bias: Tensor | None,
) -> None:
    """Update running statistics; `normalised` gives the number of positions."""
    n, _, h, w = normalised.shape
    mean, var, residual_mean, residual_var = stats
    if norm.training and norm.running_mean is not None and mean is not None and var is not None:
        update_running_stats(norm, mean, var, n * h * w, conv_bias)
    other = residual_norm
    if other is None or not other.training or other.running_mean is None:
        return
    if residual_mean is not None and residual_var is not None:
        update_running_stats(other, residual_mean, residual_var, n * h * w)
