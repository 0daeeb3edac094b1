"""`python -m bench`: run, report, compare, launch, gpu, tune."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "run": ("bench.run", "measure this machine: operators, training step, inference"),
    "report": ("bench.report", "write README's table and docs/performance.md from the results"),
    "compare": ("bench.compare", "compare two results files; exit 1 if something got slower"),
    "launch": ("bench.launch", "microseconds of the CPU per call, before a kernel does any work"),
    "gpu": ("bench.gpu.runner", "one part of the measurements on an NVIDIA GPU"),
    "tune": ("bench.tune", "write the tuning table from the measured convolutions"),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, summary) in COMMANDS.items():
        import_module(module).arguments(commands.add_parser(name, help=summary))
    options = parser.parse_args(argv)
    status: int = import_module(COMMANDS[options.command][0]).main(options)
    return status
