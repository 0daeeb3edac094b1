"""The CUDA kernels, run on the CPU (see emulation.py), through the tests of the CPU library."""

from __future__ import annotations

from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import emulation
import native_calls as call
import pytest
import test_native
import test_native_calls
import test_operators
import torch
from native_calls import Norm, image

from resunet_fast import native
from resunet_fast.testing import CASES, Case

pytestmark = [
    pytest.mark.skipif(bool(native.unavailable()), reason="; ".join(native.unavailable())),
    pytest.mark.usefixtures("kernels"),
]
OPERATORS = (
    "bn_stats",
    "bn_act_forward",
    "bn_act_backward",
    "max_pool_backward",
    "upsample_forward",
    "upsample_backward",
    "update_running_stats",
)
layouts = pytest.mark.parametrize("layout", call.LAYOUTS)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    emulation.load(tmp_path_factory)
    return torch.ops.resunet_fast_emulated


@pytest.fixture
def kernels(
    library: Any, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The private operators become the emulated kernels; what has no kernel stays the CPU's."""
    emulated = {name: getattr(library, name) for name in OPERATORS}
    names = SimpleNamespace(cast=native.ops().cast, **emulated)
    monkeypatch.setattr(native, "ops", lambda: names)
    calls = emulation.load(tmp_path_factory)
    monkeypatch.setattr(native, "cpu_calls", lambda: calls)


def _slow(function: FunctionType) -> FunctionType:
    copy = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__
    )
    copy.pytestmark = [*function.pytestmark, pytest.mark.slow]  # type: ignore[attr-defined]
    return copy


def _shared(module: ModuleType, without: tuple[str, ...]) -> dict[str, FunctionType]:
    return {
        name: _slow(function) if name == "test_backward" else function
        for name, function in vars(module).items()
        if name.startswith("test_") and not any(word in name for word in without)
    }


# What is said of the CPU library's values, semantics and refusals holds for the kernels as well.
# Left out: the conversion of whole tensors, threads and instruction sets, which they do not have.
globals().update(_shared(test_native, ("cast",)))
globals().update(_shared(test_native_calls, ("thread", "instruction")))

FUSED = [case for case in CASES if case.operator in ("bn_act", "upsample", "conv_bn_act")]


@pytest.mark.parametrize("case", FUSED, ids=lambda case: case.id)
@pytest.mark.parametrize("layout", test_operators.LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_operator_templates(case: Case, layout: str, dtype: torch.dtype) -> None:
    test_operators.test_forward(case, "cpu", layout, dtype)
    test_operators.test_backward_with_the_mask_imposed(case, "cpu", layout, dtype)


@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_elementwise_results_are_those_of_the_cpu_bit_for_bit(
    layout: str, dtype: torch.dtype, library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, r = image((2, 24, 9, 16), dtype, layout), image((2, 24, 9, 16), dtype, layout)
    norm, shortcut = Norm.random(x), Norm.random(r)
    kernels = call.forward(x, norm, r, shortcut, pool=True), call.upsample(x, 1, (18, 30), None)
    monkeypatch.undo()
    cpu = call.forward(x, norm, r, shortcut, pool=True), call.upsample(x, 1, (18, 30), None)
    assert native.ops() is not library
    for ours, theirs in zip((*kernels[0], kernels[1]), (*cpu[0], cpu[1]), strict=True):
        assert ours is not None
        assert torch.equal(ours, theirs)


@layouts
@pytest.mark.parametrize("offset", [0, 1])
def test_operands_that_do_not_begin_at_sixteen_bytes(layout: str, offset: int) -> None:
    shape = (2, 16, 6, 8)
    memory = torch.randn(2 * 16 * 6 * 8 + offset, dtype=torch.float32).bfloat16()
    strides = image(shape, torch.bfloat16, layout).stride()
    x = memory.as_strided(shape, strides, offset)
    norm = Norm.random(x)
    assert torch.equal(call.forward(x, norm)[0], call.forward(x.clone(), norm)[0])
    ours, theirs = (call.backward(g, x, norm)["input"] for g in (x, x.clone()))
    assert torch.equal(ours, theirs)
