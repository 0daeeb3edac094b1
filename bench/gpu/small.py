"""Every operator once, small, forward and backward, on one backend: what the sanitizer looks at.

python -m bench.gpu.small BACKEND [DEVICE]
"""

from __future__ import annotations

import sys

import torch

from .calls import Call, some_cases


def main(backend: str, at: str) -> None:
    done = 0
    # Interpreted kernels are slow: without a GPU, one case of each operator.
    for case in some_cases(backend, first=at == "cpu"):
        call = Call(case, backend, torch.float32, at)
        if not call.refused:
            call()
            done += 1
    if at == "cuda":
        torch.cuda.synchronize()
    print(f"{done} cases ran on {backend}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "cuda")
