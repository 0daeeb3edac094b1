"""bn_act past the dispatcher gives way to modes and values that only the operator understands."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from direct_calls import Counted, Unit, given_back
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

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


@pytest.mark.parametrize(
    "observer",
    [torch.profiler.profile, partial(FlopCounterMode, display=False)],
    ids=["profiler", "flops"],
)
@pytest.mark.parametrize("during", ["forward", "backward"])
def test_checkpoints_may_be_observed(
    observer: Callable[[], AbstractContextManager[Any]], during: str, calls: Counted
) -> None:
    """Whether what they recompute takes the same way or another."""

    def gradients(*, checkpointed: bool, observed: bool) -> list[Tensor | None]:
        unit = Unit.make("training", torch.float32, "channels_last", True, (2, 3, 4, 5))
        norm = Norm.of(unit.bn)

        def block(x: Tensor) -> Any:
            return rf.functional.bn_act(x, norm, residual=unit.residual)

        with observer() if observed and during == "forward" else nullcontext():
            z = checkpoint(block, unit.x, use_reentrant=False) if checkpointed else block(unit.x)
        with observer() if observed and during == "backward" else nullcontext():
            z.backward(torch.ones_like(z))
        return [unit.x.grad, *(p.grad for p in unit.bn.parameters())]

    expected = gradients(checkpointed=False, observed=False)
    assert calls.taken == 2
    for found in (gradients(checkpointed=True, observed=o) for o in (False, True)):
        assert all(map(torch.equal, found, expected))  # type: ignore[arg-type]


@pytest.mark.parametrize("residual", [False, True])
def test_a_negative_momentum_is_eagers(residual: bool, calls: Counted) -> None:
    x, own, eager = torch.randn(2, 4, 6, 6), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    for bn in (own, eager):
        bn.momentum = -0.5
    rf.functional.bn_act(x, Norm.of(own), residual=x if residual else None)
    eager(x)
    for a, b in zip(own.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(
        ValueError, match=r"momentum: expected None or a number from 0 on, got -0.5"
    ):
        rf.functional.update_running_stats(Norm.of(own), torch.ones(4), torch.ones(4), 10)
    assert calls.taken == 0


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
