"""What nvcc makes of the CUDA kernels: registers, spills, shared memory, machine code.

`python tests/cuda_code.py` writes tests/cuda/ptxas.json again, for the nvcc at hand.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import emulation

TABLE = Path(__file__).parent / "cuda/ptxas.json"
SOURCES = sorted((emulation.ROOT / "csrc/cuda/kernels").glob("*.cu"))
ARCHITECTURES = ("80", "90", "100")


@dataclass(frozen=True)
class Usage:
    """What ptxas reports of one kernel; bytes but for the registers."""

    registers: int
    spills: int
    shared: int

    @staticmethod
    def of(report: str) -> Usage:
        def number(pattern: str) -> int:
            found = re.search(pattern, report)
            return int(found.group(1)) if found else 0

        spills = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
        return Usage(number(r"Used (\d+) registers"), spills, number(r"(\d+) bytes smem"))


def nvcc() -> Any:
    return emulation.setup_script()["find_nvcc"]()


def readable(text: str) -> str:
    """Kernel names as in the source: `bn_stats_kernel<float, 4>` in place of mangled symbols."""
    demangled = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True)
    name = r"(?:void )?rf::cuda::\(anonymous namespace\)::(\w+(?:<[^>]*>)?)\(rf::cuda::\w+\)"
    return re.sub(name, r"\1", demangled.stdout).replace("rf::", "")


def compile_for(source: Path, architecture: str, directory: Path) -> tuple[Path, dict[str, Usage]]:
    """The machine code of one source, and what each of its kernels uses."""
    output = directory / f"{source.stem}.{architecture}.cubin"
    script = emulation.setup_script()
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    command = [nvcc().command, *script["NVCC_FLAGS"], target, "-Xptxas=-v", "-cubin"]
    done = subprocess.run(
        [*command, str(source), "-o", str(output)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in (done.stdout + done.stderr).lower(), done.stderr
    reports = re.split(r"Compiling entry function '", readable(done.stdout + done.stderr))[1:]
    return output, {report.split("'")[0]: Usage.of(report) for report in reports}


def disassembler() -> str | None:
    """nvdisasm of the toolkit, or the one that Triton brings along."""
    found = shutil.which("nvdisasm", path=str(Path(nvcc().command).parent))
    if found:
        return found
    try:
        import triton
    except ImportError:
        return None
    return shutil.which("nvdisasm", path=str(Path(triton.__file__).parent / "backends/nvidia/bin"))


def instructions(cubin: Path, nvdisasm: str) -> dict[str, list[str]]:
    """The instructions of every kernel, with their modifiers, such as LDG.E.128."""
    done = subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True, check=True)
    found: dict[str, list[str]] = defaultdict(list)
    kernel = ""
    for line in done.stdout.splitlines():
        if line.startswith(".text."):
            kernel = line.removeprefix(".text.").rstrip(":")
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]+)", line):
            found[kernel].append(match.group(1))
    names = readable("\n".join(found)).splitlines()
    return dict(zip(names, found.values(), strict=True))


def main() -> None:
    table: dict[str, Any] = {"nvcc": nvcc().version, "kernels": {}}
    with tempfile.TemporaryDirectory() as directory:
        for source in SOURCES:
            for architecture in ARCHITECTURES:
                for name, usage in compile_for(source, architecture, Path(directory))[1].items():
                    row = [usage.registers, usage.spills, usage.shared]
                    table["kernels"].setdefault(name, {})[architecture] = row
    rows = (f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in table["kernels"].items())
    body = ",\n".join(sorted(rows))
    text = f'{{\n  "nvcc": "{table["nvcc"]}",\n  "kernels": {{\n{body}\n  }}\n}}\n'
    TABLE.write_text(text)


if __name__ == "__main__":
    main()
