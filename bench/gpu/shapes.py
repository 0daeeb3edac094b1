"""Part `shapes`: every convolution of the network, the bn_act family at its five levels, and what
a call costs the CPU.

Convolutions: cuDNN's fprop, dgrad, wgrad and fused convolution + bias (+ addition) + ReLU through
torch's operators, and every implementation in the registry, each on channels_last bfloat16.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial

import torch

from .. import ceilings as rates
from .. import launch
from .. import table as tables
from ..layers import layers
from ..roofline import Ceilings
from . import convolutions, elementwise
from .calls import device
from .job import Job, Record

BATCH, SIZE, WIDTH = 16, 512, 64
DTYPE = torch.bfloat16


def jobs(dry: bool) -> list[Job]:
    """Ceilings, launches, one job per convolution shape and operation, one per operator case."""
    batch, size, width = (1, 32, 16) if dry else (BATCH, SIZE, WIDTH)
    known = partial(measured, dry)
    found = [
        Job("ceilings", partial(ceilings_record, dry)),
        Job("launch", partial(launch_record, dry)),
    ]
    shapes = dict.fromkeys(
        layer.shape for layer in layers(batch, size, size, base_width=width) if layer.kernel == 3
    )
    some = list(shapes)[:2] if dry else list(shapes)
    for shape in some:
        for operation in convolutions.OPERATIONS:
            run = partial(convolutions.measure, shape, operation, known, dry)
            found.append(Job(f"conv {convolutions.label(shape)} {operation}", run, patience=120))
    for case, direction in elementwise.rows(batch, size, width, dry):
        run = partial(elementwise.measure, case, direction, known, dry)
        found.append(Job(f"{case.id} {direction}", run, patience=120))
    return found


def measured(dry: bool) -> Ceilings:
    """The ceilings, measured when they are first asked for, in the process that asks."""
    return rates.measure(device(dry), DTYPE, small=dry)


def ceilings_record(dry: bool) -> Record:
    return {"ceilings": asdict(measured(dry))}


def launch_record(dry: bool) -> Record:
    return {"launch": launch.measure(device(dry), 3 if dry else launch.ROUNDS)}


def table(records: list[Record]) -> str:
    """One line per operand shape and operation, one column per implementation."""
    names = list(dict.fromkeys(row["implementation"] for r in records for row in r.get("rows", [])))
    cells = [["what", *names]]
    for record in records:
        if "rows" in record:
            found = {row["implementation"]: row for row in record["rows"]}
            cells.append([record["job"], *(_cell(found.get(name)) for name in names)])
    head = [r["ceilings"] for r in records if "ceilings" in r]
    lines = [
        f"measured: copy {c['bytes_per_second'] / 1e12:.2f} TB/s, {c['dtype']} matrix product"
        f" {c['flops_per_second'] / 1e12:.0f} TFLOP/s"
        for c in head
    ]
    notes = sorted(
        {
            f"{row['implementation']}: {row['note']}"
            for record in records
            for row in record.get("rows", [])
            if row.get("note")
        }
    )
    calls = [tables.columns(launch.cells(r["launch"])) for r in records if "launch" in r]
    return "\n".join([*lines, tables.columns(cells), *notes, *calls])


def _cell(row: Record | None) -> str:
    if row is None:
        return ""
    if "ms" not in row:
        return str(row["status"])
    return f"{row['ms']['median']:.3f} ms {row['roofline_percent']:.0f}%"
