"""One image through the frozen model and through what users would run otherwise.

python -m bench.inference [--rounds 15] [--no-compile] [--out bench/results/inference_cpu.json]
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import resunet_fast as rf
from resunet_fast import environment, native
from resunet_fast.frozen.errors import relative_error

from .timing import Timing, interleaved, ratio
from .training import commit

SIZE, WIDTH = 256, 64
NHWC = torch.channels_last
# A variant is timed only if it is right: float32 within this of float64 (relative error of the
# norm), bfloat16 within twice the error of eager autocast.
EXACT = 1e-5
Network = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Variant:
    """A way to run the network: its precision, and how it is made from the plain model."""

    name: str
    precision: str
    make: Callable[[nn.Module], Network]
    needs: str = ""  # a package that may be missing
    compiled: bool = False


def plain() -> nn.Module:
    """Return the same plain network every time, with batch norms that do something."""
    torch.manual_seed(0)
    model = rf.reference.ResUNet(3, 2, base_width=WIDTH)
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def image() -> Tensor:
    return torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))


def eager_nchw(model: nn.Module) -> Network:
    return model


def eager_nhwc(model: nn.Module) -> Network:
    network = model.to(memory_format=NHWC)
    return lambda x: network(x.contiguous(memory_format=NHWC))


def autocast(network: Network) -> Network:
    def run(x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return network(x)

    return run


def eager_autocast(model: nn.Module) -> Network:
    return autocast(eager_nhwc(model))


def compiled(model: nn.Module) -> Network:
    return torch.compile(model.to(memory_format=NHWC), options={"freezing": True})


def compiled_autocast(model: nn.Module) -> Network:
    return autocast(compiled(model))


def onnx_runtime(model: nn.Module) -> Network:
    import onnxruntime

    program = torch.onnx.export(model, (image(),), dynamo=True, verbose=False)
    assert program is not None
    buffer = io.BytesIO(program.model_proto.SerializeToString())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        buffer.getvalue(), options, providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def frozen(model: nn.Module) -> Network:
    return rf.freeze(model)


def frozen_bf16(model: nn.Module) -> Network:
    return rf.freeze(model, torch.bfloat16)


VARIANTS = (
    Variant("eager NCHW", "fp32", eager_nchw),
    Variant("eager channels_last", "fp32", eager_nhwc),
    Variant("torch.compile, freezing", "fp32", compiled, compiled=True),
    Variant("ONNX Runtime", "fp32", onnx_runtime, needs="onnxruntime"),
    Variant("freeze", "fp32", frozen),
    Variant("eager autocast channels_last", "bf16", eager_autocast),
    Variant("torch.compile, freezing, autocast", "bf16", compiled_autocast, compiled=True),
    Variant("freeze bf16", "bf16", frozen_bf16),
)
# (ours, peer): what each ratio in the report is.
PAIRS = (
    ("freeze", "eager NCHW"),
    ("freeze", "eager channels_last"),
    ("freeze", "torch.compile, freezing"),
    ("freeze", "ONNX Runtime"),
    ("freeze bf16", "eager autocast channels_last"),
    ("freeze bf16", "torch.compile, freezing, autocast"),
)


def first_calls() -> dict[str, dict[str, float]]:
    """Seconds for freezing and for the first call, before anything else has warmed up."""
    seconds = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model, x = plain(), image()
        start = time.perf_counter()
        network = rf.freeze(model, dtype)
        middle = time.perf_counter()
        network(x)
        seconds[name] = {"freeze": middle - start, "first_call": time.perf_counter() - middle}
    return seconds


def missing(variant: Variant, with_compiled: bool) -> str:
    """Why a variant is left out (empty: it is not)."""
    if variant.compiled and not with_compiled:
        return "--no-compile"
    if variant.needs and find_spec(variant.needs) is None:
        return f"{variant.needs} is not installed"
    return ""


def measure(rounds: int, with_compiled: bool) -> dict[str, object]:
    """Check, then time every variant."""
    x = image()
    with torch.no_grad():
        judge = plain().double()(x.double())
    rows: dict[str, dict[str, Any]] = {}
    networks: dict[str, Network] = {}
    for variant in VARIANTS:
        row = rows[variant.name] = {"precision": variant.precision}
        if reason := missing(variant, with_compiled):
            row["missing"] = reason
            continue
        networks[variant.name] = network = _without_grad(variant.make(plain()))
        start = time.perf_counter()
        row["error"] = relative_error(network(x), judge)
        row["first_call_s"] = time.perf_counter() - start
    allowed = {"fp32": EXACT, "bf16": 2 * rows["eager autocast channels_last"]["error"]}
    for row in rows.values():
        row["wrong"] = "error" in row and not row["error"] <= allowed[row["precision"]]
    timed = {
        name: lambda run=run: run(x) for name, run in networks.items() if not rows[name]["wrong"]
    }
    with tqdm(total=(rounds + 2) * len(timed), desc="inference", unit="call") as bar:
        samples = interleaved(timed, rounds, progress=bar.update)
    for name, times in samples.items():
        rows[name]["ms"] = Timing.of(times).json()
    ratios = {
        f"{ours} / {peer}": ratio(samples[peer], samples[ours]).json()
        for ours, peer in PAIRS
        if ours in samples and peer in samples
    }
    return {"variants": rows, "ratios": ratios}


def _without_grad(network: Network) -> Network:
    return torch.no_grad()(lambda x: network(x))


def versions() -> dict[str, str]:
    """Of the peers that are installed."""
    from importlib.metadata import version

    packages = ("torch", "onnxruntime", "onnx", "onnxscript")
    return {name: version(name) for name in packages if find_spec(name) is not None}


def report(results: dict[str, Any]) -> str:
    """The readable table."""
    lines = [
        f"inference, 1x3x{SIZE}x{SIZE}, width {WIDTH}, {results['machine']['threads']} threads"
    ]
    for name, row in results["variants"].items():
        if "missing" in row:
            lines.append(f"  {name:36s} left out: {row['missing']}")
        elif row["wrong"]:
            lines.append(f"  {name:36s} WRONG: error {row['error']:.2e}")
        else:
            t = row["ms"]
            spread = f"[{t['p20']:.0f}, {t['p80']:.0f}]"
            lines.append(
                f"  {name:36s} {row['precision']} {t['median']:7.0f} ms {spread:14s}"
                f" error {row['error']:.1e}, first call {row['first_call_s']:.2f} s"
            )
    for name, r in results["ratios"].items():
        lines.append(f"  {name:56s} {r['median']:.3f}x [{r['p20']:.3f}, {r['p80']:.3f}]")
    for name, s in results["first_calls_s"].items():
        lines.append(
            f"  {name}: freeze() takes {s['freeze']:.2f} s, the first call {s['first_call']:.2f} s"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.inference", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", type=Path, default=Path("bench/results/inference_cpu.json"))
    options = parser.parse_args(argv)
    torch.set_num_threads(2)
    results: dict[str, Any] = {
        "what": "inference, one image",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": environment.machine(),
        "versions": versions(),
        "native_isa": None if native.unavailable() else native.ops().cpu_isa(),
        "first_calls_s": first_calls(),
        **measure(options.rounds, not options.no_compile),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(report(results))
    print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
