"""The questions that every implementation of every operator has to answer, one function for each.

The reference in float64 is the judge. Low-precision results are held to twice the error of the same
formula in eager torch plus the rounding of the result; gradients are compared with the ReLU mask of
the implementation imposed on the reference (see docs/numerics.md). A wrong answer is an
AssertionError, or the error that torch's own checker raises. Where an implementation refuses a
case, the question is whether forcing it is refused too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..registry import OPERATORS, BackendError
from .cases import Case, argument_names, make_inputs
from .compare import assert_close
from .judge import Outputs, judge_gradients
from .tolerances import tolerance

LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INFERENCE_ONLY = frozenset({"conv_bias_act", "update_running_stats", "upsample_concat"})
_OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")
_TRACING = "test_aot_dispatch_dynamic"


def differentiable(case: Case) -> bool:
    """Whether the case's operator has a derivative."""
    return case.operator not in INFERENCE_ONLY


def run(case: Case, inputs: list[Any], backend: str) -> Outputs:
    """Call the case's operator and return its results as a tuple.

    Of one that writes into arguments, copies of these are written and returned.
    """
    operator = OPERATORS[case.operator]
    inputs = [_copied(v) if i in operator.written else v for i, v in enumerate(inputs)]
    result = operator(*inputs, backend)
    if operator.written:
        return tuple(inputs[i] for i in operator.written)
    return result if isinstance(result, tuple) else (result,)


def _copied(value: Tensor | None) -> Tensor | None:
    """A copy with the same strides."""
    return None if value is None else value.clone(memory_format=torch.preserve_format)


def terms(case: Case) -> int:
    """Length of the longest sum behind one output element or gradient."""
    n, c, h, w = case.shape
    return n * h * w * max(c, 9)


def condition(case: Case) -> float:
    """How much the case magnifies rounding: subtracting a mean of m standard deviations costs m."""
    return 1 + abs(float(case.options.get("mean", 0.0)))


def _refused(case: Case, inputs: list[Any], backend: str) -> bool:
    """Whether the implementation refuses the inputs; then forcing it must be refused as well."""
    if not OPERATORS[case.operator].implementations[backend].refusals(*inputs):
        return False
    try:
        run(case, inputs, backend)
    except BackendError as error:
        return "cannot run on" in str(error)  # any other error is raised by the question itself
    raise AssertionError(f"{case.id}: '{backend}' refuses the inputs, and ran when forced")


def check_forward(
    case: Case, backend: str, layout: torch.memory_format, dtype: torch.dtype
) -> float | None:
    """Compare the results with the reference in float64, dtype and strides with the reference's.

    Args:
        case: a line of the table of cases.
        backend: the implementation.
        layout, dtype: of the images and weights.

    Returns:
        The largest error as a share of what is allowed; None where the implementation refuses.

    Raises:
        AssertionError: a result is wrong; the message has the worst element.
    """
    inputs = make_inputs(case, dtype, layout)
    if _refused(case, inputs, backend):
        return None
    doubles = [v.detach().double() if isinstance(v, Tensor) else v for v in inputs]
    expected = run(case, doubles, "reference")
    eager = run(case, inputs, "reference")
    share = 0.0
    for i, (result, judge, peer) in enumerate(
        zip(run(case, inputs, backend), expected, eager, strict=True)
    ):
        assert (result is None) == (judge is None), f"output {i} is there on one side only"
        if result is None or judge is None or peer is None:
            continue
        assert result.dtype == peer.dtype, f"output {i} is {result.dtype}, not {peer.dtype}"
        strides = result.stride(), peer.stride()
        assert strides[0] == strides[1], f"output {i} has strides {strides[0]}, not {strides[1]}"
        own_error = float((peer.double() - judge).abs().max()) if judge.numel() else 0.0
        rms = float(judge.square().mean().sqrt()) if judge.numel() else 1.0
        allowed = condition(case) * tolerance(dtype, terms(case)) + 2 * own_error / max(rms, 1e-30)
        share = max(share, assert_close(f"output {i}", result, judge, allowed))
    return share


def check_backward(
    case: Case, backend: str, layout: torch.memory_format, dtype: torch.dtype
) -> float | None:
    """Compare every gradient with float64 autograd through the reference, the mask imposed.

    Args, returns and errors are those of :func:`check_forward`.
    """
    inputs = make_inputs(case, dtype, layout, requires_grad=True)
    if _refused(case, inputs, backend):
        return None
    outputs = run(case, inputs, backend)
    seeds = seeds_of(outputs)
    if case.operator == "bn_act_conv":
        seeds[1:] = [None] * len(seeds[1:])  # the kept intermediate is no result
    wanted = _leaves(inputs)
    names = [
        name
        for name, value in zip(argument_names(case.operator), inputs, strict=True)
        if isinstance(value, Tensor) and value.requires_grad
    ]
    grads = _gradients(outputs, wanted, seeds)
    expected = judge_gradients(case, inputs, outputs, seeds)
    share = 0.0
    for name, result, judge, value in zip(names, grads, expected, wanted, strict=True):
        assert result is not None, f"{name} has no gradient"
        assert result.dtype == value.dtype, f"gradient of {name} is {result.dtype}"
        allowed = 4 * condition(case) * tolerance(dtype, terms(case))
        share = max(share, assert_close(f"gradient of {name}", result, judge, allowed))
    return share


