"""Every operator x case x implementation: forward, backward, float64 gradcheck, opcheck, fullgraph.

The reference in float64 is the judge. Low-precision results are held to twice the error of the same
formula in eager torch plus the rounding of the result; gradients are compared with the ReLU mask of
the implementation imposed on the reference (see docs/numerics.md).
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import resunet_fast as rf
from resunet_fast.registry import OPERATORS, backends
from resunet_fast.testing import CASES, Case, assert_close, make_inputs, tolerance
from resunet_fast.testing.cases import argument_names

LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DIFFERENTIABLE = [case for case in CASES if case.operator != "conv_bias_act"]
BACKENDS = [name for name, reasons in backends().items() if not reasons]


def implementations(cases: list[Case]) -> list[Any]:
    """(case, backend) wherever the operator has an implementation of that name that runs here."""
    return [
        pytest.param(case, backend, id=f"{case.id}-{backend}")
        for case, backend in itertools.product(cases, BACKENDS)
        if backend in OPERATORS[case.operator].implementations
    ]


def runnable(case: Case, inputs: list[Any], backend: str) -> bool:
    return not OPERATORS[case.operator].implementations[backend].refusals(*inputs)


def running(cases: list[Case]) -> list[Any]:
    """Those that refuse nothing; `test_forward` checks that the others say so."""
    return [
        parameters
        for parameters in implementations(cases)
        if runnable(parameters.values[0], make_inputs(parameters.values[0]), parameters.values[1])
    ]


def run(case: Case, inputs: list[Any], backend: str) -> tuple[Tensor | None, ...]:
    result = OPERATORS[case.operator](*inputs, backend)
    return result if isinstance(result, tuple) else (result,)


def terms(case: Case) -> int:
    """Length of the longest sum behind one output element or gradient."""
    n, c, h, w = case.shape
    return n * h * w * max(c, 9)


def condition(case: Case) -> float:
    """How much the case magnifies rounding: subtracting a mean of m standard deviations costs m."""
    return 1 + abs(case.options.get("mean", 0.0))


def in_float64(inputs: list[Any]) -> list[Any]:
    return [v.detach().double() if isinstance(v, Tensor) else v for v in inputs]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("case", "backend"), implementations(CASES))
def test_forward(case: Case, backend: str, layout: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype, LAYOUTS[layout])
    if not runnable(case, inputs, backend):
        with pytest.raises(rf.BackendError, match="cannot run on"):
            run(case, inputs, backend)
        return
    expected = run(case, in_float64(inputs), "reference")
    eager = run(case, inputs, "reference")
    for i, (result, judge, peer) in enumerate(
        zip(run(case, inputs, backend), expected, eager, strict=True)
    ):
        assert (result is None) == (judge is None), i
        if result is None or judge is None or peer is None:
            continue
        assert result.dtype == peer.dtype
        assert result.stride() == peer.stride()
        own_error = float((peer.double() - judge).abs().max()) if judge.numel() else 0.0
        rms = float(judge.square().mean().sqrt()) if judge.numel() else 1.0
        allowed = condition(case) * tolerance(dtype, terms(case)) + 2 * own_error / max(rms, 1e-30)
        assert_close(f"output {i}", result, judge, allowed)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("case", "backend"), running(DIFFERENTIABLE))
def test_backward_with_the_mask_imposed(
    case: Case, backend: str, layout: str, dtype: torch.dtype
) -> None:
    inputs = make_inputs(case, dtype, LAYOUTS[layout], requires_grad=True)
    outputs = run(case, inputs, backend)
    seeds = _seeds(outputs)
    if case.operator == "bn_act_conv":
        seeds[1:] = [None] * len(seeds[1:])  # the kept intermediate is no result
    wanted = [v for v in inputs if isinstance(v, Tensor) and v.requires_grad]
    names = [
        name
        for name, v in zip(argument_names(case.operator), inputs, strict=True)
        if isinstance(v, Tensor) and v.requires_grad
    ]
    grads = _gradients(outputs, wanted, seeds)
    mask = outputs[0].detach() > 0 if _has_relu(case, inputs) else None
    expected = _judge(case, inputs, outputs, seeds, mask)
    for name, result, judge, value in zip(names, grads, expected, wanted, strict=True):
        assert result is not None, f"{name} has no gradient"
        assert result.dtype == value.dtype
        assert result.shape == value.shape
        allowed = 4 * condition(case) * tolerance(dtype, terms(case))
        assert_close(f"gradient of {name}", result, judge, allowed)


def _has_relu(case: Case, inputs: list[Any]) -> bool:
    names = argument_names(case.operator)
    return "relu" in names and case.operator != "bn_act_conv" and inputs[names.index("relu")]


def _seeds(outputs: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(o.shape, generator=generator).to(o.dtype)
        if o is not None and o.requires_grad and i < 2
        else None
        for i, o in enumerate(outputs)
    ]


def _gradients(
    outputs: tuple[Tensor | None, ...], wanted: list[Tensor], seeds: list[Tensor | None]
) -> tuple[Tensor | None, ...]:
    pairs = [(o, s) for o, s in zip(outputs, seeds, strict=True) if o is not None and s is not None]
    return torch.autograd.grad(
        [o for o, _ in pairs], wanted, [s for _, s in pairs], allow_unused=True
    )


def _judge(
    case: Case,
    inputs: list[Any],
    outputs: tuple[Tensor | None, ...],
    seeds: list[Tensor | None],
    mask: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Autograd through the reference's forward in float64, with the implementation's own mask.

    The ReLU is switched off in the reference and the mask multiplied in; max-pooling takes the
    window elements that the implementation's rounded output makes largest.
    """
    names = argument_names(case.operator)
    doubles = [
        v.detach().double().requires_grad_(v.requires_grad) if isinstance(v, Tensor) else v
        for v in inputs
    ]
    if mask is not None:
        doubles[names.index("relu")] = False
    pool = "pool" in names and doubles[names.index("pool")]
    if pool:
        doubles[names.index("pool")] = False
    if case.operator == "bn_act_conv":
        return _judge_bn_act_conv(inputs, doubles, seeds)
    operator = OPERATORS[case.operator].implementations["reference"].compute
    result = operator(*doubles)
    v = result[0] if isinstance(result, tuple) else result
    z = v if mask is None else v * mask
    total = (z * seeds[0].double()).sum()
    if pool and outputs[1].numel():
        _, index = torch.nn.functional.max_pool2d(
            outputs[0].detach().float().contiguous(), 2, return_indices=True
        )
        pooled = z.flatten(2).gather(2, index.flatten(2)).view(index.shape)
        total = total + (pooled * seeds[1].double()).sum()
    wanted = [v for v in doubles if isinstance(v, Tensor) and v.requires_grad]
    grads = torch.autograd.grad(total, wanted, allow_unused=True)
    # A convolution bias before batch statistics has no influence: exactly zero is expected.
    return tuple(
        torch.zeros_like(v) if g is None else g for g, v in zip(grads, wanted, strict=True)
    )


