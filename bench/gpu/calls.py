"""One implementation on one case, forward and backward, with its operands at hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from resunet_fast.registry import OPERATORS, backends
from resunet_fast.testing import CASES, Case, assert_close, make_inputs, tolerance
from resunet_fast.testing.checks import condition, differentiable, run, seeds_of, terms

# What runs on a GPU, and what stands in for it in a dry run.
GPU_BACKENDS = ("cudnn", "cuda", "triton")
DRY_BACKENDS = ("cpu", "triton")
Results = list[Tensor | None]


def device(dry: bool) -> str:
    return "cpu" if dry else "cuda"


def candidates(dry: bool) -> dict[str, list[str]]:
    """Every backend that concerns a part, with what keeps it from running on this machine."""
    known = backends()
    names = DRY_BACKENDS if dry else GPU_BACKENDS
    return {name: known.get(name, ["this version has no such backend"]) for name in names}


def some_cases(backend: str, *, first: bool) -> list[Case]:
    """The cases whose operator has the backend; `first`: one of each operator."""
    fitting = [case for case in CASES if backend in OPERATORS[case.operator].implementations]
    if not first:
        return fitting
    return list({case.operator: case for case in reversed(fitting)}.values())


class Call:
    """An implementation on the operands of a case.

    Args:
        case: a line of the table.
        backend: the implementation.
        dtype, layout: of the images and weights.
        at: the device.
    """

    def __init__(
        self,
        case: Case,
        backend: str,
        dtype: torch.dtype,
        at: str,
        layout: torch.memory_format = torch.channels_last,
    ) -> None:
        self.case, self.backend, self.dtype = case, backend, dtype
        grad = differentiable(case)
        self.inputs = make_inputs(case, dtype, layout, requires_grad=grad, device=at)
        # Drawn once, at the first call: a recorded graph must not copy from the host.
        self.seeds: list[Tensor | None] = []

    @property
    def refused(self) -> list[str]:
        return OPERATORS[self.case.operator].implementations[self.backend].refusals(*self.inputs)

    @property
    def leaves(self) -> list[Tensor]:
        return [v for v in self.inputs if isinstance(v, Tensor) and v.requires_grad]

    def tensors(self) -> list[Tensor]:
        return [v for v in self.inputs if isinstance(v, Tensor)]

    def __call__(self, inputs: Sequence[Any] | None = None) -> Results:
        """Results and then gradients, of the case's operands or of others in their place."""
        arguments = list(self.inputs if inputs is None else inputs)
        outputs = run(self.case, arguments, self.backend)
        if not differentiable(self.case):
            return list(outputs)
        if not self.seeds:
            self.seeds = seeds_of(outputs)
            if self.case.operator == "bn_act_conv":  # what is kept for backward is no result
                self.seeds[1:] = [None] * len(self.seeds[1:])
        pairs = zip(outputs, self.seeds, strict=True)
        kept = [(o, s) for o, s in pairs if o is not None and s is not None]
        wanted = [v for v in arguments if isinstance(v, Tensor) and v.requires_grad]
        starts, grads = [o for o, _ in kept], [s for _, s in kept]
        found = torch.autograd.grad(starts, wanted, grads, allow_unused=True)
        return [*(None if o is None else o.detach() for o in outputs), *found]

    def allowed(self) -> float:
        return 4 * condition(self.case) * tolerance(self.dtype, terms(self.case))


def same(name: str, results: Results, expected: Results, allowed: float | None = None) -> None:
    """Assert that two runs agree: to the bit, or within what rounding explains."""
    for i, (result, other) in enumerate(zip(results, expected, strict=True)):
        assert (result is None) == (other is None), f"{name}: result {i} is there once only"
        if result is None or other is None:
            continue
        if allowed is None:
            equal = torch.equal(result, other) or _equal_but_nan(result, other)
            assert equal, f"{name}: result {i} differs in {int((result != other).sum())} elements"
        else:
            assert_close(f"{name}: result {i}", result, other, allowed)


def _equal_but_nan(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def misaligned(tensor: Tensor) -> Tensor:
    """A copy with the same strides, one element behind an aligned address."""
    extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    buffer = torch.empty(extent + 1, dtype=tensor.dtype, device=tensor.device)
    shifted = buffer.as_strided(tensor.shape, tensor.stride(), 1)
    shifted.copy_(tensor.detach())
    return shifted.requires_grad_(tensor.requires_grad)
