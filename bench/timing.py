"""Interleaved timing: every variant in turn, so that a machine's moods hit all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Timing:
    """Milliseconds: median, 20th and 80th percentile, number of samples."""

    median: float
    p20: float
    p80: float
    samples: int

    @staticmethod
    def of(samples: list[float]) -> Timing:
        deciles = statistics.quantiles(samples, n=10, method="inclusive")
        return Timing(statistics.median(samples), deciles[1], deciles[7], len(samples))

    def json(self) -> dict[str, float]:
        return asdict(self)


def interleaved(
    variants: dict[str, Callable[[], object]],
    rounds: int,
    *,
    warmup: int = 2,
    progress: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Time each variant once per round; the order rotates. Milliseconds, one list per variant."""
    samples: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for number in range(-warmup, rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            start = time.perf_counter()
            variants[name]()
            elapsed = 1e3 * (time.perf_counter() - start)
            if number >= 0:
                samples[name].append(elapsed)
            progress()
    return samples


def ratio(peer: list[float], ours: list[float]) -> Timing:
    """Peer over ours, round by round: above 1 we are faster."""
    return Timing.of([p / o for p, o in zip(peer, ours, strict=True)])
