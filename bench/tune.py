"""`python -m bench tune`: the committed tuning table from the measured convolutions.

Reads the records of `make gpu PART=shapes` and writes `resunet_fast/tuning/<architecture>.json` in
the format that resunet_fast/tuning/table.py documents.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .gpu.job import OK, Record

# The registry's names; everything else that was measured is a peer.
IMPLEMENTATIONS = ("cudnn", "cuda", "triton")
FORWARD = {"fprop": ("conv2d", "conv_bn_act", "bn_act_conv"), "add_relu": ("conv_bias_act",)}


def best(rows: list[Record]) -> tuple[dict[str, float], dict[str, Any] | None]:
    """Microseconds per implementation, Triton's with its fastest tiles, and those tiles."""
    found: dict[str, float] = {}
    config = None
    for row in rows:
        name = str(row["implementation"]).split(" ")[0]
        if row["status"] != OK or name not in IMPLEMENTATIONS:
            continue
        time = 1e3 * row["ms"]["median"]
        if time < found.get(name, float("inf")):
            found[name] = time
            if name == "triton":
                config = row.get("config")  # None: the heuristic's own
    return {name: round(time, 1) for name, time in found.items()}, config


def line(
    operator: str, record: Record, microseconds: dict[str, float], config: dict[str, Any] | None
) -> dict[str, Any]:
    channels, filters = record["channels"], record["filters"]
    if operator == "conv2d_backward":  # named after its data gradient
        channels, filters = filters, channels
    return {
        "operator": operator,
        "channels": channels,
        "filters": filters,
        "kernel": [record["kernel"]] * 2,
        "stride": [1, 1],
        "positions": record["images"] * record["height"] * record["width"],
        "dtype": record["dtype"],
        "microseconds": microseconds,
        "config": config,
    }


def measurements(records: list[Record]) -> Iterator[dict[str, Any]]:
    """One line per operator and shape.

    The operators that begin or end with a plain convolution take fprop's times, the fused one those
    of the convolution with all of its epilogue, the backward both of its products.
    """
    convolutions = {_key(r): r for r in records if "operation" in r and "rows" in r}
    for (*shape, operation), record in convolutions.items():
        if operation in FORWARD:
            found, config = best(record["rows"])
            for operator in FORWARD[operation]:
                if found:
                    yield line(operator, record, found, config)
        weight = convolutions.get((*shape, "wgrad"))
        if operation == "dgrad" and weight is not None:
            data, config = best(record["rows"])
            other, _ = best(weight["rows"])
            both = {name: round(data[name] + other[name], 1) for name in data if name in other}
            if both:
                yield line("conv2d_backward", record, both, config)


def _key(record: Record) -> tuple[Any, ...]:
    fields = ("images", "height", "width", "channels", "filters", "kernel", "dtype")
    return (*(record[field] for field in fields), record["operation"])


def table(records: list[Record], architecture: str) -> dict[str, Any]:
    """The file's content."""
    head = records[0]
    return {
        "architecture": architecture,
        "gpu": head["machine"]["gpu"][0],
        "date": str(head["date"])[:10],
        "commit": head["commit"],
        "versions": {name: version for name, version in head["versions"].items() if version},
        "measurements": list(measurements(records)),
    }


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, default=Path("bench/results/gpu/shapes.jsonl"))
    parser.add_argument("--out", type=Path, default=Path("resunet_fast/tuning"))


def main(options: argparse.Namespace) -> int:
    if not options.results.exists():
        print(f"no {options.results}: `make gpu PART=shapes` writes it on a GPU")
        return 2
    lines = options.results.read_text(encoding="utf-8").splitlines()
    records: list[Record] = [json.loads(each) for each in lines]
    if not records[0]["machine"]["gpu"]:
        print(f"{options.results}: expected measurements of a GPU, got a dry run's")
        return 2
    architecture = records[0]["architecture"]
    content = table(records, architecture)
    path = options.out / f"{architecture}.json"
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"{len(content['measurements'])} measurements written to {path}")
    return 0
