"""Whether a kernel computes addresses in 64 bits, read from Triton's intermediate code (TTIR).

Offsets of more than 2^31 elements must not pass through a 32-bit product. Every 32-bit integer of
the kernel is put into one of four ranks:

    TILE   a constant, an index within a tile
    AXIS   an index or size along one axis: an argument, a loop's counter, a program id of the y or
           z axis (at most 65535), a quotient or remainder by one of these
    GRID   the program id of the x axis: it may number all tiles of a tensor
    WIDE   it may exceed 32 bits: a product of two of AXIS and GRID, a multiple of GRID

An offset of rank WIDE that was computed in 32 bits must not reach an address, widened or not.
Operands of 64 bits are safe. Coordinates of tensor descriptors are 32 bits wide by definition of
the hardware, which multiplies them by 64-bit strides itself; they are not addresses here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

TILE, AXIS, GRID, WIDE = range(4)

_DEFINITION = re.compile(r"^\s*(%\w+)(?::\d+)? = \"?([\w.]+)\"?(.*)$")
_VALUE = re.compile(r"%\w+(?:#\d+)?")
_FOR = re.compile(r"scf\.for (?:unsigned )?(%\w+) = (%\S+) to (%\S+) step (%\S+)")
_CARRIED = re.compile(r"(%\w+) = (%\w+(?:#\d+)?)")


@dataclass
class _Ranks:
    """Ranks of the values by name; `carried` are those that regions yield, by line and position."""

    of: dict[str, int] = field(default_factory=dict)
    carried: dict[tuple[int, int], int] = field(default_factory=dict)

    def get(self, name: str) -> int:
        return self.of.get(name.partition("#")[0], TILE)

    def yielded(self, region: int) -> int:
        return max((r for (line, _), r in self.carried.items() if line == region), default=TILE)

    def highest(self, names: list[str]) -> int:
        return max(map(self.get, names), default=TILE)


def narrow_addresses(ttir: str) -> tuple[str, ...]:
    """Return the source lines whose addresses may overflow in 32 bits.

    Args:
        ttir: the kernel's TTIR after Triton's passes, with locations.
    """
    lines = [
        line.split(" loc(")[0] if "tt.func" not in line else line for line in ttir.splitlines()
    ]
    ranks = _Ranks()
    while True:  # what a loop carries may raise its own rank: until nothing changes
        before = dict(ranks.carried)
        found = _walk(lines, ranks)
        if ranks.carried == before:
            return tuple(dict.fromkeys(_place(ttir, number) for number in found))


def _walk(lines: list[str], ranks: _Ranks) -> list[int]:
    """Rank every value in order of the text; return the lines with an address of rank WIDE."""
    found = []
    regions: list[int | None] = []  # line of each open region's `for` or `if`; None for others
    for number, line in enumerate(lines):
        if "tt.func" in line:
            for name, kind in re.findall(r"(%\w+): (\S+)", line):
                ranks.of[name] = AXIS if kind.startswith("i32") else TILE
        elif "scf.yield" in line and regions[-1] is not None:
            _carry(ranks, regions[-1], _values(line.partition(" : ")[0]))
        elif header := _FOR.search(line):
            _enter(ranks, number, line, header)
        elif "scf.while" in line:
            raise ValueError(f"kernel: expected loops over ranges only, got {line.strip()!r}")
        elif definition := _DEFINITION.match(line):
            name, operation, rest = definition.groups()
            operands = _values(rest.partition(" : ")[0])
            ranks.of[name] = _rank(operation, operands, rest, ranks)
            if operation == "scf.if":
                ranks.of[name] = ranks.yielded(number)
            if operation == "tt.addptr" and ranks.get(operands[1]) == WIDE:
                found.append(number)
        _track_regions(regions, number, line)
    return found


def _values(text: str) -> list[str]:
    return _VALUE.findall(text)


def _track_regions(regions: list[int | None], number: int, line: str) -> None:
    stripped = line.strip()
    closed = regions.pop() if stripped.startswith("}") else None
    if stripped.startswith("} else"):
        regions.append(closed)
    elif stripped.endswith(("{", "({")):
        regions.append(number if "scf.for" in line or "scf.if" in line else None)


def _enter(ranks: _Ranks, number: int, line: str, header: re.Match[str]) -> None:
    """Rank a loop's counter, what it carries, and its results."""
    counter, *bounds = header.groups()
    rank = ranks.highest(bounds)
    ranks.of[counter] = AXIS if rank == GRID else rank
    initial = line.partition("iter_args(")[2].partition(") ->")[0]
    carried = _CARRIED.findall(initial)
    for position, (name, start) in enumerate(carried):
        key = (number, position)
        ranks.carried[key] = max(ranks.carried.get(key, TILE), ranks.get(start))
        ranks.of[name] = ranks.carried[key]
    if definition := _DEFINITION.match(line):
        ranks.of[definition[1]] = ranks.yielded(number)


def _carry(ranks: _Ranks, loop: int, values: list[str]) -> None:
    for position, value in enumerate(values):
        key = (loop, position)
        ranks.carried[key] = max(ranks.carried.get(key, TILE), ranks.get(value))


def _rank(operation: str, operands: list[str], rest: str, ranks: _Ranks) -> int:
    if operation == "tt.get_program_id":
        return GRID if rest.split()[0] == "x" else AXIS
    if operation in ("tt.get_num_programs", "tt.load"):
        return AXIS
    if operation in ("arith.constant", "tt.make_range"):
        return TILE
    highest = ranks.highest(operands)
    if operation == "arith.trunci":
        return max(highest, AXIS)
    if operation in ("arith.extsi", "arith.extui"):
        return WIDE if highest == WIDE else TILE
    if operation in ("arith.divsi", "arith.divui", "arith.remsi", "arith.remui"):
        return _quotient(operation, *map(ranks.get, operands[:2]))
    if operation in ("arith.muli", "arith.shli") and "i32" in rest:
        low, high = sorted(map(ranks.get, operands[:2]))
        return WIDE if low >= AXIS or high >= GRID else high
    return highest


def _quotient(operation: str, dividend: int, divisor: int) -> int:
    if dividend in (WIDE, TILE):
        return dividend
    if divisor == TILE:  # a constant
        return TILE if operation.startswith("arith.rem") else dividend
    return AXIS


def _place(ttir: str, number: int) -> str:
    """Spell where in the source a line of TTIR comes from."""
    location = re.search(r"loc\((#loc\w*)\)\s*$", ttir.splitlines()[number])
    while location:
        definition = re.search(rf"^{location[1]} = loc\((.*)\)$", ttir, re.MULTILINE)
        if definition is None:
            break
        if place := re.match(r'"([^"]+)":(\d+)', definition[1]):
            return f"{place[1].rpartition('/')[2]}:{place[2]}"
        location = re.search(r"(#loc\w*)", definition[1])
    return f"line {number + 1} of the TTIR"
