"""Timing: events on a GPU and the monotonic clock elsewhere; every variant in turn, round by round.

A machine's moods then hit all variants alike, and ratios are taken within a round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

Call = Callable[[], object]
# More than the last-level caches of the machines that this runs on (H200: 60 MB).
FLUSH_BYTES = 256 << 20


@dataclass(frozen=True)
class Timing:
    """Milliseconds: median, 20th and 80th percentile, number of samples."""

    median: float
    p20: float
    p80: float
    samples: int

    @staticmethod
    def of(samples: list[float]) -> Timing:
        if len(samples) == 1:
            return Timing(samples[0], samples[0], samples[0], 1)
        deciles = statistics.quantiles(samples, n=10, method="inclusive")
        return Timing(statistics.median(samples), deciles[1], deciles[7], len(samples))

    def json(self) -> dict[str, float]:
        return asdict(self)


class Clock:
    """Times one call in milliseconds, on a GPU until its work is done.

    Args:
        device: where the call's work runs.
        flush: overwrite the caches before each call, outside the measured time.
    """

    def __init__(self, device: torch.device | str = "cpu", *, flush: bool = False) -> None:
        self.cuda = torch.device(device).type == "cuda"
        size = FLUSH_BYTES if flush else 0
        self.waste: Tensor = torch.empty(size, dtype=torch.int8, device=device)

    def flush(self) -> None:
        self.waste.zero_()

    def __call__(self, call: Call) -> float:
        self.flush()
        if not self.cuda:
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        # The overwriting still runs while the call is launched: no gap is timed before a kernel.
        begin.record()
        call()
        end.record()
        end.synchronize()
        elapsed: float = begin.elapsed_time(end)
        return elapsed


def interleaved(
    variants: dict[str, Call],
    rounds: int,
    *,
    warmup: int = 2,
    progress: Callable[[], object] = lambda: None,
    clock: Callable[[Call], float] | None = None,
) -> dict[str, list[float]]:
    """Time each variant once per round; the order rotates. Milliseconds, one list per variant."""
    measure = Clock() if clock is None else clock
    samples: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for number in range(-warmup, rounds):
        turn = number % len(names) if names else 0
        for name in names[turn:] + names[:turn]:
            elapsed = measure(variants[name])
            if number >= 0:
                samples[name].append(elapsed)
            progress()
    return samples


def rotating(calls: list[Call]) -> Call:
    """One call after the other, so that no call finds its operands in a cache."""
    turn = -1

    def next_one() -> object:
        nonlocal turn
        turn = (turn + 1) % len(calls)
        return calls[turn]()

    return next_one


def fitting_rounds(round_seconds: float, budget_seconds: float, least: int, most: int) -> int:
    """How many rounds fit into a budget, within bounds."""
    return max(least, min(most, int(budget_seconds / max(round_seconds, 1e-9))))


def ratio(peer: list[float], ours: list[float]) -> Timing:
    """Peer over ours, round by round: above 1 we are faster."""
    return Timing.of([p / o for p, o in zip(peer, ours, strict=True)])


def captured(call: Call, device: torch.device | str) -> Call:
    """Record a call into a CUDA graph and return its replay; without a GPU, the call itself.

    Args:
        call: launches the same kernels on the same tensors each time and does not synchronise.
        device: where its work runs.
    """
    if torch.device(device).type != "cuda":
        return call
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
