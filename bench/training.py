"""One training step (forward and backward, no optimiser) of the fast model against its peers.

python -m bench [--rounds 15] [--no-compile] [--out bench/results/training_cpu.json]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import resunet_fast as rf
from resunet_fast import environment, native
from resunet_fast.testing.memory import kept_bytes

from .timing import Timing, interleaved, ratio

BATCH, SIZE, WIDTH = 2, 128, 64
PRECISIONS = ("fp32", "bf16")
# A variant is timed only if its logits and gradients are at most this many times further from
# float64 than the worst eager variant in the same precision. (At random weights ReLU masks that
# flip near zero dominate the gradient's error, eager's too; tests/ holds operators to far tighter
# bounds.)
ALLOWED = 2.0


@dataclass(frozen=True)
class Variant:
    """A way to run the step: which model, its weights' layout, and the comparison it stands in."""

    name: str
    make: Callable[[], nn.Module]
    layout: torch.memory_format
    compiled: bool = False


def plain() -> nn.Module:
    return rf.reference.ResUNet(3, 2, base_width=WIDTH)


def fast() -> nn.Module:
    return rf.ResUNet(3, 2, base_width=WIDTH)


def fast_recompute() -> nn.Module:
    return rf.ResUNet(3, 2, base_width=WIDTH, recompute=True)


NCHW, NHWC = torch.contiguous_format, torch.channels_last
VARIANTS = (
    Variant("eager NCHW", plain, NCHW),
    Variant("eager channels_last", plain, NHWC),
    Variant("torch.compile channels_last", plain, NHWC, compiled=True),
    Variant("fast NCHW", fast, NCHW),
    Variant("fast channels_last", fast, NHWC),
    Variant("fast channels_last, recompute", fast_recompute, NHWC),
)
# (ours, peer): what each ratio in the report is.
PAIRS = (
    ("fast NCHW", "eager NCHW"),
    ("fast channels_last", "eager channels_last"),
    ("fast channels_last, recompute", "eager channels_last"),
    ("fast channels_last", "torch.compile channels_last"),
)


class Step:
    """One variant's model, input and training step."""

    def __init__(self, variant: Variant, precision: str) -> None:
        torch.manual_seed(0)
        self.model = variant.make()
        if variant.layout == NHWC:
            self.model.to(memory_format=NHWC)
        self.network = torch.compile(self.model) if variant.compiled else self.model
        image = torch.randn(BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
        self.image = image.contiguous(memory_format=variant.layout)
        self.autocast = precision == "bf16"
        self.target = torch.rand(BATCH, 2, SIZE, SIZE, generator=torch.Generator().manual_seed(2))

    def loss(self) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            logits: Tensor = self.network(self.image)
        return (logits * self.target).mean()

    def __call__(self) -> None:
        self.model.zero_grad(set_to_none=True)
        self.loss().backward()

    def results(self) -> dict[str, Tensor]:
        """Logits and all gradients of one step, in float64."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            logits = self.network(self.image)
        self()
        grads = [p.grad.flatten() for p in self.model.parameters() if p.grad is not None]
        return {"logits": logits.detach().double(), "gradient": torch.cat(grads).double()}


def float64_results() -> dict[str, Tensor]:
    step = Step(VARIANTS[0], "fp32")
    step.model.double()
    step.image = step.image.double()
    return step.results()


def measure(
    precision: str, judge: dict[str, Tensor], rounds: int, compiled: bool
) -> dict[str, object]:
    """Check, then time every variant in one precision."""
    steps = {v.name: Step(v, precision) for v in VARIANTS if compiled or not v.compiled}
    rows: dict[str, dict[str, Any]] = {}
    for name, step in steps.items():
        results = step.results()
        errors = {k: float((results[k] - judge[k]).norm() / judge[k].norm()) for k in judge}
        kept = None if name.startswith("torch") else kept_bytes(step.loss, step.model)
        rows[name] = {"error": errors, "kept_for_backward_bytes": kept}
    for kind in judge:
        worst = max(row["error"][kind] for name, row in rows.items() if name.startswith("eager"))
        for row in rows.values():
            row["wrong"] = row.get("wrong", False) or row["error"][kind] > ALLOWED * worst
    right = {name: step for name, step in steps.items() if not rows[name]["wrong"]}
    with tqdm(total=(rounds + 2) * len(right), desc=precision, unit="step") as bar:
        samples = interleaved(dict(right), rounds, progress=bar.update)
    for name, times in samples.items():
        rows[name]["ms"] = Timing.of(times).json()
    ratios = {
        f"{ours} / {peer}": ratio(samples[peer], samples[ours]).json()
        for ours, peer in PAIRS
        if ours in samples and peer in samples
    }
    return {"variants": rows, "ratios": ratios}


def import_seconds(runs: int = 5) -> dict[str, float]:
    """Median seconds for `import torch`, and for the package beyond it."""
    code = (
        "import time; a = time.perf_counter(); import torch; b = time.perf_counter();"
        " import resunet_fast; print(b - a, time.perf_counter() - b)"
    )
    lines = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(runs)
    ]
    pairs = sorted(tuple(map(float, line.stdout.split())) for line in lines)
    ours = sorted(pair[1] for pair in pairs)
    return {"torch": pairs[runs // 2][0], "resunet_fast": ours[runs // 2]}


def commit() -> str:
    git = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    run = subprocess.run(git, capture_output=True, text=True, check=False)
    return run.stdout.strip() or "unknown"


def report(results: dict[str, object]) -> str:
    """The readable table."""
    lines: list[str] = []
    for precision in PRECISIONS:
        part = results[precision]
        assert isinstance(part, dict)
        lines.append(f"\n{precision}: forward and backward, {BATCH}x3x{SIZE}x{SIZE}, width {WIDTH}")
        for name, row in part["variants"].items():
            if row["wrong"]:
                lines.append(f"  {name:32s} WRONG: errors {row['error']}")
                continue
            t, kept = row["ms"], row["kept_for_backward_bytes"]
            memory = f"keeps {kept / 2**20:6.1f} MiB" if kept else ""
            spread = f"[{t['p20']:.0f}, {t['p80']:.0f}]"
            lines.append(f"  {name:32s} {t['median']:7.0f} ms {spread:14s} {memory}")
        for name, r in part["ratios"].items():
            lines.append(f"  {name:64s} {r['median']:.3f}x [{r['p20']:.3f}, {r['p80']:.3f}]")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", type=Path, default=Path("bench/results/training_cpu.json"))
    options = parser.parse_args(argv)
    torch.set_num_threads(2)
    results: dict[str, object] = {
        "what": "training step, forward and backward, no optimiser",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": environment.machine(),
        "native_isa": None if native.unavailable() else native.ops().cpu_isa(),
        "import_seconds": import_seconds(),
    }
    judge = float64_results()
    for precision in PRECISIONS:
        results[precision] = measure(precision, judge, options.rounds, not options.no_compile)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(report(results))
    print(f"\nimport beyond torch: {results['import_seconds']}\nwritten to {options.out}")
    return 0
