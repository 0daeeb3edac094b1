"""`python -m bench launch`: microseconds of the CPU per call, on tensors too small to compute on.

What a call costs before a kernel does any work: the public operator against the operations of eager
PyTorch that it stands for, with and without autograd, on the CPU with one thread and on a GPU if
there is one. On a GPU nothing is waited for between calls.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resunet_fast as rf
from resunet_fast import registry
from resunet_fast.functional import Conv, Norm

from . import table
from .facts import facts
from .timing import Timing, interleaved, ratio

CHANNELS = 8
CALLS = 200
ROUNDS = 21


def variants(device: str) -> dict[str, dict[str, Callable[[], Tensor]]]:
    """The calls that stand for the same unit: {operator: {backend or "eager": call}}."""
    torch.manual_seed(0)
    x = torch.randn(2, CHANNELS, 4, 4, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    residual = torch.randn_like(x)
    bn = nn.BatchNorm2d(CHANNELS).to(device)
    conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False, device=device)
    running = (bn.running_mean, bn.running_var, bn.weight, bn.bias, True)
    norm, weights = Norm.of(bn), Conv.of(conv)  # as eager's functions take their tensors

    def bn_act() -> Any:
        return rf.functional.bn_act(x, norm, residual=residual)

    def conv_bn_act() -> Any:
        return rf.functional.conv_bn_act(x, weights, norm, residual=residual)

    def eager(y: Tensor) -> Tensor:
        return (F.batch_norm(y, *running) + residual).relu()

    def under(backend: str, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def forced() -> Tensor:
            with rf.use_backend(backend):
                return call()

        # The CPU's and the CUDA C++ kernels are what is chosen anyway.
        return forced if backend == "triton" else call

    found: dict[str, dict[str, Callable[[], Tensor]]] = {
        "bn_act": {"eager": lambda: eager(x)},
        "conv_bn_act": {"eager": lambda: eager(F.conv2d(x, *weights))},
    }
    for backend in ("cuda", "triton") if device == "cuda" else ("cpu",):
        if registry.backends().get(backend) == []:
            found["bn_act"][backend] = under(backend, bn_act)
            found["conv_bn_act"][backend] = under(backend, conv_bn_act)
    return found


def milliseconds(call: Callable[[], object]) -> float:
    """CPU time until the calls return, per call."""
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    elapsed = 1e3 * (time.perf_counter() - start) / CALLS
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return elapsed


def _modes(forward: Callable[[], Tensor]) -> dict[str, Callable[[], object]]:
    seed = torch.ones_like(forward().detach())

    def both_ways() -> None:
        forward().backward(seed)

    return {
        "no grad": torch.no_grad()(forward),
        "grad": forward,
        "forward and backward": both_ways,
    }


def measure(device: str, rounds: int) -> dict[str, dict[str, Any]]:
    """One row per operator, mode and way, on one thread; ratios are eager's time over ours."""
    rows: dict[str, dict[str, Any]] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for operator, calls in variants(device).items():
            by_way = {way: _modes(call) for way, call in calls.items()}
            for mode in by_way["eager"]:
                some = {way: modes[mode] for way, modes in by_way.items()}
                samples = interleaved(some, rounds, clock=milliseconds)
                for way, ours in samples.items():
                    row = {"ms": Timing.of(ours).json()}
                    if way != "eager":
                        row["ratio"] = ratio(samples["eager"], ours).json()
                    rows[f"{operator}, {mode}: {way}, {device} tensors"] = row
    finally:
        torch.set_num_threads(threads)
    return rows


def cells(rows: dict[str, dict[str, Any]]) -> list[list[str]]:
    """The rows of a table, the first of them its head."""
    found = [["one call", "CPU time", "eager's over it"]]
    for name, row in rows.items():
        median, low, high = (1e3 * row["ms"][key] for key in ("median", "p20", "p80"))
        speed = table.times(row["ratio"]) if "ratio" in row else ""
        found.append([name, f"{median:.1f} us [{low:.1f}, {high:.1f}]", speed])
    return found


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="samples per row")
    parser.add_argument(
        "--json", type=Path, help="write the rows here, with date, commit, machine and versions"
    )


def main(options: argparse.Namespace) -> int:
    """Print the table; `--json FILE` writes it with what every result is published with."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    rows: dict[str, dict[str, Any]] = {}
    for device in devices:
        rows |= measure(device, options.rounds)
    print(table.columns(cells(rows)))
    if options.json:
        results = {**facts(), "launch": rows}
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0
