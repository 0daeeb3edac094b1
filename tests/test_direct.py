"""bn_act by one call of a compiled library: the operator's bits, and nothing that is not plain."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import children
import emulation
import pytest
import torch
from direct_calls import LAYOUTS, Counted, Unit, given_back
from torch import Tensor, nn
from torch.autograd import forward_ad

import resunet_fast as rf
from resunet_fast import native
from resunet_fast.functional import Norm
from resunet_fast.ops.bn_act import direct

pytestmark = pytest.mark.skipif(bool(native.unavailable()), reason="; ".join(native.unavailable()))
MODES = ("training", "cumulative", "untracked", "evaluation", "constant")


@pytest.fixture(params=["cpu", "cuda"])
def calls(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Counted:
    """The CPU library's calls, or those of the CUDA library with its kernels run on the CPU."""
    if request.param == "cuda":
        counted = Counted(emulation.load(tmp_path_factory))
        operators = torch.ops.resunet_fast_emulated
        monkeypatch.setattr(native, "ops", lambda: operators)
    else:
        counted = Counted(native.cpu_calls())
    assert counted.calls is not None
    monkeypatch.setattr(native, "cpu_calls", lambda: counted)
    return counted


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
def test_bits_and_bookkeeping_are_the_operators(
    mode: str, layout: str, dtype: torch.dtype, calls: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = ((2, 5, 3, 7), (1, 16, 4, 4), (2, 24, 40, 32))
    for size, residual, relu in itertools.product(sizes, (False, True), (False, True)):
        before = calls.taken
        ours = Unit.make(mode, dtype, layout, residual, size).results(relu)
        assert calls.taken == before + 2
        with monkeypatch.context() as patched:
            patched.setattr(direct, "bn_act", lambda *_: None)
            theirs = Unit.make(mode, dtype, layout, residual, size).results(relu)
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)
            assert a.stride() == b.stride()


def test_without_gradients_and_in_inference_mode(calls: Counted) -> None:
    results = []
    for context in (torch.no_grad, torch.inference_mode):
        unit = Unit.make("training", torch.float32, "channels_last", True, (2, 5, 3, 7))
        with context():
            z = rf.functional.bn_act(unit.x, Norm.of(unit.bn), residual=unit.residual)
        assert isinstance(z, Tensor)
        assert not z.requires_grad
        results.append([z, *unit.bn.buffers()])
    assert calls.taken == 2
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_gradients_that_nobody_wants_are_not_computed(calls: Counted) -> None:
    unit = Unit.make("training", torch.float32, "contiguous", True, (2, 3, 4, 5))
    x, weight = unit.x.detach(), unit.bn.weight
    z = rf.functional.bn_act(x, Norm.of(unit.bn), residual=unit.residual)
    assert isinstance(z, Tensor)
    (gradient,) = torch.autograd.grad(z, weight, torch.ones_like(z))
    assert calls.taken == 2
    assert gradient.shape == (3,)
    assert x.grad is None


def test_gradients_of_another_layout_are_the_operators_business(calls: Counted) -> None:
    def gradient(seed: Callable[[Tensor], Tensor]) -> Tensor:
        unit = Unit.make("training", torch.float32, "channels_last", True, (2, 3, 4, 5))
        z = rf.functional.bn_act(unit.x, Norm.of(unit.bn), residual=unit.residual)
        z.backward(seed(z))  # type: ignore[union-attr]
        assert unit.x.grad is not None
        return unit.x.grad

    expected = gradient(torch.ones_like)
    assert torch.equal(gradient(lambda z: torch.ones(()).expand_as(z)), expected)
    assert calls.taken == 3


def test_backward_uses_the_forwards_library(calls: Counted) -> None:
    unit = Unit.make("training", torch.float32, "contiguous", True, (2, 3, 4, 5))
    with rf.use_backend("cpu"):
        z = rf.functional.bn_act(unit.x, Norm.of(unit.bn), residual=unit.residual)
    assert isinstance(z, Tensor)
    with rf.use_backend("reference"):
        thread = threading.Thread(target=z.backward, args=(torch.ones_like(z),))
        thread.start()
        thread.join()
    assert calls.taken == 2
    assert unit.x.grad is not None


