"""Runs some jobs of one part, by name: `python -m bench.gpu.child MODULE dry|real NAME...`.

Each line that begins with @ is a record for the parent: {"begin": name}, then the job's own.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib import import_module

import torch

from .job import FAILED, NEEDS_GPU, OK, UNAVAILABLE, WRONG, Job, Record, UnavailableError, failed

# Exit status with which the parent goes on in a new process, behind the last record.
LOST_CONTEXT = 3


def emit(record: Record) -> None:
    print("@" + json.dumps(record), flush=True)


def attempt(job: Job, dry: bool) -> Record:
    """Run one job; whatever it raises becomes its record."""
    start = time.perf_counter()
    record: Record = {"job": job.name, "status": OK}
    try:
        if dry and job.needs_gpu:
            record["status"] = NEEDS_GPU
        else:
            record.update(job.run())
    except UnavailableError as error:
        record.update(status=UNAVAILABLE, note=str(error))
    except AssertionError as error:
        record.update(status=WRONG, note=str(error)[:600])
    except Exception as error:  # of one job: the others of the part still run
        record.update(failed(error))
    record["seconds"] = round(time.perf_counter() - start, 3)
    return record


def main(module: str, dry: bool, names: list[str]) -> None:
    jobs: dict[str, Job] = {job.name: job for job in import_module(module).jobs(dry)}
    for name in names:
        emit({"begin": name})
        record = attempt(jobs[name], dry)
        emit(record)
        if record["status"] in (WRONG, FAILED) and torch.cuda.is_initialized():
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                os._exit(LOST_CONTEXT)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "dry", sys.argv[3:])
