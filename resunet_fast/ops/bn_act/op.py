"""bn_act: z = relu(batch_norm(x) [+ r | + batch_norm'(r)]) and optionally max_pool2d(z, 2).

Saved for backward: x, the statistics, the affine vectors; z only with a residual or pooling (the
mask is recomputed from x elsewhere); r only with its own batch norm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...registry import Implementation, Operator
from ..backends import (
    cpu_refusals,
    cuda_refusals,
    deferred,
    triton_declines,
    triton_refusals,
)
from ..double_backward import save_inputs, through
from ..layout import accumulator, empty, layout_of
from . import compiled, reference

GRADIENTS = 6  # input, weight, bias, residual, residual_weight, residual_bias


class BnActArguments(NamedTuple):
    """The operator's arguments without `backend`; no `mean` and `var`: batch statistics."""

    input: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    mean: Tensor | None = None
    var: Tensor | None = None
    eps: float = 1e-5
    residual: Tensor | None = None
    residual_norm: bool = False
    residual_weight: Tensor | None = None
    residual_bias: Tensor | None = None
    residual_mean: Tensor | None = None
    residual_var: Tensor | None = None
    residual_eps: float = 1e-5
    relu: bool = True
    pool: bool = False


SCHEMA_TAIL = (
    "Tensor? weight=None, Tensor? bias=None, Tensor? mean=None, Tensor? var=None, float eps=1e-05,"
    " Tensor? residual=None, bool residual_norm=False, Tensor? residual_weight=None,"
    " Tensor? residual_bias=None, Tensor? residual_mean=None, Tensor? residual_var=None,"
    " float residual_eps=1e-05, bool relu=True, bool pool=False"
)


