"""Where a training step's time goes, by class of kernel, from torch's profiler."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

# The first pattern that is found in a kernel's name gives its class; GPU kernels first.
CLASSES = (
    ("layout and copies", r"nchwtonhwc|nhwctonchw|transpose|memcpy|copy_|reorder|contiguous|clone"),
    ("fused batch norm (ours)", r"bn_act|resunet_fast"),
    (
        "convolution",
        r"conv|xmma|implicit_gemm|cutlass|wgrad|dgrad|fprop|sm\d+_|cudnn|mkldnn|onednn",
    ),
    ("matrix product", r"gemm|matmul|addmm|\bmm\b|bmm"),
    ("batch norm", r"batch_norm|bn_fw|bn_bw|welford"),
    ("pool", r"pool"),
    ("upsample and concatenation", r"upsample|interpolate|cat\b|catarray"),
    ("compiled, fused", r"triton_|cpp_fused"),
    ("reduction", r"reduce|sum|mean"),
    ("fill and cast", r"fill|memset|zero|cast|_to_"),
    ("elementwise", r"elementwise|relu|threshold|add|mul|vectorized"),
)
OTHER = "other"


def classify(kernel: str) -> str:
    """The class of one kernel or host operator, by its name."""
    name = kernel.lower()
    return next((label for label, pattern in CLASSES if re.search(pattern, name)), OTHER)


def breakdown(call: Callable[[], object], device: str, runs: int = 3) -> dict[str, float]:
    """Milliseconds per class in one run; kernels on a GPU, host operators' own time elsewhere."""
    call()
    gpu = torch.device(device).type == "cuda"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=kinds) as recorded:
        for _ in range(runs):
            call()
        if gpu:
            torch.cuda.synchronize()
    found: dict[str, float] = {}
    for event in recorded.key_averages():
        own = event.self_device_time_total if gpu else event.self_cpu_time_total
        # On a GPU only kernels count: host operators would repeat their kernels' time.
        if own <= 0 or (gpu and "CUDA" not in str(event.device_type)):
            continue
        label = classify(event.key)
        found[label] = found.get(label, 0.0) + own / runs / 1e3
    return dict(sorted(found.items(), key=lambda item: -item[1]))
