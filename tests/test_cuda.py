"""The CUDA kernels on a GPU: operator templates, misaligned operands, streams, graph capture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from resunet_fast import registry
from resunet_fast.registry import OPERATORS
from resunet_fast.testing import CASES, Case, assert_close, make_inputs, tolerance

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no NVIDIA GPU"),
]
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Those that a CUDA tensor may reach; the test says where one does not run on this machine.
BACKENDS = [name for name in registry.PREFERENCE if name not in ("cpu", "reference")]
PAIRS = [
    pytest.param(case, backend, id=f"{case.id}-{backend}")
    for case in CASES
    for backend in BACKENDS
    if backend in OPERATORS[case.operator].implementations
]
DIFFERENTIABLE = [
    pair for pair in PAIRS if OPERATORS[pair.values[0].operator].name != "conv_bias_act"
]

layouts = pytest.mark.parametrize("layout", LAYOUTS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


def on_gpu(values: list[Any]) -> list[Any]:
    return [
        v.detach().cuda().requires_grad_(v.requires_grad) if isinstance(v, Tensor) else v
        for v in values
    ]


def in_float64(values: list[Any]) -> list[Any]:
    return [
        v.detach().double().requires_grad_(v.requires_grad) if isinstance(v, Tensor) else v
        for v in values
    ]


def run(case: Case, values: list[Any], backend: str) -> list[Tensor | None]:
    result = OPERATORS[case.operator](*values, backend)
    return list(result) if isinstance(result, tuple) else [result]


def skip_refused(case: Case, values: list[Any], backend: str) -> None:
    refusals = OPERATORS[case.operator].implementations[backend].refusals(*values)
    if refusals:
        pytest.skip("; ".join(refusals))


def terms(case: Case) -> int:
    n, c, h, w = case.shape
    return n * h * w * max(c, 9)


def check(case: Case, name: str, found: Tensor, judge: Tensor, peer: Tensor) -> None:
    """Within the rounding of the dtype, or twice what the reference on the GPU is off by."""
    rms = float(judge.double().square().mean().sqrt()) if judge.numel() else 1.0
    own = float((peer.double().cpu() - judge).abs().max()) if judge.numel() else 0.0
    mean = 1 + abs(case.options.get("mean", 0.0))
    allowed = 4 * mean * tolerance(found.dtype, terms(case)) + 2 * own / max(rms, 1e-30)
    assert_close(name, found.cpu(), judge, allowed)


@dtypes
@layouts
@pytest.mark.parametrize(("case", "backend"), PAIRS)
def test_forward(case: Case, backend: str, layout: str, dtype: torch.dtype) -> None:
    values = make_inputs(case, dtype, LAYOUTS[layout])
    skip_refused(case, on_gpu(values), backend)
    judges = run(case, in_float64(values), "reference")
    peers = run(case, on_gpu(values), "reference")
    for i, (found, judge, peer) in enumerate(
        zip(run(case, on_gpu(values), backend), judges, peers, strict=True)
    ):
        assert (found is None) == (judge is None)
        if found is not None and judge is not None and peer is not None:
            assert (found.dtype, found.stride()) == (peer.dtype, peer.stride())
            check(case, f"output {i}", found, judge, peer)


@layouts
@pytest.mark.parametrize(("case", "backend"), DIFFERENTIABLE)
def test_gradcheck_in_float64(case: Case, backend: str, layout: str) -> None:
    values = on_gpu(make_inputs(case, torch.float64, LAYOUTS[layout], requires_grad=True))
    skip_refused(case, values, backend)
    wanted = [v for v in values if isinstance(v, Tensor) and v.requires_grad]

    def function(*_: Tensor) -> tuple[Tensor, ...]:
        return tuple(o for o in run(case, values, backend) if o is not None and o.requires_grad)

    assert torch.autograd.gradcheck(function, wanted, fast_mode=True)


BN_ACT = [pair for pair in PAIRS if pair.values[0].operator == "bn_act"]


def _twice(function: Callable[[], list[Tensor | None]]) -> list[list[Tensor]]:
    return [[t.clone() for t in function() if t is not None] for _ in range(2)]


@layouts
@pytest.mark.parametrize(("case", "backend"), BN_ACT)
def test_results_are_deterministic_on_any_stream(case: Case, backend: str, layout: str) -> None:
    values = on_gpu(make_inputs(case, torch.bfloat16, LAYOUTS[layout]))
    skip_refused(case, values, backend)
    first, second = _twice(lambda: run(case, values, backend))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Behind a long kernel: whatever ran on another stream would come too early.
        torch.cuda._sleep(10_000_000)
        late = [v + 0 if isinstance(v, Tensor) and v.is_floating_point() else v for v in values]
        third = [t for t in run(case, late, backend) if t is not None]
    stream.synchronize()
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@layouts
@pytest.mark.parametrize("offset", [1, 3, 8])
@pytest.mark.parametrize(("case", "backend"), BN_ACT)
def test_misaligned_operands(case: Case, backend: str, layout: str, offset: int) -> None:
    values = on_gpu(make_inputs(case, torch.bfloat16, LAYOUTS[layout]))
    skip_refused(case, values, backend)

    def moved(v: Any) -> Any:
        if not isinstance(v, Tensor) or v.dim() != 4:
            return v
        memory = v.new_empty(v.numel() + offset)
        return memory.as_strided(v.shape, v.stride(), offset).copy_(v)

    expected = run(case, values, backend)
    for a, b in zip(expected, run(case, [moved(v) for v in values], backend), strict=True):
        if a is not None and b is not None:
            assert_close("output", a.cpu(), b.double().cpu(), tolerance(a.dtype, terms(case)))


@layouts
@pytest.mark.parametrize(("case", "backend"), BN_ACT)
def test_graph_capture(case: Case, backend: str, layout: str) -> None:
    """Forward and backward are captured once and replayed on other contents."""
    values = on_gpu(make_inputs(case, torch.float32, LAYOUTS[layout], requires_grad=True))
    skip_refused(case, values, backend)
    wanted = [v for v in values if isinstance(v, Tensor) and v.requires_grad]

    def step() -> list[Tensor]:
        outputs = [o for o in run(case, values, backend) if o is not None and o.requires_grad]
        grads = torch.autograd.grad(outputs, wanted, [torch.ones_like(o) for o in outputs])
        return [*(o.detach() for o in outputs), *grads]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for v in wanted:
            v.mul_(0.5)
    graph.replay()
    for found, expected in zip(captured, step(), strict=True):
        assert torch.equal(found, expected)


def test_running_statistics_follow_the_counter() -> None:
    update = OPERATORS["update_running_stats"]
    refusals = update.implementations["cuda"].refusals(torch.ones(1, device="cuda"))
    if refusals:
        pytest.skip("; ".join(refusals))
    mean, var = torch.randn(2, 300, dtype=torch.float64).abs()
    for backend, device in (("cuda", "cuda"), ("reference", "cpu")):
        running = [torch.zeros(300, device=device), torch.ones(300, device=device)]
        counter = torch.tensor(3, device=device)
        own = (mean.float().to(device), var.float().to(device))
        update(*running, counter, *own, None, 10, None, backend)
        assert counter.item() == 4
        if backend == "cuda":
            kept = [t.cpu() for t in running]
        else:
            torch.testing.assert_close(kept, running)


def test_more_than_two_to_the_31_elements() -> None:
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("it needs 24 GiB of free GPU memory")
    x = torch.ones(1, 8, 2**14 + 1, 2**14 + 1, dtype=torch.bfloat16, device="cuda")
    x = x.contiguous(memory_format=torch.channels_last)
    x[:, :, -1] = 3
    norm = (None, None, torch.zeros(8, device="cuda"), torch.ones(8, device="cuda"), 0.0)
    z = OPERATORS["bn_act"](x, *norm, None, False, *[None] * 4, 0.0, True, False, "cuda")[0]
    assert torch.equal(z[:, :, -2:], x[:, :, -2:])
