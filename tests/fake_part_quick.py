"""A part of `bench gpu` that is right, in two processes."""

from __future__ import annotations

from typing import Any

from bench.gpu.job import Job
from tests.fake_part import right, table

__all__ = ["jobs", "table"]


def stamp() -> dict[str, Any]:
    return right()


def jobs(dry: bool) -> list[Job]:
    return [Job("first", stamp), Job("second", stamp, fresh=True)]
