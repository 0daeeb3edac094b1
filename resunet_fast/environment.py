"""Every environment variable that the package reads, and every question it asks the machine.

| variable | read | meaning |
|---|---|---|
| RESUNET_FAST_ISA | at the first native call | highest instruction set: default, avx2 or avx512 |
| RESUNET_FAST_DISABLE_NATIVE | at the first use | 1: do not load the compiled library |
| RESUNET_FAST_REQUIRE_EXT | by setup.py | 1: fail instead of installing without the library |
| RESUNET_FAST_CUDA | by setup.py | 0: do not build the CUDA library |
| RESUNET_FAST_CUDA_ARCHS | by setup.py | compute capabilities, such as "80 90" |
| TRITON_INTERPRET | when Triton is imported | 1: Triton kernels are interpreted, on the CPU too |
"""

from __future__ import annotations

import os
import platform
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch


def native_disabled() -> bool:
    """Whether the user asked not to load the compiled library."""
    return os.environ.get("RESUNET_FAST_DISABLE_NATIVE", "0") == "1"


@cache  # a search through sys.path, and every selection asks
def triton_installed() -> bool:
    """Whether `import triton` would find something; it is not imported."""
    return find_spec("triton") is not None


def triton_interpreted() -> bool:
    """Whether Triton's kernels are interpreted instead of compiled (slow; for checking them)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def _cpuinfo() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def cpu_model() -> str:
    """The processor's name as the operating system gives it."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """The vector and matrix extensions that matter to convolutions, those that the CPU has."""
    known = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16")
    flags = set(_cpuinfo().get("flags", "").split())
    return [name for name in known if name in flags]


def gpu_names() -> list[str]:
    """The CUDA devices that torch can use."""
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


# Major compute capabilities whose tensor memory accelerator the kernels use. Those of 12 have one
# too, but less than half of the shared memory that the boxes take.
TENSOR_MEMORY_ACCELERATOR = (9, 10)


@cache  # several questions at every call of a convolution
def compute_capability(device: torch.device) -> tuple[int, int] | None:
    """Major and minor version of a GPU's instruction set; None for other devices."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def has_tensor_memory_accelerator(device: torch.device) -> bool:
    """Whether boxes can be fetched there, and by the interpreter on other devices than GPUs."""
    capability = compute_capability(device)
    return capability is None or capability[0] in TENSOR_MEMORY_ACCELERATOR


def machine() -> dict[str, object]:
    """Facts that every measurement is published with."""
    return {
        "cpu": cpu_model(),
        "cpu_features": cpu_features(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu_names(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
