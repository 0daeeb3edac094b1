"""The backward of the pre-activation unit where it is composed of those of its two parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from resunet_fast.registry import OPERATORS
from resunet_fast.testing import CASES, Case, assert_close, make_inputs, tolerance

UNITS = pytest.mark.parametrize(
    "case", [c for c in CASES if c.operator == "bn_act_conv"], ids=lambda case: case.name
)
CPU = OPERATORS["bn_act_conv_backward"].implementations["cpu"]
needs_cpu = pytest.mark.skipif(
    bool(CPU.refusals(torch.zeros(1))), reason="; ".join(CPU.refusals(torch.zeros(1)))
)


def arguments(case: Case, dtype: torch.dtype) -> list[Any]:
    """Arguments of the backward operator, without `grad_z` and with all gradients wanted."""
    inputs = make_inputs(case, dtype)
    y, z, mean, var = OPERATORS["bn_act_conv"](*inputs, "reference")
    x, weight, bias, given_mean, given_var, eps, relu, conv_weight, conv_bias, *geometry = inputs
    batch_stats = given_mean is None
    stats = [mean, var] if batch_stats else [given_mean, given_var]
    generator = torch.Generator().manual_seed(1)
    grad = torch.empty_like(y).copy_(torch.randn(y.shape, generator=generator))
    if z is None:
        z = OPERATORS["bn_act"](*inputs[:6], None, False, *[None] * 4, 0.0, relu, False, "")[0]
    vectors = [weight, bias, *stats, eps, batch_stats, relu]
    return [grad, None, x, z, *vectors, conv_weight, conv_bias, *geometry[:4], [True] * 5]


def separately(a: list[Any], backend: str) -> tuple[Tensor | None, ...]:
    """The same by the backward operators of the convolution and of the batch norm."""
    grad, grad_z, x, z, weight, bias, mean, var, eps, batch_stats, relu, *conv, _ = a
    conv_weight, conv_bias, *geometry = conv
    dz = grad_z
    conv_grads: tuple[Tensor | None, ...] = (None, None)
    if grad is not None:
        source = (z, None, conv_weight, conv_bias, *geometry, "none", [True, False, True, True])
        dz, _, *conv_grads = OPERATORS["conv2d_backward"](grad, *source, backend)
        dz = dz if grad_z is None else dz + grad_z
    vectors = (weight, bias, mean, var, eps, batch_stats, *[None] * 4, 0.0, False, relu)
    wanted = [True, True, True, False, False, False]
    norm_grads = OPERATORS["bn_act_backward"](dz, None, x, None, *vectors, wanted, backend)
    return (*norm_grads[:3], *conv_grads)


@needs_cpu
@UNITS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_bits_of_the_two_parts(case: Case, dtype: torch.dtype) -> None:
    a = arguments(case, dtype)
    grad, more = a[0], torch.ones_like(a[3])
    for starts in ([grad, None], [None, more], [grad, more]):
        a[:2] = starts
        a[-1] = [True] * 3 + [starts[0] is not None] * 2
        for result, expected in zip(CPU.compute(*a), separately(a, "cpu"), strict=True):
            assert (result is None) == (expected is None)
            assert result is None or torch.equal(result, expected)


@UNITS
@pytest.mark.parametrize(
    "mask", [[True] * 5, [True, False, False, False, False], [False] * 3 + [True] * 2]
)
@pytest.mark.parametrize("backend", ["cudnn", "reference"])
def test_around_atens_convolution(case: Case, mask: list[bool], backend: str) -> None:
    """On the CPU ATen's convolution is oneDNN's; what is around it is what runs on a GPU."""
    a = arguments(case, torch.float64)
    compute = OPERATORS["bn_act_conv_backward"].implementations[backend].compute
    results = compute(*a[:-1], mask)
    for i, (result, expected) in enumerate(zip(results, separately(a, "reference"), strict=True)):
        assert (result is not None) == mask[i]
        if result is not None and expected is not None:
            assert_close(f"gradient {i}", result, expected, tolerance(torch.float64, 1000))
