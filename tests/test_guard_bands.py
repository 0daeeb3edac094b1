"""Triton kernels between guard bands, and the bands themselves on planted faults."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from guard_bands import LAYOUTS, GuardBands, check, check_case, runnable
from torch import Tensor

import resunet_fast as rf
from resunet_fast import environment
from resunet_fast.ops import backends
from resunet_fast.registry import OPERATORS, Implementation
from resunet_fast.testing import CASES, Case

pytestmark = pytest.mark.skipif(
    bool(backends.triton_unavailable()), reason="; ".join(backends.triton_unavailable())
)


def test_tensors_between_bands_keep_their_values_and_strides() -> None:
    bands = GuardBands()
    window = torch.randn(2, 5, 7, 9)[:, 1:4, 1:, 2:8]
    guarded = bands.guard(window)
    assert torch.equal(guarded, window)
    assert guarded.stride() == window.stride()
    with bands:
        assert torch.empty(3, 4).isnan().all()
        assert torch.empty_like(window).isnan().all()
        assert torch.equal(torch.zeros(3), torch.tensor([0.0, 0.0, 0.0]))
    bands.assert_intact()


FAULTS: dict[str, Any] = {
    "write behind": lambda x: x.as_strided((1,), (1,), x.storage_offset() + x.numel()).fill_(1.0),
    "write before": lambda x: x.as_strided((1,), (1,), x.storage_offset() - 1).fill_(1.0),
}


def planted(monkeypatch: pytest.MonkeyPatch, compute: Any) -> None:
    operator = OPERATORS["upsample"]
    faulty = Implementation("reference", compute)
    monkeypatch.setitem(operator.implementations, "reference", faulty)


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_write_beside_an_operand_is_caught(fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def compute(x: Tensor, size: list[int], mode: str) -> Tensor:
        if x.untyped_storage().nbytes() > x.nbytes:  # not where there is nothing beside it
            fault(x)
        return x + 0.0

    planted(monkeypatch, compute)
    with pytest.raises(AssertionError, match="1 elements around a tensor were written"):
        check("upsample", (torch.ones(1, 2, 3, 4), [3, 4], "nearest"), "reference")


def test_a_read_beside_an_operand_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def compute(x: Tensor, size: list[int], mode: str) -> Tensor:
        if x.untyped_storage().nbytes() == x.nbytes:
            return x + 0.0
        return x + x.as_strided((1,), (1,), x.storage_offset() + x.numel())

    planted(monkeypatch, compute)
    with pytest.raises(AssertionError, match="depends on what lies around"):
        check("upsample", (torch.ones(1, 2, 3, 4), [3, 4], "nearest"), "reference")


def test_an_element_left_unwritten_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def compute(x: Tensor, size: list[int], mode: str) -> Tensor:
        result = torch.empty_like(x)
        result[:, :, 1:] = 1.0
        return result

    planted(monkeypatch, compute)
    with pytest.raises(AssertionError, match="depends on what lies around"):
        check("upsample", (torch.ones(1, 2, 3, 4), [3, 4], "nearest"), "reference")


RUNNABLE = [case for case in CASES if runnable(case, "triton")]


@pytest.mark.parametrize("layout", ["nhwc", pytest.param("nchw", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", RUNNABLE, ids=lambda case: case.id)
def test_cases_between_bands(case: Case, layout: str) -> None:
    assert check_case(case, "triton", torch.float32, LAYOUTS[layout])


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_between_bands(momentum: float | None) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mean, var, new_mean, new_var, bias = torch.rand(5, 19, device=device)
    counter = torch.tensor(3, device=device)
    arguments = (mean, var, counter, new_mean, new_var, bias, 12, momentum)
    check("update_running_stats", arguments, "triton")


@pytest.mark.slow
@pytest.mark.skipif(not environment.triton_interpreted(), reason="on a GPU memcheck does this")
@pytest.mark.parametrize("seed", range(4))
def test_drawn_shapes_between_bands(seed: int) -> None:
    script = Path(__file__).parent / "guard_bands.py"
    root = str(Path(rf.__file__).parents[1])
    command = [sys.executable, str(script), "triton", str(seed), "25"]
    child = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": root}, capture_output=True, text=True
    )
    last = child.stdout.strip().splitlines()[-1:]
    assert child.returncode == 0, f"{last} ended with {child.returncode}: {child.stderr[-2000:]}"
    assert len(child.stdout.splitlines()) > 10
