"""`python -m resunet_fast info`: the machine, what was built and why not, every implementation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch

from . import __version__, environment, native, registry
from .cli import OneLineParser
from .ops.backends import NATIVE_DTYPES


def collect() -> dict[str, Any]:
    """Return everything that `info` prints, ready for JSON."""
    return {
        "resunet_fast": __version__,
        "machine": environment.machine(),
        "build": native.build_info(),
        "native": {
            "reasons": native.unavailable(),
            "isa": _isa(),
            "direct": native.cpu_calls() is not None,
        },
        "backends": registry.backends(),
        "operators": {name: _refusals(name) for name in sorted(registry.OPERATORS)},
    }


def _isa() -> str | None:
    return None if native.unavailable() else str(native.ops().cpu_isa())


def _refusals(name: str) -> dict[str, list[str]]:
    """What each implementation has against small float32 tensors on this machine."""
    operator = registry.OPERATORS[name]
    arguments = [_probe(str(a.type)) for a in operator.overload._schema.arguments[:-1]]
    return {i.name: i.refusals(*arguments) for i in operator.implementations.values()}


def _probe(kind: str) -> Any:
    """A value of one of the types of schemas, absent where that is allowed."""
    if kind == "Tensor":
        return torch.zeros(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    values = {"List[int]": [1, 1], "int": 1, "bool": True, "float": 1.0, "str": "none"}
    return None if kind.startswith("Optional") else values.get(kind, [True] * 6)


def text(facts: dict[str, Any]) -> str:
    """Lay the facts out for reading."""
    lines = [f"resunet_fast {facts['resunet_fast']}", "", "machine"]
    lines += [f"  {key}: {_short(value)}" for key, value in facts["machine"].items()]
    lines += ["", "compiled library"]
    reasons = facts["native"]["reasons"]
    if reasons:
        lines += [f"  not loaded: {reason}" for reason in reasons]
    else:
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in NATIVE_DTYPES)
        lines.append(f"  loaded; instruction set {facts['native']['isa']}; {dtypes}")
        if not facts["native"]["direct"]:
            lines.append(
                "  every call takes the dispatcher: this torch or an old build has no other"
            )
    lines += [f"  built: {key}: {_short(value)}" for key, value in facts["build"].items()]
    lines += ["", "backends"]
    lines += [f"  {name}: {_verdict(why)}" for name, why in facts["backends"].items()]
    lines += ["", "operators (float32, channels_last, on the CPU)"]
    for name, implementations in facts["operators"].items():
        lines.append(f"  {name}")
        lines += [f"    {i}: {_verdict(why)}" for i, why in implementations.items()]
    return "\n".join(lines)


def _verdict(reasons: Sequence[str]) -> str:
    return "refuses: " + "; ".join(reasons) if reasons else "can run"


def _short(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_short(item)}" for key, item in value.items())
    return "none" if value is None else str(value)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the facts; `--json` prints them as one JSON object."""
    parser = OneLineParser(prog="python -m resunet_fast info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    facts = collect()
    print(json.dumps(facts, indent=2) if parser.parse_args(argv).json else text(facts))
    return 0
