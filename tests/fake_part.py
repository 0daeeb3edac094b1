"""A part of `bench gpu` whose jobs end in every way that there is."""

from __future__ import annotations

import os
import time
from typing import Any

from bench.gpu.job import Job, UnavailableError


def right() -> dict[str, Any]:
    return {"stamp": time.time_ns()}


def wrong() -> dict[str, Any]:
    raise AssertionError("off by 0.5")


def failing() -> dict[str, Any]:
    raise ValueError("no such shape")


def unavailable() -> dict[str, Any]:
    raise UnavailableError("no such tool")


def crash() -> dict[str, Any]:
    os.abort()


def hang() -> dict[str, Any]:
    time.sleep(600)
    return {}


def jobs(dry: bool) -> list[Job]:
    return [
        Job("right", right),
        Job("wrong", wrong),
        Job("crash", crash),
        Job("failing", failing),
        Job("hang", hang, patience=0.5),
        Job("unavailable", unavailable),
        Job("on a GPU", right, needs_gpu=True),
    ]


def table(records: list[dict[str, Any]]) -> str:
    return f"{len(records) - 1} records"
