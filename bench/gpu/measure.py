"""One timed row: checked before, on the roofline after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from resunet_fast.testing.compare import one_line

from ..roofline import Ceilings, Work, share
from ..timing import Clock, Timing, captured
from .job import OK, WRONG, Record, failed

ROUNDS = 21
Results = list[Tensor | None]


def distance(results: Results, exact: Results) -> float:
    """The largest relative distance of a result from its judge; NaN where a result has one."""
    found = [
        float((r.to(e.dtype) - e).norm() / e.norm().clamp_min(1e-30))
        for r, e in zip(results, exact, strict=True)
        if r is not None and e is not None
    ]
    return float("nan") if any(d != d for d in found) else max(found, default=0.0)


def row(
    name: dict[str, Any],
    call: Callable[[], Results],
    exact: Results,
    allowed: float,
    work: Work,
    ceilings: Ceilings,
    device: str,
) -> Record:
    """Check and time one call.

    Args:
        name: what the row is of.
        call: runs it and returns its results.
        exact: the judge's results.
        allowed: the distance from them that passes.
        work, ceilings: for the roofline.
        device: "cuda", or "cpu" in a dry run.
    """
    record: Record = {**name, "status": OK}
    try:
        error = distance(call(), exact)
        record["error"] = error
        if not error <= allowed:
            return {**record, "status": WRONG, "note": f"off by {error:.2g}, allowed {allowed:.2g}"}
        record.update(timed(call, device))
    except Exception as error:  # of one way to compute: the others of the job are still measured
        return {**record, **failed(error)}
    return {**record, **share(work, ceilings, record["ms"]["median"])}


def timed(call: Callable[[], object], device: str) -> Record:
    """Device time: replays of a recorded call where it can be recorded, else the call itself."""
    record: Record = {}
    clock = Clock(device, flush=device == "cuda")
    rounds = ROUNDS if device == "cuda" else 1
    target = call
    try:
        target = captured(call, device)
    except RuntimeError as error:
        record["note"] = f"not recorded as a graph: {one_line(error)[:100]}"
        if device == "cuda":
            torch.cuda.synchronize()
    for _ in range(3):
        target()
    return {**record, "ms": Timing.of([clock(target) for _ in range(rounds)]).json()}
