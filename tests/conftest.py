from __future__ import annotations

import os
import zlib

import pytest
import torch

if not torch.cuda.is_available():
    # Before Triton is imported: without a GPU its kernels are interpreted, and tested all the same.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# Of the tests that run on every backend, one in so many runs on interpreted kernels in `make test`,
# the others in `make test-full`: the interpreter takes 0.1 to 10 seconds for each.
INTERPRETED = 8


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    for item in items:
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        by_triton = any(isinstance(value, str) and value == "triton" for value in parameters)
        if by_triton and zlib.crc32(item.nodeid.encode()) % INTERPRETED:
            item.add_marker(pytest.mark.slow)
