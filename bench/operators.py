"""The operators at the shapes of the network: cases, a check, and the call that is timed.

Driven by pytest-benchmark (bench/test_operators.py): registry x cases x implementation x {forward,
backward}.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from resunet_fast import environment
from resunet_fast.registry import OPERATORS
from resunet_fast.testing import Case, make_inputs, tolerance
from resunet_fast.testing.checks import terms

from .roofline import Work, operator_work
from .timing import rotating

DIRECTIONS = ("forward", "backward")
# Sets of operands that take turns.
SETS = 2


def cases(batch: int, size: int, width: int, levels: Sequence[int]) -> list[Case]:
    """What the network calls at some levels of an image of `size`, in the table's form."""
    table = []
    for level in levels:
        side, channels = size >> level, width << level
        own = (batch, channels, side, side)
        low = (batch, 2 * channels, side // 2, side // 2)
        mode = "bilinear_align_corners"
        two = {"skip": own, "upsample": mode, "out": channels}
        lines: list[tuple[str, str, tuple[int, int, int, int], dict[str, Any]]] = [
            ("bn_act", "bn-relu", own, {}),
            ("bn_act", "bn-relu-pool", own, {"pool": True}),
            ("bn_act", "bn-residual-relu", own, {"residual": "tensor"}),
            ("bn_act", "eval", own, {"frozen": True}),
            ("conv_bn_act", "3x3", own, {"out": channels, "bias": False}),
            ("bn_act_conv", "3x3", own, {"out": channels, "bias": False}),
            ("conv_bias_act", "residual", own, {"out": channels, "residual": "tensor"}),
            ("conv2d", "two-sources", low, two),
            ("upsample", "double", low, {"size": [side, side], "mode": mode}),
        ]
        table += [Case(op, f"{name} {channels}x{side}", at, o) for op, name, at, o in lines]
    return table


def implementations(case: Case, dtype: torch.dtype, device: str) -> dict[str, list[str]]:
    """Every implementation of the case's operator, with what stands against timing it."""
    # Refusals look at dtype, layout and device, and a case's arguments can be large.
    inputs = make_inputs(case, dtype, device=device)
    found = {}
    for name, implementation in OPERATORS[case.operator].implementations.items():
        reasons = implementation.refusals(*inputs)
        if name == "triton" and environment.triton_interpreted():
            reasons = [*reasons, "interpreted kernels are not timed"]
        found[name] = reasons
    return found


class Prepared:
    """One operator on one case, ready to be checked and timed.

    Args:
        case: what is run; `SETS` draws of it take turns.
        backend: the implementation.
        direction: "forward", or "backward" for the gradients of every argument that has one.
        dtype, device: of the images and weights.
    """

    def __init__(
        self, case: Case, backend: str, direction: str, dtype: torch.dtype, device: str = "cpu"
    ) -> None:
        self.case, self.backend, self.direction = case, backend, direction
        self.dtype = dtype
        grad = direction == "backward"
        self.sets = [
            make_inputs(case, dtype, seed=seed, requires_grad=grad, device=device)
            for seed in range(SETS)
        ]
        self.call = rotating([self._call(inputs, backend) for inputs in self.sets])

    def _call(self, inputs: list[Any], backend: str) -> Callable[[], tuple[Tensor | None, ...]]:
        operator = OPERATORS[self.case.operator]

        def forward() -> tuple[Tensor | None, ...]:
            result = operator(*inputs, backend)
            return result if isinstance(result, tuple) else (result,)

        if self.direction == "forward":
            return torch.no_grad()(forward)
        outputs = [o for o in forward() if o is not None and o.requires_grad]
        if self.case.operator in ("bn_act_conv", "conv_bn_act"):
            # What is kept for backward is an output as well, but no result.
            outputs = outputs[: 1 + self.case.options.get("pool", False)]
        generator = torch.Generator().manual_seed(1)
        seeds = [torch.randn(o.shape, generator=generator).to(o) for o in outputs]
        wanted = [v for v in inputs if isinstance(v, Tensor) and v.requires_grad]
        return lambda: torch.autograd.grad(outputs, wanted, seeds, retain_graph=True)

    def wrong(self) -> str:
        """What is wrong with the results, as a sentence; empty: nothing.

        They may be twice as far from the float64 reference as the reference in their own dtype,
        plus what rounding explains (the mask's flips are in both; tests/ imposes the mask).
        """
        inputs = self.sets[0]
        doubles = [
            v.detach().double().requires_grad_(v.requires_grad) if isinstance(v, Tensor) else v
            for v in inputs
        ]
        exact = self._call(doubles, "reference")()
        eager = self._call(inputs, "reference")()
        results = self._call(inputs, self.backend)()
        allowed = 4 * tolerance(self.dtype, terms(self.case))
        for i, (result, peer, judge) in enumerate(zip(results, eager, exact, strict=True)):
            if judge is None or result is None or peer is None:
                continue
            error, own = (float((r.double() - judge).norm()) for r in (result, peer))
            size = float(judge.norm())
            if not error <= 2 * own + allowed * size:
                return f"result {i} is off by {error / max(size, 1e-30):.2g} of its size"
        return ""

    def work(self) -> Work:
        return operator_work(self.case.operator, self.sets[0], self.direction)
