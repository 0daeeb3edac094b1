"""Builds the CUDA kernels for the CPU: the sources as they are, but for the two that call CUDA.

`tests/cuda/launch.cuh` runs the threads of a block as coroutines and `tests/cuda/device.h` has no
stream; everything else, the operators with their checks and the kernels with their index
arithmetic, barriers and reductions, is compiled from `csrc` into the private operators
`resunet_fast_emulated::*`.
"""

from __future__ import annotations

import fcntl
import runpy
import shutil
import subprocess
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from resunet_fast import native

ROOT = Path(__file__).resolve().parents[1]


def setup_script() -> dict[str, Any]:
    """The names that setup.py defines, without running setup()."""
    with mock.patch("setuptools.setup"):
        return runpy.run_path(str(ROOT / "setup.py"))


def load(temporary: pytest.TempPathFactory) -> Any:
    """Load the emulated library's operators; its calls (native.calls_of). Built once per run."""
    base = temporary.getbasetemp()
    built = library(base.parent if base.name.startswith("popen-") else base)  # xdist's workers
    torch.ops.load_library(str(built))
    return native.calls_of(built, "_CUDA")


def library(directory: Path) -> Path:
    """The emulated library in a directory that other processes may share; built once."""
    with (directory / "emulated.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        output = directory / "emulated.so"
        if not output.exists():
            _build(directory / "emulated", output)
    return output


def _build(sources: Path, output: Path) -> None:
    shutil.copytree(ROOT / "csrc", sources)
    shutil.copy(ROOT / "tests/cuda/device.h", sources / "cuda")
    shutil.copy(ROOT / "tests/cuda/launch.cuh", sources / "cuda/kernels")
    shutil.rmtree(sources / "cpu")
    for path in sources.rglob("*.cpp"):
        text = path.read_text().replace("resunet_fast_native, CUDA", "resunet_fast_emulated, CPU")
        path.write_text(text.replace("resunet_fast_native", "resunet_fast_emulated"))
    rules = sources / "build.ninja"
    rules.write_text(_rules(sources, output))
    ninja = setup_script()["find_ninja"]()
    done = subprocess.run([ninja, "-f", str(rules)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def _rules(sources: Path, output: Path) -> str:
    script = setup_script()
    cxx, _ = script["find_compiler"]()
    torch, _ = script["find_torch"]()
    flags = " ".join([*script["FLAGS"], "-O1", *script["DEFINES"], *script["_includes"](torch)])
    libraries = " ".join(script["_libraries"](torch))
    objects = {
        path.with_suffix(path.suffix + ".o"): path
        for path in (*sources.rglob("*.cpp"), *sources.rglob("*.cu"))
    }
    lines = [
        f"builddir = {sources}",
        f"rule compile\n  command = {cxx} {flags} -Wno-unknown-pragmas -x c++ -c $in -o $out",
        f"rule link\n  command = {cxx} -shared -Wl,--no-as-needed $in {libraries} -o $out",
        *(f"build {target}: compile {source}" for target, source in objects.items()),
        f"build {output}: link {' '.join(map(str, objects))}",
    ]
    return "\n".join(lines) + "\n"
