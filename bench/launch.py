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
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resunet_fast as rf
from resunet_fast import registry
from resunet_fast.functional import Conv, Norm

from .facts import facts
from .timing import Timing

CHANNELS = 8
CALLS = 200


def variants(device: str) -> list[tuple[str, str, Callable[[], Tensor]]]:
    """The same units as (operator, backend or "eager", call): what runs on the device."""
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

    found: list[tuple[str, str, Callable[[], Tensor]]] = [
        ("bn_act", "eager", lambda: (F.batch_norm(x, *running) + residual).relu()),
        ("conv_bn_act", "eager", lambda: (F.batch_norm(conv(x), *running) + residual).relu()),
    ]
    for backend in ("cuda", "triton") if device == "cuda" else ("cpu",):
        if registry.backends().get(backend) == []:
            found += [("bn_act", backend, bn_act), ("conv_bn_act", backend, conv_bn_act)]
    return found


def microseconds(call: Callable[[], object], rounds: int) -> Timing:
    """CPU time until the calls return, per call."""
    samples = []
    for number in range(rounds + 1):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        elapsed = 1e6 * (time.perf_counter() - start) / CALLS
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if number > 0:
            samples.append(elapsed)
    return Timing.of(samples)


def _both_ways(forward: Callable[[], Tensor], seed: Tensor) -> None:
    forward().backward(seed)


def measure(device: str, rounds: int) -> list[dict[str, Any]]:
    """One row per variant and mode."""
    rows = []
    for operator, backend, forward in variants(device):
        with nullcontext() if backend == "eager" else rf.use_backend(backend):
            seed = torch.ones_like(forward().detach())
            modes: dict[str, Callable[[], object]] = {
                "no grad": torch.no_grad()(forward),
                "grad": forward,
                "forward and backward": partial(_both_ways, forward, seed),
            }
            for mode, call in modes.items():
                row = {"device": device, "operator": operator, "backend": backend, "mode": mode}
                rows.append(row | microseconds(call, rounds).json())
    return rows


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=11, help="samples per row")
    parser.add_argument(
        "--json", type=Path, help="write the rows here, with date, commit, machine and versions"
    )


def main(options: argparse.Namespace) -> int:
    """Print the table; `--json FILE` writes it with what every result is published with."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    torch.set_num_threads(1)
    rows = [row for device in devices for row in measure(device, options.rounds)]
    names = ("device", "operator", "backend", "mode")
    print("".join(f"{name:22}" for name in names), f"{'us per call':>12}   p20 - p80")
    for row in rows:
        spread = f"{row['p20']:.1f} - {row['p80']:.1f}"
        print("".join(f"{row[name]:22}" for name in names), f"{row['median']:12.1f}   {spread}")
    if options.json:
        results = {**facts(), "unit": "microseconds", "rows": rows}
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0
