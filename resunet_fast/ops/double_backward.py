"""Derivatives of backward operators, by differentiating their plain torch reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keep every argument of a backward operator for :func:`through`."""
    ctx.is_tensor = [isinstance(value, Tensor) for value in inputs]
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
    ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]
    ctx.set_materialize_grads(False)


def _rebuild(ctx: Any) -> list[Any]:
    saved = iter(ctx.saved_tensors)
    inputs = [
        next(saved) if kept else other
        for kept, other in zip(ctx.is_tensor, ctx.others, strict=True)
    ]
    # Views keep the link to the caller's graph, for derivatives of higher order, and give a place
    # to cut it.
    return [v.view_as(v) if isinstance(v, Tensor) and v.requires_grad else v for v in inputs]


def through(reference: Callable[..., Any]) -> Callable[..., Any]:
    """Return an autograd formula that differentiates `reference`, to any order.

    Args:
        reference: the backward operator in differentiable torch operations; it takes the operator's
            arguments without `backend` and returns a tensor, None, or a tuple of these.
    """

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        higher_order = torch.is_grad_enabled()
        with torch.enable_grad():
            inputs = _rebuild(ctx)
            results = reference(*inputs[:-1])
        outputs = results if isinstance(results, tuple) else (results,)
        wanted = [i for i, need in enumerate(ctx.needs_input_grad) if need]
        pairs = [
            (output, grad)
            for output, grad in zip(outputs, grads, strict=True)
            if output is not None and grad is not None and output.requires_grad
        ]
        derivatives: list[Tensor | None] = [None] * len(inputs)
        if pairs:
            found = torch.autograd.grad(
                [output for output, _ in pairs],
                [inputs[i] for i in wanted],
                [grad for _, grad in pairs],
                allow_unused=True,
                create_graph=higher_order,
            )
            for i, derivative in zip(wanted, found, strict=True):
                derivatives[i] = derivative
        return tuple(derivatives)

    return backward