def _judge_bn_act_conv(
    inputs: list[Any], doubles: list[Any], seeds: list[Tensor | None]
) -> tuple[Tensor | None, ...]:
    x, weight, bias, mean, var, eps, relu, conv_weight, conv_bias, *geometry, _, _ = doubles
    rounded = OPERATORS["bn_act"](*inputs[:6], None, False, *[None] * 4, 0.0, relu, False, "")[0]
    compute = OPERATORS["bn_act"].implementations["reference"].compute
    v = compute(x, weight, bias, mean, var, eps, None, False, *[None] * 4, 0.0, False, False)[0]
    z = v * (rounded.detach() > 0) if relu else v
    y = torch.nn.functional.conv2d(z, conv_weight, conv_bias, *geometry)
    wanted = [t for t in doubles if isinstance(t, Tensor) and t.requires_grad]
    return torch.autograd.grad((y * seeds[0].double()).sum(), wanted)


@pytest.mark.parametrize(("case", "backend"), running(DIFFERENTIABLE))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck_in_float64(case: Case, backend: str, layout: str) -> None:
    inputs = make_inputs(case, torch.float64, LAYOUTS[layout], requires_grad=True)
    wanted = [v for v in inputs if isinstance(v, Tensor) and v.requires_grad]

    def function(*_: Tensor) -> tuple[Tensor, ...]:
        outputs = run(case, inputs, backend)
        return tuple(o for o in outputs if o is not None and o.requires_grad)

    # fast_mode projects on random directions: every input and output takes part, cheaply.
    assert torch.autograd.gradcheck(function, wanted, fast_mode=True)


