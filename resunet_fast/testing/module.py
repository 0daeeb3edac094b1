"""`rf.testing.check_module`: is a module's forward, backward and bookkeeping what it should be?

Asked in float64, where rounding hides nothing and a ReLU near zero flips for no one: results,
gradients and buffers against a reference, gradients against finite differences. In a lower
precision only results are compared, because there two correct computations differ in the signs of a
ReLU's input, and each difference moves a gradient by its full size (docs/numerics.md).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from .compare import assert_close, one_line
from .tolerances import tolerance

# Sums in another order, over at most some million terms, in float64.
_FLOAT64 = 1e-9


@dataclass(frozen=True)
class Finding:
    """The answer to one question.

    Args:
        question: what was asked.
        problem: one sentence if the answer is wrong, else None.
    """

    question: str
    problem: str | None

    def __str__(self) -> str:
        return f"{'WRONG' if self.problem else 'ok':5}  {self.question}" + (
            f": {self.problem}" if self.problem else ""
        )


@dataclass(frozen=True)
class ModuleReport:
    """Everything that was asked of a module; readable when printed."""

    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether every answer is right."""
        return not any(finding.problem for finding in self.findings)

    def __str__(self) -> str:
        return "\n".join(map(str, self.findings))


@dataclass(frozen=True)
class _Step:
    """What one forward and backward pass leaves behind."""

    output: Tensor
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


def check_module(
    module: nn.Module, input: Tensor, reference: nn.Module | None = None
) -> ModuleReport:
    """Check a block against its own reference, or against finite differences alone.

    Asked in training and in evaluation mode: in float64 the same output, gradients of the input and
    of every parameter, and buffers as the reference; output in the input's dtype within twice the
    reference's own error; gradients equal to finite differences (gradcheck, on random directions);
    the same bits when called again. Neither module is changed.

    Args:
        module: takes one tensor and returns one; every parameter takes part.
        input: floating point. A few hundred elements suffice, and keep gradcheck fast.
        reference: with the same state-dict keys, from which it gets the module's values; None
            leaves out the comparisons with it.

    Returns:
        The report; `report.ok` says whether all is right.

    Raises:
        ValueError: `input` is not floating point, or the reference has other keys or shapes.
    """
    if not input.is_floating_point():
        raise ValueError(f"input: expected a floating point tensor, got {input.dtype}")
    twin = None if reference is None else _with_state(reference, module)
    findings = []
    for mode in ("training", "evaluation"):
        ready = partial(_ready, mode)
        if twin is not None:
            findings += _against(ready, module, twin, input, mode)
        findings += [
            _ask(f"{mode}: gradients equal finite differences", _gradcheck, ready, module, input),
            _ask(f"{mode}: the same bits when called again", _repeats, ready, module, input),
        ]
    return ModuleReport(tuple(findings))


_Ready = Callable[[nn.Module, torch.dtype], nn.Module]


def _ready(mode: str, source: nn.Module, dtype: torch.dtype) -> nn.Module:
    return copy.deepcopy(source).to(dtype).train(mode == "training")


def _with_state(reference: nn.Module, module: nn.Module) -> nn.Module:
    # Loading copies values into the reference's own dtype: it must not round them.
    twin = copy.deepcopy(reference).double()
    try:
        twin.load_state_dict(module.state_dict())
    except RuntimeError as error:
        lines = " ".join(line.strip() for line in str(error).splitlines())
        raise ValueError(f"reference: expected the module's state dict, got {lines}") from error
    return twin


def _ask(question: str, check: Callable[..., None], *arguments: object) -> Finding:
    try:
        check(*arguments)
    except Exception as error:  # whatever a broken module raises is an answer: `ok` is then False
        return Finding(question, one_line(error))
    return Finding(question, None)


