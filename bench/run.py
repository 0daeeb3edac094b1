"""`python -m bench run`: operators, training step and inference of this machine, in one file.

Every peer that is installed takes part, every other is named with the reason. The file is what
`report`, `compare` and the documentation are made from.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from . import ceilings, classes, launch, peers, table
from .facts import facts, sentence
from .network_run import Session, measure
from .networks import INFERENCE, TRAINING, VARIANTS, Setting
from .roofline import Ceilings, Work, share
from .timing import Timing

RESULTS = Path("bench/results")
SECTIONS = ("operators", "launch", TRAINING, INFERENCE)
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Batch, side and width of the two networks, and the seconds for the timed rounds of one precision.
SIZES: dict[tuple[str, str], tuple[int, int, int]] = {
    ("cpu", TRAINING): (2, 128, 64),
    ("cpu", INFERENCE): (1, 256, 64),
    # All variants are in memory together here; `bench gpu nets` measures at N=16, one by one.
    ("cuda", TRAINING): (4, 512, 64),
    ("cuda", INFERENCE): (4, 512, 64),
}
BUDGET = {("cpu", TRAINING): 28.0, ("cpu", INFERENCE): 12.0}


def measured_ceilings(device: str, small: bool = False) -> dict[str, Ceilings]:
    return {p: ceilings.measure(device, dtype, small=small) for p, dtype in PRECISIONS.items()}


def import_seconds(runs: int = 3) -> dict[str, float]:
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


def operator_rows(known: dict[str, Ceilings], select: str = "") -> dict[str, dict[str, Any]]:
    """Run bench/test_operators.py under pytest-benchmark and put its rows on the roofline."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "operators.json"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "bench/test_operators.py",
            "-o",
            "addopts=",
            "-q",
        ]
        command += ["-p", "no:cacheprovider", "-rfs", "--benchmark-quiet"]
        command += [f"--benchmark-json={out}", *(["-k", select] if select else [])]
        done = subprocess.run(command, env=environment, check=False)
        # 1: some test failed, that is, some row is WRONG and has been printed as such.
        if done.returncode not in (0, 1) or not out.stat().st_size:
            raise RuntimeError(f"pytest ended with {done.returncode}: {' '.join(command)}")
        benchmarks = json.loads(out.read_text(encoding="utf-8"))["benchmarks"]
    return {b["name"].split("[")[1].rstrip("]"): _operator_row(b, known) for b in benchmarks}


def _operator_row(benchmark: dict[str, Any], known: dict[str, Ceilings]) -> dict[str, Any]:
    info = benchmark["extra_info"]
    timing = Timing.of([1e3 * seconds for seconds in benchmark["stats"]["data"]])
    precision = "fp32" if info["dtype"] == "float32" else "bf16"
    work = Work(info.pop("flops"), info.pop("bytes"))
    return {**info, "ms": timing.json(), **share(work, known[precision], timing.median)}


def network_sections(
    phase: str, known: dict[str, Ceilings], options: argparse.Namespace
) -> dict[str, Any]:
    device = options.device
    found = {}
    for precision in options.precisions:
        setting = Setting(phase, precision, *SIZES[device, phase], device)
        found[precision] = measure(
            setting,
            known[precision],
            budget=BUDGET.get((device, phase), 15.0) * options.budget,
            compile=not options.no_compile,
            rounds=options.rounds,
        )
    return found


def class_breakdown(device: str) -> dict[str, dict[str, float]]:
    """Milliseconds of one training step in bfloat16 by kernel class, eager's and ours."""
    setting = Setting(TRAINING, "bf16", *SIZES[device, TRAINING], device)
    some = [v for v in VARIANTS if v.name in ("eager channels_last", "fast channels_last")]
    return {v.name: classes.breakdown(Session(v, setting).once, device) for v in some}