@pytest.mark.parametrize(("case", "backend"), running(DIFFERENTIABLE))
def test_second_derivatives_in_float64(case: Case, backend: str) -> None:
    inputs = make_inputs(case, torch.float64, requires_grad=True)
    names = argument_names(case.operator)
    wanted = [v for v in inputs if isinstance(v, Tensor) and v.requires_grad]
    if case.operator == "conv_bn_act" and inputs[names.index("mean")] is None:
        # Its gradient is the constant zero, which gradgradcheck cannot differentiate.
        wanted = [v for v in wanted if v is not inputs[names.index("conv_bias")]]

    def function(*_: Tensor) -> tuple[Tensor, ...]:
        return tuple(o for o in run(case, inputs, backend)[:2] if o is not None and o.requires_grad)

    assert torch.autograd.gradgradcheck(function, wanted, fast_mode=True)


@pytest.mark.parametrize(("case", "backend"), running(CASES))
def test_opcheck(case: Case, backend: str) -> None:
    grad = case.operator != "conv_bias_act"
    inputs = make_inputs(case, torch.float32, requires_grad=grad)
    torch.library.opcheck(OPERATORS[case.operator].overload, (*inputs, backend))


@pytest.mark.parametrize(("case", "backend"), running(DIFFERENTIABLE))
def test_opcheck_of_the_backward_operator(case: Case, backend: str) -> None:
    seen: list[tuple[str, tuple[Any, ...]]] = []
    inputs = make_inputs(case, torch.float32, requires_grad=True)
    outputs = run(case, inputs, backend)
    with _Recorder(seen):
        _gradients(
            outputs,
            [v for v in inputs if isinstance(v, Tensor) and v.requires_grad],
            _seeds(outputs),
        )
    assert seen, "no backward operator ran"
    for name, arguments in seen:
        leaves = [
            v.detach().clone().requires_grad_(v.is_floating_point()) if isinstance(v, Tensor) else v
            for v in arguments
        ]
        torch.library.opcheck(OPERATORS[name].overload, tuple(leaves))


class _Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    """Keeps the arguments of every backward operator of ours."""

    def __init__(self, seen: list[tuple[str, tuple[Any, ...]]]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func.name().split("::")
        if namespace == "resunet_fast" and "backward" in name:
            self.seen.append((name, args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=lambda case: case.id)
def test_fullgraph_without_a_recompile(case: Case) -> None:
    torch._dynamo.reset()
    graphs = []

    def backend(module: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(module)
        return module

    inputs = make_inputs(case, requires_grad=True)
    tensors = [v for v in inputs if isinstance(v, Tensor)]

    def function(*tensors: Tensor) -> Any:
        left = iter(tensors)
        arguments = [next(left) if isinstance(v, Tensor) else v for v in inputs]
        return OPERATORS[case.operator](*arguments, "")

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for _ in range(2):
        result = compiled(*tensors)
    assert len(graphs) == 1
    expected = function(*tensors)
    first = (result[0], expected[0]) if isinstance(result, tuple) else (result, expected)
    assert torch.equal(*first)


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=lambda case: case.id)
def test_every_input_gets_a_gradient(case: Case) -> None:
    inputs = make_inputs(case, requires_grad=True)
    outputs = run(case, inputs, "")
    sum(o.sum() for o in outputs[:2] if o is not None and o.requires_grad).backward()
    for name, value in zip(argument_names(case.operator), inputs, strict=True):
        if isinstance(value, Tensor) and value.requires_grad:
            assert value.grad is not None, name
