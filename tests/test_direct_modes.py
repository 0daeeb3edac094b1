"""bn_act past the dispatcher gives way to modes and values that only the operator understands."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from direct_calls import Counted, Unit, given_back
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import resunet_fast as rf
from resunet_fast import native
from resunet_fast.functional import Norm

pytestmark = pytest.mark.skipif(bool(native.unavailable()), reason="; ".join(native.unavailable()))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counted:
    counted = Counted(native.cpu_calls())
    monkeypatch.setattr(native, "cpu_calls", lambda: counted)
    return counted


def test_memory_that_was_given_back_is_refused(calls: Counted) -> None:
    x, norm = torch.randn(2, 4, 6, 6), Norm(torch.ones(4), torch.zeros(4))
    for changed in (
        {"input": given_back(x), "norm": norm},
        {"input": x, "norm": norm._replace(weight=given_back(torch.ones(4)))},
    ):
        with pytest.raises(RuntimeError, match="has no memory"):
            rf.functional.bn_act(**changed)


def test_a_flag_that_is_a_number_is_a_flag(calls: Counted) -> None:
    x, results = torch.randn(2, 4, 6, 6), []
    for flag in (1, True):
        norm = Norm(running_mean=torch.zeros(4), running_var=torch.ones(4), training=flag)
        z = rf.functional.bn_act(x, norm, relu=flag)
        results.append((z, norm.running_mean, norm.running_var))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_a_gradient_that_is_not_there_gives_none(calls: Counted) -> None:
    class Stopped(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, z: Tensor) -> Tensor:
            return z.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> None:
            return None

    unit = Unit.make("training", torch.float32, "contiguous", True, (2, 3, 4, 5))
    z = rf.functional.bn_act(unit.x, Norm.of(unit.bn), residual=unit.residual)
    Stopped.apply(z).sum().backward()
    assert calls.taken == 1
    assert all(leaf.grad is None for leaf in (unit.x, unit.residual, *unit.bn.parameters()))


def test_gradients_of_a_dual_gradient_are_dual(calls: Counted) -> None:
    def results(z: Tensor, x: Tensor) -> list[Tensor]:
        torch.manual_seed(1)
        with forward_ad.dual_level():
            seed = forward_ad.make_dual(torch.randn(z.shape), torch.randn(z.shape))
            (gradient,) = torch.autograd.grad(z, x, seed.double())
            return list(forward_ad.unpack_dual(gradient))

    unit = Unit.make("training", torch.float64, "contiguous", False, (2, 3, 4, 5))
    z = rf.functional.bn_act(unit.x, Norm.of(unit.bn))
    assert calls.taken == 1
    eager = nn.functional.batch_norm(
        unit.x, None, None, unit.bn.weight, unit.bn.bias, training=True
    ).relu()
    for a, b in zip(results(z, unit.x), results(eager, unit.x), strict=True):
        torch.testing.assert_close(a, b)


def test_tracing_above_autograd_sees_the_operator(calls: Counted) -> None:
    x, norm = torch.randn(2, 3, 4, 4), Norm(torch.ones(3), torch.zeros(3))
    traced = make_fx(lambda v: rf.functional.bn_act(v, norm), pre_dispatch=True)(x)
    assert torch.equal(traced(x + 1), rf.functional.bn_act(x + 1, norm))


def test_what_is_no_exchange_is_not_understood() -> None:
    assert native.cpu_calls().bind(object(), Tensor, nn.Parameter) is False
