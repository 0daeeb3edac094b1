"""How a backend is chosen, forced, refused and explained."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from twins import BACKENDS, batch_norm, fused_bn_act, image

import resunet_fast as rf
from resunet_fast import native, registry
from resunet_fast.functional import Conv
from resunet_fast.ops.backends import triton_refusals
from resunet_fast.registry import OPERATORS, Implementation, forced_backend
from resunet_fast.testing import CASES, make_inputs

needs_native = pytest.mark.skipif(
    bool(native.unavailable()), reason="; ".join(native.unavailable())
)
Add = Callable[..., None]


@pytest.fixture
def add(monkeypatch: pytest.MonkeyPatch) -> Add:
    """Give upsample another implementation and announce its backend, until the test ends."""
    operator = OPERATORS["upsample"]
    monkeypatch.setattr(operator, "implementations", dict(operator.implementations))

    def add(
        name: str, refusals: list[str], unavailable: list[str], declines: Sequence[str] = ()
    ) -> None:
        monkeypatch.setitem(registry._availability, name, lambda: unavailable)
        compute = operator.implementations["reference"].compute
        reasons = (lambda *_: refusals, lambda *_: list(declines))
        operator.add(Implementation(name, lambda *a: compute(*a) + 1, *reasons))

    return add


def test_an_unknown_backend() -> None:
    sentence = f"backend: expected one of {sorted(registry.backends())}, got 'gpu'"
    with pytest.raises(ValueError, match=re.escape(sentence)), rf.use_backend("gpu"):
        pytest.fail("the block must not run")
    assert forced_backend() == ""


def test_an_unavailable_backend(add: Add) -> None:
    add("triton", [], ["it needs a GPU", "triton is not installed"])
    sentence = "backend 'triton' cannot run here: it needs a GPU; triton is not installed"
    with pytest.raises(rf.BackendError, match=sentence), rf.use_backend("triton"):
        pytest.fail("the block must not run")
    assert forced_backend() == ""
    assert registry.backends()["triton"] == ["it needs a GPU", "triton is not installed"]


@pytest.mark.parametrize("name", BACKENDS)
def test_nested_blocks_restore_what_was_before(name: str) -> None:
    with rf.use_backend("reference"):
        with rf.use_backend(name):
            assert forced_backend() == name
            with rf.use_backend("reference"):
                assert forced_backend() == "reference"
            assert forced_backend() == name
        assert forced_backend() == "reference"
    assert forced_backend() == ""


def test_an_exception_restores_what_was_before() -> None:
    with rf.use_backend("reference"):
        with pytest.raises(ValueError, match="residual: expected shape"):  # noqa: SIM117
            with rf.use_backend(BACKENDS[0]):
                fused_bn_act(image(2, 3, 4, 4), batch_norm(3), residual=image(1))
        assert forced_backend() == "reference"
    assert forced_backend() == ""


def test_a_forced_backend_holds_for_every_thread() -> None:
    seen: list[str] = []
    with rf.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(forced_backend()))
        thread.start()
        thread.join()
    assert seen == ["reference"]


def test_the_preferred_implementation_is_chosen(add: Add) -> None:
    x = image(1, 2, 3, 3)
    expected = rf.functional.upsample(x, (6, 6))
    add("triton", [], [])
    torch.testing.assert_close(rf.functional.upsample(x, (6, 6)), expected + 1)
    assert rf.explain("upsample", x, (6, 6)).chosen == "triton"
    with rf.use_backend("reference"):
        torch.testing.assert_close(rf.functional.upsample(x, (6, 6)), expected)


def test_a_refusing_implementation_is_passed_over(add: Add) -> None:
    x = image(1, 2, 3, 3)
    expected = rf.functional.upsample(x, (6, 6))
    add("triton", ["it dislikes 3", "and more"], [])
    assert torch.equal(rf.functional.upsample(x, (6, 6)), expected)
    assert "  triton: it dislikes 3; and more\n" in str(rf.explain("upsample", x, (6, 6)))


def test_a_declining_implementation_runs_only_by_name(add: Add) -> None:
    x = image(1, 2, 3, 3)
    expected = rf.functional.upsample(x, (6, 6))
    add("triton", [], [], ["another is faster here"])
    assert torch.equal(rf.functional.upsample(x, (6, 6)), expected)
    explanation = rf.explain("upsample", x, (6, 6))
    assert "  triton: can run, declines: another is faster here\n" in str(explanation)
    with rf.use_backend("triton"):
        torch.testing.assert_close(rf.functional.upsample(x, (6, 6)), expected + 1)


def test_a_forced_implementation_that_refuses_raises_its_reasons(add: Add) -> None:
    x = image(1, 2, 3, 3)
    add("triton", ["it dislikes 3", "and more"], [])
    sentence = "^upsample cannot run on 'triton': it dislikes 3; and more$"
    with rf.use_backend("triton"):
        with pytest.raises(rf.BackendError, match=sentence):
            rf.functional.upsample(x, (6, 6))
        with pytest.raises(rf.BackendError, match=sentence):
            rf.explain("upsample", x, (6, 6))
        # An operator without an implementation of that name chooses as usual.
        fused_bn_act(image(2, 3, 4, 4), batch_norm(3))


@needs_native
def test_explaining_a_choice() -> None:
    explanation = rf.explain("bn_act", torch.randn(2, 3, 4, 4))
    assert (explanation.operator, explanation.chosen) == ("bn_act", "cpu")
    assert explanation.refusals["cpu"] == explanation.refusals["reference"] == []
    first, *lines = str(explanation).splitlines()
    assert first == "bn_act: cpu"
    assert lines[-2:] == ["  cpu: chosen", "  reference: can run, less preferred"]
    with rf.use_backend("reference"):
        first, *lines = str(rf.explain("bn_act", torch.randn(2, 3, 4, 4))).splitlines()
    assert first == "bn_act: reference"
    assert lines[-2:] == ["  cpu: can run, less preferred", "  reference: chosen"]


@needs_native
def test_explaining_refusals() -> None:
    on_meta = rf.explain("bn_act", torch.empty(2, 3, 4, 4, device="meta"))
    assert on_meta.chosen == "reference"
    assert on_meta.refusals["cpu"] == ["it needs tensors on the CPU, got one on meta"]
    integers = rf.explain("upsample", torch.ones(1, 1, 2, 2, dtype=torch.int32), (4, 4))
    assert integers.refusals["cpu"] == ["it has no torch.int32 kernels"]
    double = rf.explain("conv_bias_act", image(1, 3, 4, 4), image(5, 3, 3, 3))
    assert double.refusals["cpu"] == ["oneDNN's fused convolution has no torch.float64 kernel"]


@needs_native
def test_a_forced_backend_refuses_what_it_has_no_kernel_for() -> None:
    x, conv = image(1, 3, 4, 4), Conv(image(5, 3, 3, 3))
    with rf.use_backend("cpu"), pytest.raises(rf.BackendError, match=r"conv_bias_act cannot .* on"):
        rf.functional.conv_bias_act(x, conv)
    rf.functional.conv_bias_act(x, conv)


def test_explaining_nonsense() -> None:
    with pytest.raises(ValueError, match=r"op_name: expected one of .*'bn_act'.*, got"):
        rf.explain("conv3d")
    with pytest.raises(TypeError, match="bn_act: got 0 arguments for"):
        rf.explain("bn_act")


def test_every_operator_has_a_reference_that_comes_last() -> None:
    for operator in OPERATORS.values():
        names = list(operator.implementations)
        assert names[-1] == "reference"
        assert names == sorted(names, key=registry.PREFERENCE.index)


def test_tensors_on_the_cpu_raise_no_question_about_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked() -> None:
        raise AssertionError("a call on the CPU asked about CUDA")

    monkeypatch.setattr(torch.cuda, "is_available", asked)
    monkeypatch.setattr(native, "cuda_unavailable", asked)
    for case in CASES:
        chosen = rf.explain(case.operator, *make_inputs(case, torch.float32)).chosen
        assert chosen in ("cpu", "reference")


def test_triton_refuses_tensors_on_two_gpus() -> None:
    with FakeTensorMode():
        x, weight = torch.empty(1, 2, 3, 3, device="cuda:0"), torch.empty(2, device="cuda:1")
    assert triton_refusals(x, weight)[-1] == "it needs tensors on one GPU, got cuda:0 and cuda:1"


@pytest.mark.parametrize("name", BACKENDS)
def test_lazily_negated_views(name: str) -> None:
    x = image(2, 3, 4, 4)
    lazy = torch._neg_view(x)
    assert lazy.is_neg()
    with rf.use_backend(name):
        expected = fused_bn_act(-x, batch_norm(3))
        assert torch.equal(fused_bn_act(lazy, batch_norm(3)), expected)


WITHOUT_NATIVE = """
import torch
import resunet_fast as rf
from resunet_fast.functional import Conv, Norm

