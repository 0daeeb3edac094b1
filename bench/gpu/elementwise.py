"""One operator case at one level of the network: every implementation, and torch's two ways."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from resunet_fast.registry import OPERATORS
from resunet_fast.testing import Case, make_inputs
from resunet_fast.testing.checks import run

from ..operators import DIRECTIONS, cases
from ..roofline import Ceilings, operator_work
from .calls import candidates, device
from .convolutions import judged, unavailable
from .job import Record
from .measure import Results, row

# Of a pre-activation unit only backward is more than its parts: the data gradient may take batch
# norm's sums.
FAMILY = {"bn_act": DIRECTIONS, "upsample": DIRECTIONS, "bn_act_conv": ("backward",)}
LEVELS = range(5)
# Of the norm of float32's result from the same rounded operands, beyond twice what eager is off by:
# where it rounds in between, masks flip and pooling windows tie. Part `check` imposes the mask.
ALLOWED = 1e-2


def rows(batch: int, size: int, width: int, dry: bool) -> list[tuple[Case, str]]:
    levels = [0] if dry else list(LEVELS)
    some = [case for case in cases(batch, size, width, levels) if case.operator in FAMILY]
    return [(case, direction) for case in some for direction in FAMILY[case.operator]]


def _call(case: Case, inputs: list[object], direction: str, way: str) -> Callable[[], Results]:
    """A call of the operator; "eager" and "torch.compile" run the reference's formula."""
    reference = OPERATORS[case.operator].implementations["reference"].compute
    if way == "torch.compile":
        torch._dynamo.reset()
        # Its backward is called again and again on one graph.
        torch._functorch.config.donated_buffer = False
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
    starts = [o for o in forward() if o is not None and o.requires_grad]
    if case.operator == "bn_act_conv":  # what is kept for backward is no result
        starts = starts[:1]
    torch.manual_seed(1)
    # Rounded alike for every dtype, and drawn where they are used: they are large.
    seeds = [torch.randn(o.shape, device=o.device).bfloat16().to(o) for o in starts]
    wanted = [v for v in inputs if isinstance(v, Tensor) and v.requires_grad]
    return lambda: list(torch.autograd.grad(starts, wanted, seeds, retain_graph=True))


def operands(case: Case, dtype: torch.dtype, at: str, *, grad: bool) -> list[object]:
    """One image of the case, as often as the batch has images: drawing them all takes minutes."""
    n, *image = case.shape
    one = Case(case.operator, case.name, (1, *image), case.options)  # type: ignore[arg-type]
    found = make_inputs(one, dtype, requires_grad=grad, device=at)
    for i, value in enumerate(found):
        if isinstance(value, Tensor) and value.dim() == 4 and len(value) == 1:
            many = value.detach().expand(n, -1, -1, -1)
            many = many.contiguous(memory_format=torch.channels_last)
            found[i] = many.requires_grad_(value.requires_grad)
    return found


def measure(case: Case, direction: str, known: Callable[[], Ceilings], dry: bool) -> Record:
    """Check and time every way; the record has a row for each."""
    at, dtype = device(dry), torch.float32 if dry else torch.bfloat16
    inputs = operands(case, dtype, at, grad=direction == "backward")
    exact = _exact(case, inputs, direction)
    work = operator_work(case.operator, inputs, direction)
    found: list[Record] = []
    peers = {"eager": [], "torch.compile": ["not in a dry run"] if dry else []}
    for way, reasons in {**peers, **candidates(dry)}.items():
        implementation = OPERATORS[case.operator].implementations.get(way)
        if implementation is not None:
            reasons = reasons or implementation.refusals(*inputs)
        elif way not in peers:
            continue
        if reasons:
            found.append(unavailable(way, "; ".join(reasons)))
            continue
        head = {"implementation": way}
        allowed = ALLOWED + 2 * found[0].get("error", 0.0) if found else float("inf")
        call = _call(case, inputs, direction, way)
        found.append(row(head, call, exact, allowed, work, known(), at))
    facts = {"operator": case.operator, "case": case.name, "direction": direction}
    return {**facts, "dtype": str(dtype)[6:], "rows": found, **judged(found)}


def _exact(case: Case, inputs: list[object], direction: str) -> Results:
    floats = [
        v.detach().float().requires_grad_(v.requires_grad) if isinstance(v, Tensor) else v
        for v in inputs
    ]
    return [None if r is None else r.detach() for r in _call(case, floats, direction, "eager")()]