@pytest.mark.parametrize("mode", ["training", "evaluation"])
def test_second_derivatives(mode: str, calls: Counted) -> None:
    unit = Unit.make(mode, torch.float64, "channels_last", True, (2, 2, 3, 2))
    norm = Norm.of(unit.bn)._replace(num_batches_tracked=None)

    def function(x: Tensor, r: Tensor, weight: Tensor, bias: Tensor) -> Any:
        running = (torch.zeros(2).double(), torch.ones(2).double())
        own = norm._replace(
            weight=weight, bias=bias, running_mean=running[0], running_var=running[1]
        )
        return rf.functional.bn_act(x, own, residual=r)

    leaves = (unit.x, unit.residual, unit.bn.weight, unit.bn.bias)
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)
    assert calls.taken > 0


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("bias", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_running_statistics(
    momentum: float | None,
    bias: torch.dtype | None,
    dtype: torch.dtype,
    calls: Counted,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def updated() -> list[Tensor]:
        torch.manual_seed(0)
        bn = nn.BatchNorm2d(5, momentum=momentum).to(dtype)
        mean, var = torch.randn(5), torch.rand(5)
        offset = None if bias is None else nn.Parameter(torch.randn(5).to(bias))
        with torch.inference_mode():
            rf.functional.update_running_stats(Norm.of(bn), mean, var, 0)
        for count in (6, 0):
            rf.functional.update_running_stats(Norm.of(bn), mean, var, count, offset)
        return [*bn.buffers(), torch.tensor([b._version for b in bn.buffers()])]

    ours = updated()
    assert calls.taken == 3
    monkeypatch.setattr(direct, "update_running_stats", lambda *_: False)
    for a, b in zip(ours, updated(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "changes",
    [
        {"running_mean": None},
        {"running_mean": torch.zeros(8)[::2]},
        {"running_var": torch.ones(3)},
        {"running_var": torch.ones(4).as_subclass(Tensor).to("meta")},
        {"num_batches_tracked": None, "momentum": None},
        {"momentum": "0.1"},
        {"momentum": -0.5},
    ],
    ids=lambda changes: ", ".join(changes),
)
def test_running_statistics_that_are_not_plain(changes: dict[str, Any], calls: Counted) -> None:
    norm = Norm(None, None, torch.zeros(4), torch.ones(4), torch.tensor(0))._replace(**changes)
    assert not direct.update_running_stats(norm, torch.ones(4), torch.ones(4), 6, None)
    assert not direct.update_running_stats(norm, torch.ones(4), torch.ones(4), "6", None)  # type: ignore[arg-type]
    assert calls.taken == 0


class Subclass(Tensor):
    pass


def _declined() -> Iterator[tuple[str, dict[str, Any]]]:
    """What is not plain, as changes of a plain training call's arguments."""
    x = torch.randn(2, 4, 6, 6)
    vector = torch.ones(4)
    yield "subclass", {"input": x.as_subclass(Subclass)}
    yield "subclass of a vector", {"weight": vector.as_subclass(Subclass)}
    yield "meta", {"input": x.to("meta")}
    yield "sparse", {"input": x.to_sparse()}
    yield "integers", {"input": x.long()}
    yield "gaps", {"input": torch.randn(2, 4, 6, 12)[..., ::2]}
    yield "negated", {"input": torch._neg_view(x)}
    yield "negated vector", {"bias": torch._neg_view(vector)}
    yield "three dimensions", {"input": x[0]}
    yield "no dimension", {"input": torch.tensor(1.0)}
    yield "nothing", {"input": x[:0]}
    yield "one position", {"input": x[:1, :, :1, :1]}
    yield "residual of another shape", {"residual": x[:1]}
    yield "residual of another dtype", {"residual": x.bfloat16()}
    yield "residual of another layout", {"residual": x.to(memory_format=torch.channels_last)}
    yield "weight of another length", {"weight": torch.ones(3)}
    yield "weight of another dtype", {"weight": vector.double()}
    yield "weight with gaps", {"weight": torch.ones(8)[::2]}
    yield "weight beside 16-bit vectors", {"weight": vector.bfloat16(), "input": x.bfloat16()}
    yield "one running vector", {"running_mean": None}
    yield "counter without statistics", {"running_mean": None, "running_var": None}
    yield "no counter", {"num_batches_tracked": None, "momentum": None}
    yield "counter of another dtype", {"num_batches_tracked": torch.zeros(())}
    yield "eps of another kind", {"eps": "1e-5"}
    yield "training of another kind", {"training": 1}
    bare = {"weight": None, "bias": None}
    wide = {"running_mean": vector.double(), "running_var": vector.double()}
    yield "running vectors of another dtype", bare | wide
    yield "zeros that are not stored", {"input": torch._efficientzerotensor(x.shape)}
    yield "vector of zeros that are not stored", {"bias": torch._efficientzerotensor((4,))}
    yield "memory that was given back", {"input": given_back(x)}


DECLINED = dict(_declined())


@pytest.mark.parametrize("what", DECLINED)
def test_what_is_not_plain_is_declined_untouched(what: str, calls: Counted) -> None:
    changes = DECLINED[what]
    running = {"running_mean": torch.zeros(4), "running_var": torch.ones(4)}
    norm = Norm(torch.ones(4), torch.zeros(4), **running, num_batches_tracked=torch.tensor(0))
    arguments = {"input": torch.randn(2, 4, 6, 6), "residual": None} | {
        name: value for name, value in changes.items() if name in ("input", "residual")
    }
    norm = norm._replace(**{k: v for k, v in changes.items() if k in Norm._fields})
    assert direct.bn_act(arguments["input"], norm, arguments["residual"], True) is None
    assert calls.taken == 0
    assert torch.equal(running["running_mean"], torch.zeros(4))
    assert torch.equal(running["running_var"], torch.ones(4))


def test_transforms_and_listeners_see_the_operator(calls: Counted) -> None:
    x, norm = torch.randn(2, 3, 4, 4), Norm(torch.ones(3), torch.zeros(3))

    def taken() -> bool:
        return direct.bn_act(x, norm, None, True) is not None

    assert taken()
    with torch.profiler.profile():
        assert not taken()
    with torch._subclasses.FakeTensorMode():
        assert not taken()
    with forward_ad.dual_level():
        assert not taken()
    assert torch.func.vmap(lambda v: v if taken() else v + 1)(x).equal(x + 1)
    with rf.use_backend("reference"):
        assert not taken()
    with rf.use_backend("cpu"):
        assert taken()
    before = calls.taken
    compiled = torch.compile(rf.functional.bn_act, backend="aot_eager", fullgraph=True)
    assert compiled(x, norm).shape == x.shape
    assert calls.taken == before


def test_values_to_be_negated_are_negated() -> None:
    x = torch.randn(2, 3, 4, 4)
    norm = Norm(torch.ones(3), torch.zeros(3))
    assert torch.equal(
        rf.functional.bn_act(torch._neg_view(x), norm), rf.functional.bn_act(-x, norm)
    )


def test_a_torch_without_the_exchange_is_served_by_the_operator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refusing = SimpleNamespace(bind=lambda *_: False)
    loader = SimpleNamespace(exec_module=lambda _: None)
    monkeypatch.setattr(native, "module_from_spec", lambda _: refusing)
    monkeypatch.setattr(
        native, "spec_from_file_location", lambda *_: SimpleNamespace(loader=loader)
    )
    assert native.calls_of(Path("_C.so"), "_C") is None


def test_a_library_without_calls_is_served_by_the_operator(tmp_path: Path) -> None:
    assert native.calls_of(None, "_C") is None
    assert native.calls_of(native._library("_C"), "_another") is None


def test_an_error_of_the_library_is_raised(tmp_path: Path) -> None:
    code = (
        "import torch, resunet_fast as rf; from resunet_fast.functional import Norm;"
        "rf.functional.bn_act(torch.randn(2, 3, 4, 4), Norm())"
    )
    done = children.run_python("-c", code, cwd=tmp_path, RESUNET_FAST_ISA="none")
    assert done.returncode != 0
    assert "RESUNET_FAST_ISA must name an instruction set" in done.stderr
