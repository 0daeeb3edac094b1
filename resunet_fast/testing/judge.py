"""The gradients that an implementation is judged by: float64 autograd, its own ReLU mask imposed.

The ReLU is switched off in the reference and the mask multiplied in; max-pooling takes the window
elements that the implementation's rounded output makes largest. docs/numerics.md says why.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..registry import OPERATORS
from .cases import Case, argument_names

Outputs = tuple[Tensor | None, ...]


def judge_gradients(
    case: Case, inputs: list[Any], outputs: Outputs, seeds: list[Tensor | None]
) -> tuple[Tensor, ...]:
    """Differentiate the reference's forward in float64.

    Args:
        case: a line of the table of cases.
        inputs: the arguments; those that require a gradient get one.
        outputs: what the implementation returned for them.
        seeds: the gradient of each output, or None where backward does not start from it.

    Returns:
        One gradient in float64 per input that requires one, in their order.
    """
    doubles = [
        v.detach().double().requires_grad_(v.requires_grad) if isinstance(v, Tensor) else v
        for v in inputs
    ]
    if case.operator == "bn_act_conv":
        return _through_bn_act_conv(inputs, doubles, seeds)
    names = argument_names(case.operator)
    pool = "pool" in names and doubles[names.index("pool")]
    relu = "relu" in names and doubles[names.index("relu")]
    for name in {"pool", "relu"} & set(names):
        doubles[names.index(name)] = False
    result = OPERATORS[case.operator].implementations["reference"].compute(*doubles)
    v = result[0] if isinstance(result, tuple) else result
    first = outputs[0]
    assert first is not None
    z = v * (first.detach() > 0) if relu else v
    total = _dot(z, seeds[0])
    if pool and outputs[1] is not None and outputs[1].numel():
        total = total + _dot(_pooled_like(first, z), seeds[1])
    wanted = [v for v in doubles if isinstance(v, Tensor) and v.requires_grad]
    grads = torch.autograd.grad(total, wanted, allow_unused=True)
    # A convolution bias before batch statistics has no influence: exactly zero is expected.
    return tuple(
        torch.zeros_like(v) if g is None else g for g, v in zip(grads, wanted, strict=True)
    )


def _dot(value: Tensor, seed: Tensor | None) -> Tensor:
    assert seed is not None
    return (value * seed.double()).sum()


def _pooled_like(rounded: Tensor, z: Tensor) -> Tensor:
    """Max-pool z, taking the elements that are largest in `rounded`."""
    _, index = F.max_pool2d(rounded.detach().float().contiguous(), 2, return_indices=True)
    return z.flatten(2).gather(2, index.flatten(2)).view(index.shape)


def _through_bn_act_conv(
    inputs: list[Any], doubles: list[Any], seeds: list[Tensor | None]
) -> tuple[Tensor, ...]:
    x, weight, bias, mean, var, eps, relu, conv_weight, conv_bias, *geometry, _, _ = doubles
    rounded = OPERATORS["bn_act"](*inputs[:6], None, False, *[None] * 4, 0.0, relu, False, "")[0]
    compute = OPERATORS["bn_act"].implementations["reference"].compute
    v = compute(x, weight, bias, mean, var, eps, None, False, *[None] * 4, 0.0, False, False)[0]
    z = v * (rounded.detach() > 0) if relu else v
    y = F.conv2d(z, conv_weight, conv_bias, *geometry)
    wanted = [t for t in doubles if isinstance(t, Tensor) and t.requires_grad]
    return torch.autograd.grad(_dot(y, seeds[0]), wanted)
