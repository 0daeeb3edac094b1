from __future__ import annotations

import time

import pytest
import torch

from bench import training
from bench.timing import Timing, interleaved, ratio


def test_percentiles_and_ratios() -> None:
    timing = Timing.of([float(n) for n in range(11)])
    assert (timing.median, timing.p20, timing.p80, timing.samples) == (5.0, 2.0, 8.0, 11)
    assert ratio([4.0, 6.0, 10.0], [2.0, 2.0, 2.0]).median == 3.0


def test_interleaving_times_every_variant_in_every_round_and_rotates() -> None:
    calls: list[str] = []

    def slow() -> None:
        calls.append("slow")
        time.sleep(0.02)

    samples = interleaved({"slow": slow, "fast": lambda: calls.append("fast")}, 4, warmup=1)
    assert {name: len(times) for name, times in samples.items()} == {"slow": 4, "fast": 4}
    assert min(samples["slow"]) >= 20 > max(samples["fast"])
    assert calls[2:6] == ["slow", "fast", "fast", "slow"]


def test_a_wrong_variant_is_reported_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = training.plain()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x) * 1.01

    eager = training.Variant("eager NCHW", training.plain, training.NCHW)
    broken = training.Variant("broken", Broken, training.NCHW)
    monkeypatch.setattr(training, "WIDTH", 4)
    monkeypatch.setattr(training, "SIZE", 32)
    monkeypatch.setattr(training, "VARIANTS", (eager, broken))
    judge = training.float64_results()
    results = training.measure("fp32", judge, rounds=2, compiled=False)
    assert results["variants"]["broken"]["wrong"]
    assert "ms" not in results["variants"]["broken"]
    assert results["variants"]["eager NCHW"]["ms"]["samples"] == 2
    assert "WRONG" in training.report({"fp32": results, "bf16": results})
