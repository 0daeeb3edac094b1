"""What every result is published with: date, commit, machine, versions."""

from __future__ import annotations

import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from resunet_fast import environment, native

PACKAGES = ("torch", "triton", "onnxruntime", "openvino", "nvidia-cudnn-frontend", "numpy")


def commit() -> str:
    """The commit that is checked out, with `-dirty` where files differ from it."""
    git = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        run = subprocess.run(git, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return run.stdout.strip() or "unknown"


def versions() -> dict[str, str | None]:
    """Versions of the packages that a result depends on; None: not installed."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    found["cuda"] = torch.version.cuda
    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    found["cudnn"] = None if cudnn is None else str(cudnn)
    return found


def facts() -> dict[str, Any]:
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": environment.machine(),
        "versions": versions(),
        "native_isa": None if native.unavailable() else str(native.ops().cpu_isa()),
    }


def sentence(known: dict[str, Any]) -> str:
    """One line for humans: machine, versions, date, commit."""
    machine = known["machine"]
    packages = ", ".join(f"{name} {v}" for name, v in known["versions"].items() if v)
    if machine["gpu"]:
        what = machine["gpu"][0]
    else:
        features = ", ".join(machine["cpu_features"])
        amx = "" if "amx_tile" in machine["cpu_features"] else "; no AMX"
        what = f"{machine['cpu']} ({features}{amx}), {machine['threads']} threads"
    date = str(known["date"])[:10]
    return f"{what}, Python {machine['python']}, {packages}, {date}, commit {known['commit']}"