def fake(*arguments: Any) -> tuple[Tensor | None, ...]:
    """Shapes of (output, pooled, mean, var, residual_mean, residual_var)."""
    a = BnActArguments(*arguments)
    layout = layout_of(a.input)
    n, c, h, w = a.input.shape
    output = empty(a.input, a.input.shape, layout)
    pooled = empty(a.input, (n, c, h // 2, w // 2), layout) if a.pool else None
    return output, pooled, *_fake_statistics(a)


def _fake_statistics(a: BnActArguments) -> list[Tensor | None]:
    def vector() -> Tensor:
        return a.input.new_empty(a.input.shape[1], dtype=accumulator(a.input.dtype))

    own = a.mean is None
    residual_own = a.residual_norm and a.residual_mean is None
    return [vector() if wanted else None for wanted in (own, own, residual_own, residual_own)]


def save(ctx: Any, a: BnActArguments, x: Tensor, outputs: tuple[Tensor | None, ...]) -> None:
    """Keep what :func:`gradients` needs in `ctx.norm_tensors` (to be saved) and `ctx.norm`.

    Args:
        ctx: the autograd context.
        a: the arguments of the normalisation; `a.input` is ignored.
        x: the tensor that was normalised.
        outputs: (output, pooled, mean, var, residual_mean, residual_var) as returned.
    """
    output, _, mean, var, residual_mean, residual_var = outputs
    needs_output = a.pool or (a.relu and a.residual is not None)
    ctx.norm_tensors = (
        x,
        output if needs_output else None,
        a.weight,
        a.bias,
        mean if a.mean is None else a.mean,
        var if a.var is None else a.var,
        a.residual if a.residual_norm else None,
        a.residual_weight,
        residual_mean if a.residual_mean is None else a.residual_mean,
        residual_var if a.residual_var is None else a.residual_var,
    )
    ctx.norm = (
        a.eps,
        a.mean is None,
        a.residual_eps,
        a.residual_norm and a.residual_mean is None,
        a.relu,
    )
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*(t for t in outputs[2:] if t is not None))


SAVED = 10  # tensors that `save` names


def gradients(
    ctx: Any,
    saved: tuple[Tensor | None, ...],
    grad_output: Tensor | None,
    grad_pooled: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor | None, ...]:
    """Call the backward operator on what :func:`save` kept; gradients in the order of GRADIENTS."""
    if grad_output is None and grad_pooled is None:
        return (None,) * GRADIENTS
    x, output, weight, bias, mean, var, residual, residual_weight, *residual_stats = saved
    eps, batch_stats, residual_eps, residual_batch_stats, relu = ctx.norm
    grads: tuple[Tensor | None, ...] = BN_ACT_BACKWARD(
        grad_output,
        grad_pooled,
        x,
        output,
        weight,
        bias,
        mean,
        var,
        eps,
        batch_stats,
        residual,
        residual_weight,
        *residual_stats,
        residual_eps,
        residual_batch_stats,
        relu,
        wanted,
        ctx.backend,
    )
    return grads


def needed(ctx: Any, first: int) -> list[bool]:
    """Which of the six gradients autograd asks for; `first` is the input's or weight's position.

    Args:
        ctx: the autograd context.
        first: position of `weight` in the operator's arguments; the normalised tensor's own entry
            is left True.
    """
    need = ctx.needs_input_grad
    return [True, *need[first : first + 2], need[first + 5], *need[first + 7 : first + 9]]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
    *arguments, ctx.backend = inputs
    a = BnActArguments(*arguments)
    save(ctx, a, a.input, output)
    ctx.save_for_backward(*ctx.norm_tensors)
    del ctx.norm_tensors


def _backward(
    ctx: Any, grad_output: Tensor | None, grad_pooled: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    wanted = [ctx.needs_input_grad[0], *needed(ctx, 1)[1:]]
    grads = gradients(ctx, ctx.saved_tensors, grad_output, grad_pooled, wanted)
    return spread(grads)


def spread(grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Put the six gradients at the places of the operator's sixteen arguments."""
    dx, dweight, dbias, dr, drweight, drbias = grads
    tail = (drweight, drbias, None, None, None, None, None, None)
    return (dx, dweight, dbias, None, None, None, dr, None, *tail)


def fake_backward(*arguments: Any) -> tuple[Tensor | None, ...]:
    """Shapes of the gradients that the mask asks for."""
    x, weight, residual_weight, mask = arguments[2], arguments[4], arguments[11], arguments[-1]

    def vector(like: Tensor | None) -> Tensor:
        dtype = accumulator(x.dtype) if like is None else like.dtype
        return torch.empty(x.shape[1], dtype=dtype, device=x.device)

    def image() -> Tensor:
        return empty(x, x.shape, layout_of(x))

    makers: tuple[Callable[[], Tensor], ...] = (
        image,
        lambda: vector(weight),
        lambda: vector(weight),
        image,
        lambda: vector(residual_weight),
        lambda: vector(residual_weight),
    )
    return tuple(make() if wanted else None for make, wanted in zip(makers, mask, strict=True))


BN_ACT_BACKWARD = Operator(
    "bn_act_backward",
    "(Tensor? grad_output, Tensor? grad_pooled, Tensor input, Tensor? output, Tensor? weight,"
    " Tensor? bias, Tensor mean, Tensor var, float eps, bool batch_stats, Tensor? residual,"
    " Tensor? residual_weight, Tensor? residual_mean, Tensor? residual_var, float residual_eps,"
    " bool residual_batch_stats, bool relu, bool[6] output_mask, str backend='')"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=fake_backward,
    setup_context=save_inputs,
    backward=through(reference.backward),
)
BN_ACT = Operator(
    "bn_act",
    f"(Tensor input, {SCHEMA_TAIL}, str backend='')"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=fake,
    setup_context=_setup_context,
    backward=_backward,
)
_TRITON = "resunet_fast.ops.bn_act.triton_kernel"
BN_ACT.add(
    Implementation("cuda", compiled.forward, cuda_refusals),
    Implementation("triton", deferred(_TRITON, "forward"), triton_refusals, triton_declines),
    Implementation("cpu", compiled.forward, cpu_refusals),
    Implementation("reference", reference.forward),
)
BN_ACT_BACKWARD.add(
    Implementation("cuda", compiled.backward, cuda_refusals),
    Implementation("triton", deferred(_TRITON, "backward"), triton_refusals, triton_declines),
    Implementation("cpu", compiled.backward, cpu_refusals),
    Implementation("reference", reference.backward),
)
