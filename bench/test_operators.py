"""Every operator x case x implementation x direction under pytest-benchmark.

python -m pytest bench/test_operators.py -o addopts= [--benchmark-json=FILE]

`python -m bench run` calls this and puts the result next to the networks'.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from resunet_fast.testing import Case
from resunet_fast.testing.checks import differentiable

from . import operators
from .timing import Clock, fitting_rounds

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# A level near the image and one near the bottleneck, of what `bench run` trains on.
SIZES = {"cpu": (2, 128, 64, (0, 3)), "cuda": (16, 512, 64, (0, 3))}
DTYPES = {"cpu": (torch.float32,), "cuda": (torch.bfloat16,)}
# For one row, the overwriting of the caches included.
SECONDS = 0.2


def rows() -> list[Any]:
    found = []
    for case in operators.cases(*SIZES[DEVICE]):
        for dtype in DTYPES[DEVICE]:
            # Asked on a small stand-in of the same flags: collecting must not fill the memory.
            small = Case(case.operator, case.name, *_smaller(case))
            for name, reasons in operators.implementations(small, dtype, DEVICE).items():
                for direction in operators.DIRECTIONS:
                    if direction == "backward" and not differentiable(case):
                        continue
                    marks = [pytest.mark.skip(reason="; ".join(reasons))] if reasons else []
                    label = f"{case.id}-{str(dtype)[6:]}-{direction}-{name}"
                    values = (case, name, direction, dtype)
                    found.append(pytest.param(*values, id=label, marks=marks))
    return found


def _smaller(case: Case) -> tuple[tuple[int, int, int, int], dict[str, Any]]:
    def spatial(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
        return (1, shape[1], min(shape[2], 8), min(shape[3], 8))

    options = dict(case.options)
    if "skip" in options:
        options["skip"] = spatial(options["skip"])
    if "size" in options:
        options["size"] = [min(n, 8) for n in options["size"]]
    return spatial(case.shape), options


@pytest.mark.parametrize(("case", "backend", "direction", "dtype"), rows())
def test_operator(
    benchmark: Any, case: Case, backend: str, direction: str, dtype: torch.dtype
) -> None:
    prepared = operators.Prepared(case, backend, direction, dtype, DEVICE)
    wrong = prepared.wrong()
    if wrong:
        pytest.fail(f"WRONG, not timed: {case.id} {direction} {backend}: {wrong}", pytrace=False)
    work, clock = prepared.work(), Clock(DEVICE, flush=True)
    benchmark.group = f"{case.id} {str(dtype)[6:]} {direction}"
    benchmark.extra_info.update(
        operator=case.operator, case=case.name, backend=backend, direction=direction
    )
    benchmark.extra_info.update(dtype=str(dtype)[6:], flops=work.flops, bytes=work.nbytes)

    def call() -> None:
        prepared.call()
        if clock.cuda:
            torch.cuda.synchronize()

    start = time.perf_counter()
    clock(prepared.call)
    rounds = fitting_rounds(time.perf_counter() - start, SECONDS, 5, 50)
    benchmark.pedantic(call, setup=clock.flush, rounds=rounds, warmup_rounds=1)