x = torch.randn(2, 3, 8, 8, requires_grad=True)
norm, conv = Norm(), Conv(torch.randn(3, 3, 3, 3), padding=(1, 1))
z = rf.functional.conv_bn_act(x, conv, norm, residual=x)
z = rf.functional.bn_act_conv(rf.functional.upsample(z, (9, 9)), norm, conv)
z, pooled = rf.functional.bn_act(z, norm, pool=True)
(z.sum() + pooled.sum()).backward()
rf.ResUNet(3, 2, base_width=2, width_factors=(1, 2))(x).sum().backward()
with torch.no_grad():
    rf.functional.conv_bias_act(x, conv)
print(rf.explain("bn_act", x))
try:
    with rf.use_backend("cpu"):
        pass
except rf.BackendError as error:
    print(error)
"""


def test_everything_works_without_the_compiled_library() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_NATIVE],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"RESUNET_FAST_DISABLE_NATIVE": "1"},
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    reason = "the compiled library is switched off by RESUNET_FAST_DISABLE_NATIVE=1"
    first, *others, last, message = done.stdout.splitlines()
    assert (first, last) == ("bn_act: reference", "  reference: chosen")
    assert f"  cpu: {reason}" in others
    assert message == f"backend 'cpu' cannot run here: {reason}"


def test_backends_are_reported_for_this_machine() -> None:
    reported: dict[str, Any] = registry.backends()
    assert reported["reference"] == []
    assert list(reported) == [name for name in registry.PREFERENCE if name in reported]
