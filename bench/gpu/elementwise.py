"""One operator case at one level of the network: every implementation, and torch's two ways."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from resunet_fast.registry import OPERATORS
from resunet_fast.testing import Case, make_inputs
from resunet_fast.testing.checks import run, seeds_of

from ..operators import DIRECTIONS, cases
from ..roofline import Ceilings, operator_work
from .calls import candidates, device
from .convolutions import judged, unavailable
from .job import Record
from .measure import Results, row

FAMILY = ("bn_act", "upsample")
LEVELS = range(5)
# Of the norm of float32's result from the same rounded operands; gradients are those of different
# masks, which flip where rounding puts a value on the other side of zero.
ALLOWED = {"forward": 1e-2, "backward": 5e-2}


def rows(batch: int, size: int, width: int, dry: bool) -> list[tuple[Case, str]]:
    levels = [0] if dry else list(LEVELS)
    some = [case for case in cases(batch, size, width, levels) if case.operator in FAMILY]
    return [(case, direction) for case in some for direction in DIRECTIONS]


def _call(case: Case, inputs: list[object], direction: str, way: str) -> Callable[[], Results]:
    """A call of the operator; "eager" and "torch.compile" run the reference's formula."""
    reference = OPERATORS[case.operator].implementations["reference"].compute
    if way == "torch.compile":
        torch._dynamo.reset()
        formula = torch.compile(reference, fullgraph=True)
    else:
        formula = reference

    def forward() -> Results:
        if way in ("eager", "torch.compile"):
            result = formula(*inputs)
            return list(result) if isinstance(result, tuple) else [result]
        return list(run(case, inputs, way))

    if direction == "forward":
        return torch.no_grad()(forward)
    outputs = forward()
    seeds = seeds_of(tuple(outputs))
    pairs = [(o, s) for o, s in zip(outputs, seeds, strict=True) if o is not None and s is not None]
    wanted = [v for v in inputs if isinstance(v, Tensor) and v.requires_grad]
    starts, grads = [o for o, _ in pairs], [s for _, s in pairs]
    return lambda: list(torch.autograd.grad(starts, wanted, grads, retain_graph=True))


def measure(case: Case, direction: str, known: Callable[[], Ceilings], dry: bool) -> Record:
    """Check and time every way; the record has a row for each."""
    at, dtype = device(dry), torch.float32 if dry else torch.bfloat16
    inputs = make_inputs(case, dtype, requires_grad=direction == "backward", device=at)
    exact = _exact(case, inputs, direction)
    work = operator_work(case.operator, inputs, direction)
    found: list[Record] = []
    against = {"eager": [], "torch.compile": ["not in a dry run"] if dry else []}
    for way, reasons in {**against, **candidates(dry)}.items():
        implementation = OPERATORS[case.operator].implementations.get(way)
        if implementation is not None:
            reasons = reasons or implementation.refusals(*inputs)
        elif way not in against:
            continue
        if reasons:
            found.append(unavailable(way, "; ".join(reasons)))
            continue
        head = {"implementation": way}
        call = _call(case, inputs, direction, way)
        found.append(row(head, call, exact, ALLOWED[direction], work, known(), at))
    facts = {"operator": case.operator, "case": case.name, "direction": direction}
    return {**facts, "dtype": str(dtype)[6:], "rows": found, **judged(found)}


def _exact(case: Case, inputs: list[object], direction: str) -> Results:
    floats = [
        v.detach().float().requires_grad_(v.requires_grad) if isinstance(v, Tensor) else v
        for v in inputs
    ]
    return [None if r is None else r.detach() for r in _call(case, floats, direction, "eager")()]
