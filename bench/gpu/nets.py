"""Part `nets`: inference and the training step, N=16, 512x512, bfloat16, channels_last, width 64.

Each variant has a process of its own, because compiled networks and their CUDA graphs do not fit
into one memory together; eager channels_last runs beside it in the same rounds.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from .. import ceilings, classes
from .. import table as tables
from ..network_run import Session, measure
from ..networks import INFERENCE, NHWC, TRAINING, VARIANTS, Setting, Variant, choose
from ..roofline import Ceilings
from .calls import device
from .job import OK, UNAVAILABLE, WRONG, Job, Record

BASE = "eager channels_last"
# The step that is broken down by kernel class.
PROFILED = (BASE, "torch.compile default", "fast channels_last")
# Seconds after which a compilation counts as hanging.
PATIENCE = 400.0


def setting(phase: str, dry: bool) -> Setting:
    size = (1, 32, 8) if dry else (16, 512, 64)
    return Setting(phase, "bf16", *size, device(dry))


def jobs(dry: bool) -> list[Job]:
    """One job per phase and variant, ours and the quick ones first; then the breakdowns."""
    found = []
    for phase in (TRAINING, INFERENCE):
        variants = choose(setting(phase, False)).variants
        for variant in sorted(variants, key=_cost):
            if variant.layout == NHWC:
                run = partial(network, variant.name, phase, dry)
                # Minutes of compilation, or recorded graphs: not in a dry run.
                heavy = variant.compiled or "cpu" not in variant.devices
                found.append(Job(f"{phase}: {variant.name}", run, PATIENCE, heavy, fresh=True))
    for name in PROFILED:
        run = partial(profiled, name, dry)
        heavy = name.startswith("torch.compile")
        found.append(Job(f"kernel classes: {name}", run, PATIENCE, heavy, fresh=True))
    return found


def _cost(variant: Variant) -> tuple[bool, bool, bool]:
    return "max-autotune" in variant.name, variant.compiled, not variant.ours


def known(dry: bool) -> Ceilings:
    return ceilings.measure(device(dry), torch.bfloat16, small=dry)


def by_name(name: str) -> Variant:
    return next(variant for variant in VARIANTS if variant.name == name)


def network(name: str, phase: str, dry: bool) -> Record:
    """Check and time one variant beside eager channels_last."""
    torch.backends.cudnn.benchmark = True
    variants = list(dict.fromkeys([by_name(BASE), by_name(name)]))
    rounds = 1 if dry else 15
    section = measure(setting(phase, dry), known(dry), budget=60, variants=variants, rounds=rounds)
    record: Record = {"phase": phase, "variant": name, **section}
    if name in section["missing"]:
        return {**record, "status": UNAVAILABLE, "note": section["missing"][name]}
    wrong = section["variants"][name]["wrong"]
    note = f"errors {section['variants'][name]['error']}" if wrong else ""
    return {**record, "status": WRONG if wrong else OK, "note": note}


def profiled(name: str, dry: bool) -> Record:
    """Milliseconds of one training step by kernel class."""
    session = Session(by_name(name), setting(TRAINING, dry))
    found = classes.breakdown(session.once, device(dry), runs=1 if dry else 3)
    return {"variant": name, "classes_ms": found}


def table(records: list[Record]) -> str:
    cells = [["network", "time", "over eager", "peak allocated", "reserved", "of the roofline"]]
    lines = []
    for record in records:
        if "classes_ms" in record:
            lines.append(
                f"training step of {record['variant']}, ms by kernel class: {_classes(record)}"
            )
        elif "variants" in record and record["status"] == OK:
            cells.append(_line(record))
    return "\n".join([tables.columns(cells), *lines])


def _line(record: Record) -> list[str]:
    name, base = record["variant"], record["variants"][BASE]
    row: dict[str, Any] = record["variants"][name]
    peak = row.get("peak", {})
    return [
        f"{record['phase']}: {name}",
        tables.milliseconds(row["ms"]),
        f"{base['ms']['median'] / row['ms']['median']:.2f}x",
        tables.mebibytes(peak.get("allocated")),
        tables.mebibytes(peak.get("reserved")),
        tables.roofline(row),
    ]


def _classes(record: Record) -> str:
    return ", ".join(f"{label} {ms:.2f}" for label, ms in record["classes_ms"].items())
