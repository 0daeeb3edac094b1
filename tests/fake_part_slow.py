"""A part of `bench gpu` whose second job outlasts any deadline."""

from __future__ import annotations

from bench.gpu.job import Job
from tests.fake_part import hang, right, table

__all__ = ["jobs", "table"]


def jobs(dry: bool) -> list[Job]:
    return [Job("first", right), Job("second", hang, patience=500), Job("third", right)]
