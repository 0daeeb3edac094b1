"""bn_act of plain tensors by one call of a compiled library: on small images the rest is overhead.

The arithmetic and the choice of the library are those of the operator; left out are the residual's
own batch norm and pooling. Whatever is not plain (subclasses, other layouts, transforms, profilers,
hooks of saved tensors, bad arguments) is declined, and the operator takes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, is_inference_mode_enabled
from torch._C import _increment_version
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch.autograd import Function, forward_ad

from ... import native
from ...registry import forced_backend, unobserved
from ..layout import accumulator
from . import op

if TYPE_CHECKING:
    from ...arguments import Norm


def bn_act(input: Tensor, norm: Norm, residual: Tensor | None, relu: bool) -> Tensor | None:
    """Compute relu(batch_norm(input) + residual), or return None: not plain.

    Args:
        input: [N, C, H, W].
        norm: the batch norm; its running statistics are updated in place when training.
        residual: same shape, dtype and layout as `input`, or None.
        relu: apply the ReLU.
    """
    if not _plain_autograd() or input.dim() != 4:
        return None
    calls = _calls(input)
    if calls is None:
        return None
    weight, bias = norm.weight, norm.bias
    if torch.is_grad_enabled() and (
        input.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        # Checkpoints count what is saved, and what they recompute may have to take the operator.
        if _top_saved_tensors_default_hooks(False) is not None:
            return None
        return _differentiated(input, weight, bias, residual, norm, relu, calls)
    return _forward(calls, input, residual, norm, relu)[0]


def update_running_stats(
    norm: Norm, mean: Tensor, var: Tensor, count: int, conv_bias: Tensor | None
) -> bool:
    """Update a batch norm's running statistics, or return False: not plain.

    Args:
        norm: with `running_mean`, `running_var` and, for a cumulative average, the counter.
        mean, var: [C], the batch's.
        count: positions per channel.
        conv_bias: [C], added to `mean`, or None.
    """
    if not _plain_autograd():
        return False
    calls = _calls(mean)
    if calls is None:
        return False
    running = (norm.running_mean, norm.running_var, norm.num_batches_tracked)
    if not calls.update_running_stats(*running, mean, var, conv_bias, count, norm.momentum):
        return False
    _written(*running)
    return True


def _plain_autograd() -> bool:
    """Whether nothing listens but reverse-mode autograd."""
    return unobserved() and forward_ad._current_level < 0


def _written(mean: Any, var: Any, counter: Any) -> None:
    """Autograd learns that a tensor has changed from its version, and of nothing else."""
    if not is_inference_mode_enabled():
        _increment_version([mean, var] if counter is None else [mean, var, counter])


def _calls(input: Tensor) -> Any:
    """The library that the registry chooses for the input's device."""
    forced = forced_backend()
    if input.is_cpu:
        return native.cpu_calls() if forced in ("", "cpu") else None
    if not input.is_cuda or forced not in ("", "cuda"):
        return None
    return None if native.device_refusals(input.device) else native.cuda_calls()


def _forward(
    calls: Any, input: Tensor, residual: Tensor | None, norm: Norm, relu: bool
) -> tuple[Tensor | None, Tensor | None]:
    """z, or None: declined; and the batch's statistics, [2, C], unless they are given."""
    weight, bias, mean, var, counter, training, momentum, eps = norm
    batch = None
    if training or (mean is None and var is None):
        channels, dtype = input.size(1), input.dtype
        if dtype == torch.float32:  # to name it takes half as long again
            batch = input.new_empty(2, channels)
        else:
            batch = input.new_empty(2, channels, dtype=accumulator(dtype))
    z = torch.empty_like(input)
    running = (mean, var, counter, training, momentum)
    if not calls.bn_act(input, weight, bias, *running, eps, residual, relu, z, batch):
        return None, None
    if training and mean is not None:
        _written(mean, var, counter)
    return z, batch


class _BnAct(Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        norm: Norm,
        relu: bool,
        calls: Any,
    ) -> Tensor | None:
        z, batch = _forward(calls, input, residual, norm, relu)
        output = z if relu and residual is not None else None
        if batch is None:
            mean, var = norm.running_mean, norm.running_var
        else:
            mean = var = None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, output, weight, bias, batch, mean, var)
        ctx.call = calls, norm.eps, relu
        return z

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        saved = ctx.saved_tensors
        grads = None
        if not torch.is_grad_enabled() and _plain_autograd():
            grads = _backward(ctx, grad, saved)
        if grads is None:
            grads = _by_operators(ctx, grad, saved)
        return (*grads, None, None, None)


# Not `apply`, which first looks for what torch.func may have left behind.
_differentiated: Callable[..., Tensor | None] = super(Function, _BnAct).apply


def _backward(
    ctx: Any, grad: Tensor, saved: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...] | None:
    x, output, weight, bias, *statistics = saved
    calls, eps, relu = ctx.call
    need = ctx.needs_input_grad
    grads = [
        torch.empty_like(like) if needed and like is not None else None
        for needed, like in zip(need, (x, weight, bias, x), strict=False)
    ]
    tensors = (grad, x, output, *statistics, weight, bias)
    return tuple(grads) if calls.bn_act_backward(*tensors, eps, relu, *grads) else None


def _by_operators(
    ctx: Any, grad: Tensor, saved: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    x, output, weight, bias, batch, *statistics = saved
    if batch is not None:
        statistics = list(batch.unbind())
    assert x is not None
    _, eps, relu = ctx.call
    ctx.backend = "cpu" if x.is_cpu else "cuda"
    ctx.norm = (eps, batch is not None, 0.0, False, relu)
    none = (None,) * 4
    wanted = [*ctx.needs_input_grad[:4], False, False]
    return op.gradients(ctx, (x, output, weight, bias, *statistics, *none), grad, None, wanted)[:4]
