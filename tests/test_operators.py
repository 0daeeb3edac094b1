"""Every operator x case x implementation: forward, backward, float64 gradcheck, opcheck, fullgraph.

The questions themselves are in resunet_fast/testing/checks.py, where `python -m resunet_fast
verify` asks them too.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from resunet_fast.registry import OPERATORS, backends
from resunet_fast.testing import CASES, MUTATING_CASES, Case, checks, make_inputs
from resunet_fast.testing.cases import argument_names
from resunet_fast.testing.checks import DTYPES, LAYOUTS, differentiable, run

DIFFERENTIABLE = [case for case in CASES if differentiable(case)]
BACKENDS = [name for name, reasons in backends().items() if not reasons]


def implementations(cases: list[Case]) -> list[Any]:
    """(case, backend) wherever the operator has an implementation of that name that runs here."""
    return [
        pytest.param(case, backend, id=f"{case.id}-{backend}")
        for case, backend in itertools.product(cases, BACKENDS)
        if backend in OPERATORS[case.operator].implementations
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("case", "backend"), implementations([*CASES, *MUTATING_CASES]))
def test_forward(case: Case, backend: str, layout: str, dtype: torch.dtype) -> None:
    checks.check_forward(case, backend, LAYOUTS[layout], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("case", "backend"), implementations(DIFFERENTIABLE))
def test_backward_with_the_mask_imposed(
    case: Case, backend: str, layout: str, dtype: torch.dtype
) -> None:
    checks.check_backward(case, backend, LAYOUTS[layout], dtype)


@pytest.mark.parametrize(("case", "backend"), implementations(DIFFERENTIABLE))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck_in_float64(case: Case, backend: str, layout: str) -> None:
    checks.check_gradcheck(case, backend, LAYOUTS[layout])


@pytest.mark.parametrize(("case", "backend"), implementations(DIFFERENTIABLE))
def test_second_derivatives_in_float64(case: Case, backend: str) -> None:
    checks.check_second_derivatives(case, backend)


@pytest.mark.parametrize(("case", "backend"), implementations([*CASES, *MUTATING_CASES]))
def test_opcheck(case: Case, backend: str) -> None:
    checks.check_opcheck(case, backend)


@pytest.mark.parametrize(("case", "backend"), implementations(DIFFERENTIABLE))
def test_opcheck_of_the_backward_operator(case: Case, backend: str) -> None:
    checks.check_opcheck_of_backward(case, backend)


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