def text(results: dict[str, Any]) -> str:
    """The readable tables."""
    parts = []
    if results.get("operators"):
        parts.append("operators\n" + operator_table(results["operators"]))
    if results.get("launch"):
        parts.append("what a call costs\n" + table.columns(launch.cells(results["launch"])))
    for phase in (TRAINING, INFERENCE):
        for section in results.get(phase, {}).values():
            title = str(Setting(**section["setting"]))
            parts.append(f"{title}\n{network_table(section)}")
    known = results["ceilings"]
    rates = [
        f"{p}: copy {c['bytes_per_second'] / 1e9:,.1f} GB/s, matrix product"
        f" {c['flops_per_second'] / 1e9:,.0f} GFLOP/s"
        for p, c in known.items()
    ]
    parts.append("ceilings, measured\n  " + "\n  ".join(rates))
    parts.append(
        "\n".join(f"{name}: not measured: {why}" for name, why in peers.NOT_MEASURED.items())
    )
    return "\n\n".join([*parts, sentence(results)])


def operator_table(rows: dict[str, dict[str, Any]]) -> str:
    cells = [["  operator", "time", "of the roofline"]]
    cells += [[f"  {n}", table.milliseconds(r["ms"]), table.roofline(r)] for n, r in rows.items()]
    return table.columns(cells)


def network_table(section: dict[str, Any]) -> str:
    cells = [["  variant", "time", "keeps", "of the roofline", "to build", "first call"]]
    notes = []
    for name, row in section["variants"].items():
        if row["wrong"]:
            notes.append(f"  WRONG, not timed: {name}: errors {row['error']}")
            continue
        seconds = [f"{row[key]:.2f} s" for key in ("build_seconds", "first_call_seconds")]
        kept = table.mebibytes(row["kept_for_backward_bytes"])
        median = table.milliseconds(row["ms"])
        cells.append([f"  {name}", median, kept, table.roofline(row), *seconds])
        if row["note"]:
            notes.append(f"  {name}: {row['note']}")
    notes += [f"  missing: {name}: {why}" for name, why in section["missing"].items()]
    for ours, ratios in section["ratios"].items():
        notes += [f"  {ours} over {peer}: {table.times(r)}" for peer, r in ratios.items()]
    return "\n".join([table.columns(cells), *notes])


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None)
    parser.add_argument("--threads", type=int, default=2, help="of the CPU (default: 2)")
    parser.add_argument(
        "--rounds", type=int, help="timed rounds, instead of what the budget allows"
    )
    parser.add_argument("--budget", type=float, default=1.0, help="times the usual seconds")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--select", default="", help="operators, in pytest's -k language")
    parser.add_argument("--out", type=Path, help="default: bench/results/<device>.json")


def sections(known: dict[str, Ceilings], options: argparse.Namespace) -> dict[str, Any]:
    """What was asked for, and the seconds that each part took."""
    parts: dict[str, Callable[[], Any]] = {
        "operators": lambda: operator_rows(known, options.select),
        "launch": lambda: launch.measure(options.device, options.rounds or launch.ROUNDS),
        TRAINING: lambda: network_sections(TRAINING, known, options),
        INFERENCE: lambda: network_sections(INFERENCE, known, options),
    }
    wanted = {name: part for name, part in parts.items() if name in options.only}
    if TRAINING in wanted and "bf16" in options.precisions:
        wanted["classes_ms"] = lambda: class_breakdown(options.device)
    results: dict[str, Any] = {"seconds": {}}
    for name, part in wanted.items():
        start = time.perf_counter()
        results[name] = part()
        results["seconds"][name] = round(time.perf_counter() - start, 1)
    return results


def main(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    known = measured_ceilings(options.device)
    results: dict[str, Any] = {
        **facts(),
        "ceilings": {precision: asdict(each) for precision, each in known.items()},
        "import_seconds": import_seconds(),
    }
    # First calls are timed: what an earlier run has compiled must not be found.
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as fresh,
        patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=fresh),
    ):
        results.update(sections(known, options))
    out = options.out or RESULTS / f"{options.device}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"\n{text(results)}\nimport beyond torch: {results['import_seconds']}")
    print(f"seconds per part: {results['seconds']}\nwritten to {out}")
    return 0
