"""What a part consists of, and what may become of each piece."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]

OK = "OK"
WRONG = "WRONG"  # an assertion failed: a result is not what the reference says
FAILED = "FAILED"  # an exception
CRASH = "CRASH"  # the process died
HANG = "HANG"  # no answer in time
NO_TIME = "NO TIME"  # the part's deadline came first: the next call goes on here
UNAVAILABLE = "UNAVAILABLE"  # the machine has not what it takes; the note says what
NEEDS_GPU = "NEEDS GPU"  # only collected, in a dry run
BAD = (WRONG, FAILED, CRASH, HANG)


def failed(error: Exception) -> Record:
    """What becomes of an exception: its message, and a status with which the part exits with 1."""
    return {"status": FAILED, "note": f"{type(error).__name__}: {str(error).strip()}"[:600]}


class UnavailableError(Exception):
    """The machine has not what a job needs; the message says what."""


@dataclass(frozen=True)
class Job:
    """One piece of a part.

    Args:
        name: unique within the part; by it a part cut short is resumed.
        run: does it and returns what to record; raises AssertionError for a wrong result,
            :class:`UnavailableError` where the machine lacks something.
        patience: seconds after which it counts as hanging.
        needs_gpu: in a dry run it is collected and not run.
        fresh: it gets a process of its own.
    """

    name: str
    run: Callable[[], Record]
    patience: float = 90.0
    needs_gpu: bool = False
    fresh: bool = False