def _against(
    ready: _Ready, module: nn.Module, twin: nn.Module, input: Tensor, mode: str
) -> list[Finding]:
    findings = [
        _ask(f"{mode}: {part} in float64", _same, part, ready, module, twin, input)
        for part in ("output", "gradients", "buffers")
    ]
    if input.dtype != torch.float64:
        question = f"{mode}: output in {str(input.dtype).removeprefix('torch.')}"
        findings.append(_ask(question, _output_in_dtype, ready, module, twin, input))
    return findings


def _step(module: nn.Module, input: Tensor) -> _Step:
    leaf = input.detach().clone().requires_grad_()
    output: Tensor = module(leaf)
    generator = torch.Generator().manual_seed(1)
    seed = torch.randn(output.shape, generator=generator, dtype=torch.float64, device="cpu").to(
        output
    )
    named = dict(module.named_parameters())
    tensors = {"input": leaf, **{f"parameter {name}": p for name, p in named.items()}}
    grads = torch.autograd.grad(output, list(tensors.values()), seed, allow_unused=True)
    gradients = {
        name: torch.zeros_like(tensor) if grad is None else grad
        for (name, tensor), grad in zip(tensors.items(), grads, strict=True)
    }
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    return _Step(output.detach(), gradients, buffers)


def _same(part: str, ready: _Ready, module: nn.Module, twin: nn.Module, input: Tensor) -> None:
    mine, other = (_step(ready(m, torch.float64), input.double()) for m in (module, twin))
    if part == "output":
        assert_close("output", mine.output, other.output, _FLOAT64)
        return
    pairs = getattr(mine, part), getattr(other, part)
    # Where the true gradient is zero (a bias before batch statistics), only rounding is left.
    floor = max(float(value.double().abs().max()) for value in pairs[1].values()) if pairs[1] else 0
    for name, expected in pairs[1].items():
        if float((pairs[0][name].double() - expected.double()).abs().max()) > _FLOAT64 * floor:
            assert_close(name, pairs[0][name], expected, _FLOAT64)


def _output_in_dtype(ready: _Ready, module: nn.Module, twin: nn.Module, input: Tensor) -> None:
    with torch.no_grad():
        result = ready(module, input.dtype)(input)
        peer = ready(twin, input.dtype)(input)
        judge = ready(twin, torch.float64)(input.double())
    assert result.dtype == peer.dtype, f"expected {peer.dtype}, got {result.dtype}"
    own_error = float((peer.double() - judge).abs().max())
    rms = max(float(judge.square().mean().sqrt()), 1e-30)
    assert_close(
        "output", result, judge, tolerance(input.dtype, input.numel()) + 2 * own_error / rms
    )


def _gradcheck(ready: _Ready, module: nn.Module, input: Tensor) -> None:
    double = ready(module, torch.float64)
    restore = _restorer(double)
    leaf = input.detach().double().clone().requires_grad_()

    def function(leaf: Tensor, *_: Tensor) -> Tensor:
        restore()
        result: Tensor = double(leaf)
        return result

    torch.autograd.gradcheck(function, (leaf, *double.parameters()), fast_mode=True)


def _restorer(module: nn.Module) -> Callable[[], None]:
    """Return what puts the buffers back: what a call accumulates must not reach the next."""
    state = [
        (owner, name, buffer.clone())
        for owner in module.modules()
        for name, buffer in owner.named_buffers(recurse=False)
    ]

    def restore() -> None:
        # New tensors, because autograd may have saved the old ones.
        for owner, name, buffer in state:
            setattr(owner, name, buffer.clone())

    return restore


def _repeats(ready: _Ready, module: nn.Module, input: Tensor) -> None:
    double = ready(module, torch.float64)
    restore = _restorer(double)
    first = _step(double, input.double())
    restore()
    second = _step(double, input.double())
    assert torch.equal(first.output, second.output), "the output changes from call to call"
    for name, gradient in first.gradients.items():
        assert torch.equal(gradient, second.gradients[name]), f"the gradient of {name} changes"
    for name, buffer in first.buffers.items():
        assert torch.equal(buffer, second.buffers[name]), f"the buffer {name} changes"