def check_gradcheck(case: Case, backend: str, layout: torch.memory_format) -> bool:
    """Compare the gradients with finite differences in float64.

    Returns:
        True; False where the implementation refuses, and nothing was compared.

    Raises:
        GradcheckError: of torch, where they differ.
    """
    inputs = make_inputs(case, torch.float64, layout, requires_grad=True)
    if _refused(case, inputs, backend):
        return False
    # fast_mode projects on random directions: every input and output takes part, cheaply.
    return torch.autograd.gradcheck(
        _function(case, inputs, backend), _leaves(inputs), fast_mode=True
    )


def check_second_derivatives(case: Case, backend: str) -> bool:
    """Compare the gradients of the gradients with finite differences in float64.

    Returns and errors are those of :func:`check_gradcheck`.
    """
    inputs = make_inputs(case, torch.float64, requires_grad=True)
    if _refused(case, inputs, backend):
        return False
    names = argument_names(case.operator)
    wanted = _leaves(inputs)
    if case.operator == "conv_bn_act" and inputs[names.index("mean")] is None:
        # Its gradient is the constant zero, which gradgradcheck cannot differentiate.
        wanted = [v for v in wanted if v is not inputs[names.index("conv_bias")]]
    function = _function(case, inputs, backend, outputs=2)
    return torch.autograd.gradgradcheck(function, wanted, fast_mode=True)


def _function(
    case: Case, inputs: list[Any], backend: str, outputs: int | None = None
) -> Callable[..., tuple[Tensor, ...]]:
    """The operator as gradcheck wants it; the leaves are perturbed in place."""

    def function(*_: Tensor) -> tuple[Tensor, ...]:
        results = run(case, inputs, backend)[:outputs]
        return tuple(o for o in results if o is not None and o.requires_grad)

    return function


def check_opcheck(case: Case, backend: str, *, tracing: bool = True) -> bool:
    """Ask torch whether schema, fake, autograd and tracing of the operator agree.

    Args:
        case: a line of the table of cases.
        backend: the implementation.
        tracing: trace it with dynamic shapes as well, which takes a second.

    Returns:
        True; False where the implementation refuses, and nothing was asked.

    Raises:
        OpCheckError: of torch, where they do not.
    """
    inputs = make_inputs(case, torch.float32, requires_grad=differentiable(case))
    if _refused(case, inputs, backend):
        return False
    _opcheck(case.operator, (*inputs, backend), tracing)
    return True


def _opcheck(operator: str, arguments: tuple[Any, ...], tracing: bool) -> None:
    utilities = (*_OPCHECKS, _TRACING) if tracing else _OPCHECKS
    torch.library.opcheck(OPERATORS[operator].overload, arguments, test_utils=utilities)


def check_opcheck_of_backward(case: Case, backend: str, *, tracing: bool = True) -> bool:
    """Ask the same about every operator of ours that the case's backward calls.

    Args and returns are those of :func:`check_opcheck`.

    Raises:
        OpCheckError: of torch, where they do not agree.
        AssertionError: backward called no operator of ours.
    """
    inputs = make_inputs(case, torch.float32, requires_grad=True)
    if _refused(case, inputs, backend):
        return False
    seen: list[tuple[str, tuple[Any, ...]]] = []
    outputs = run(case, inputs, backend)
    with _Recorder(seen):
        _gradients(outputs, _leaves(inputs), seeds_of(outputs))
    assert seen, "no backward operator ran"
    for name, arguments in seen:
        leaves = [
            v.detach().clone().requires_grad_(v.is_floating_point()) if isinstance(v, Tensor) else v
            for v in arguments
        ]
        _opcheck(name, tuple(leaves), tracing)
    return True


class _Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    """Keeps the arguments of every backward operator of ours."""

    def __init__(self, seen: list[tuple[str, tuple[Any, ...]]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func.name().split("::")
        if namespace == "resunet_fast" and "backward" in name:
            self.seen.append((name, args))
        return func(*args, **(kwargs or {}))


def seeds_of(outputs: Outputs) -> list[Tensor | None]:
    """Draw the gradients that backward starts from, one per output that has a derivative."""
    generator = torch.Generator().manual_seed(1)
    return [
        # The same draw on every device.
        torch.randn(o.shape, generator=generator, device="cpu").to(o)
        if o is not None and o.requires_grad and i < 2
        else None
        for i, o in enumerate(outputs)
    ]


def _leaves(inputs: list[Any]) -> list[Tensor]:
    return [v for v in inputs if isinstance(v, Tensor) and v.requires_grad]


def _gradients(outputs: Outputs, wanted: list[Tensor], seeds: list[Tensor | None]) -> Outputs:
    pairs = [(o, s) for o, s in zip(outputs, seeds, strict=True) if o is not None and s is not None]
    return torch.autograd.grad(
        [o for o, _ in pairs], wanted, [s for _, s in pairs], allow_unused=True
    )
