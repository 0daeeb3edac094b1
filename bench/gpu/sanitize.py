"""Part `sanitize`: compute-sanitizer's four tools over every operator of our own kernels."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

from .. import table as tables
from .calls import candidates, device
from .job import Job, Record, UnavailableError

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
ERRORS = 86  # the exit status that is asked for where the tool finds something
# What each tool calls a finding, in its own words.
FINDINGS = ("Invalid __", "Race reported", "hazard detected", "Uninitialized", "Barrier error")
SECONDS = 200


def jobs(dry: bool) -> list[Job]:
    """One job per tool and backend with kernels of ours."""
    found = []
    for backend, reasons in candidates(dry).items():
        if backend == "cudnn":  # its kernels are not ours
            continue
        for tool in TOOLS:
            run = partial(sanitize, tool, backend, dry, reasons)
            found.append(Job(f"{tool}: {backend}", run, patience=2 * SECONDS + 20))
    return found


def find() -> str | None:
    """Where compute-sanitizer is, if anywhere."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "compute-sanitizer"
    return shutil.which("compute-sanitizer") or (str(home) if home.exists() else None)


def sanitize(tool: str, backend: str, dry: bool, reasons: list[str]) -> Record:
    if reasons:
        raise UnavailableError("; ".join(reasons))
    program = [sys.executable, "-m", "bench.gpu.small", backend, device(dry)]
    executable = find()
    if tool == TOOLS[0] or not dry:
        # The program itself must run; then its kernels are compiled when the tool looks at them.
        subprocess.run(program, check=True, timeout=SECONDS, capture_output=True)
    if dry or executable is None:
        raise UnavailableError("dry run" if dry else "compute-sanitizer was not found")
    command = [executable, "--tool", tool, "--error-exitcode", str(ERRORS)]
    # Each tensor in memory of its own: in the allocator's pool an overrun hits a neighbour.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            [*command, *program], env=environment, capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"not finished within {SECONDS} s") from None
    return verdict(done.returncode, done.stdout + done.stderr)


def verdict(status: int, output: str) -> Record:
    """Clean, wrong, or a tool that does not work on this machine, with its message.

    Raises:
        AssertionError: the tool found something.
        UnavailableError: the tool does not run here.
    """
    lines = [line for line in output.splitlines() if line.startswith("=========")]
    message = " ".join(line.strip("= ") for line in lines if line.strip("= "))[-500:]
    ran = "cases ran on" in output
    found = any(word in output for word in FINDINGS)
    assert not found, message
    assert not ran or status != ERRORS, message
    if not ran:
        raise UnavailableError(message or output.strip()[-500:] or f"exit {status}")
    return {"note": message or "clean"}


def table(records: list[Record]) -> str:
    cells = [["tool", "status", "what it says"]]
    cells += [[r["job"], r["status"], str(r.get("note", ""))[:90]] for r in records[1:]]
    return tables.columns(cells)
