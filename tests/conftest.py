from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Before Triton is imported: without a GPU its kernels are interpreted, and tested all the same.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
