"""What the machine code of a kernel says about it: NVIDIA's assembler's log and the disassembly."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Instruction:
    """One line of disassembly: where it lies, its mnemonic with modifiers, and its operands."""

    address: int
    predicated: bool
    mnemonic: str
    operands: str

    @property
    def kind(self) -> str:
        """The mnemonic without modifiers, such as "LDG"."""
        return self.mnemonic.partition(".")[0]


@dataclass(frozen=True)
class Measurement:
    """One build for one architecture; bytes and counts are static, per thread.

    Args:
        registers: per thread.
        spilled: bytes of spill stores and loads, and of the stack.
        shared: bytes of shared memory per block.
        instructions: of the whole kernel.
        k_step: instructions of the longest innermost loop that holds a matrix instruction; 0 if
            there is none.
        matrix: kind of the matrix instructions ("HMMA", "HGMMA", "UTCHMMA"), or "".
        matrix_count: how many there are.
        from_shared: how many of them read both operands from shared memory.
        ldmatrix: loads from shared memory into a matrix operand's registers, in these loops.
        serialised: why the assembler makes each asynchronous matrix instruction wait for the one
            before, in its own words; "" if it does not.
        atomics: on global memory.
        tma_loads, tma_stores: box copies by descriptor.
        loads, stores: bytes of all other accesses to global memory.
        loads_16, stores_16: those of them in accesses of 16 bytes.
        narrow_addresses: where an address is computed in 32 bits that may overflow.
    """

    registers: int
    spilled: int
    shared: int
    instructions: int
    k_step: int
    matrix: str
    matrix_count: int
    from_shared: int
    ldmatrix: int
    serialised: str
    atomics: int
    tma_loads: int
    tma_stores: int
    loads: int
    loads_16: int
    stores: int
    stores_16: int
    narrow_addresses: tuple[str, ...] = ()


_MATRIX = ("HMMA", "DMMA", "HGMMA", "QGMMA", "IGMMA", "UTCHMMA", "UTCQMMA")
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")


def parse(disassembly: str) -> tuple[list[Instruction], dict[str, int]]:
    """Return the instructions and the address of every label."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    for line in disassembly.splitlines():
        if label := _LABEL.match(line):
            waiting.append(label[1])
        elif found := _LINE.search(line):
            address = int(found[1], 16)
            labels |= dict.fromkeys(waiting, address)
            waiting.clear()
            mnemonic, operands = found[3], found[4].strip()
            if mnemonic != "NOP":  # fills the last cache line
                instructions.append(Instruction(address, bool(found[2]), mnemonic, operands))
    return instructions, labels


Blocks = dict[int, list[Instruction]]
Edges = dict[int, set[int]]


def _blocks(instructions: list[Instruction], labels: dict[str, int]) -> tuple[Blocks, Edges]:
    """Split into basic blocks, named by their first address, and find where each may go on."""
    starts = set(labels.values())
    blocks: Blocks = {}
    edges: Edges = {}
    current, ended, falls = 0, True, False
    for instruction in instructions:
        if ended or instruction.address in starts:
            if falls:
                edges[current].add(instruction.address)
            current = instruction.address
            blocks[current], edges[current] = [], set()
        blocks[current].append(instruction)
        target = _TARGET.search(instruction.operands)
        ended = instruction.kind in ("BRA", "EXIT", "RET")
        # A condition stands before the branch, or as in `BRA.U UP3, ...` before its target.
        falls = not ended or instruction.predicated or "P" in instruction.operands.split("`")[0]
        if instruction.kind == "BRA" and target:
            edges[current].add(labels[target[1]])
    return blocks, edges


def _reachable(start: int, edges: Edges, within: set[int]) -> set[int]:
    """The blocks that can follow `start`; itself only if it lies on a cycle."""
    seen: set[int] = set()
    waiting = [start]
    while waiting:
        found = (edges[waiting.pop()] & within) - seen
        seen |= found
        waiting += found
    return seen


def _cycles(edges: Edges, within: set[int]) -> list[set[int]]:
    """The strongly connected parts that hold a cycle."""
    after = {block: _reachable(block, edges, within) for block in within}
    parts = {
        frozenset(other for other in after[block] if block in after[other])
        for block in within
        if block in after[block]
    }
    return [set(part) for part in parts]


def matrix_loops(
    instructions: list[Instruction], labels: dict[str, int]
) -> list[list[Instruction]]:
    """Return the bodies of the innermost loops that hold a matrix instruction."""
    blocks, edges = _blocks(instructions, labels)
    matrix = {name for name, body in blocks.items() if any(i.kind in _MATRIX for i in body)}
    innermost = []
    waiting = [part for part in _cycles(edges, set(blocks)) if part & matrix]
    while waiting:
        loop = waiting.pop()
        heads = {b for a, after in edges.items() if a not in loop for b in after & loop}
        # Without the ways back to its head only the loops within are left of a loop.
        inside = {block: after - heads for block, after in edges.items()}
        inner = [part for part in _cycles(inside, loop) if part & matrix]
        if inner and heads:
            waiting += inner
        else:
            innermost.append([i for block in sorted(loop) for i in blocks[block]])
    return innermost


def _width(instruction: Instruction) -> int:
    """Bytes of one access: the modifier that is a number of bits; 4 where there is none."""
    for modifier in instruction.mnemonic.split(".")[1:]:
        if re.fullmatch(r"[US]?(8|16|64|128|256)", modifier):
            return int(modifier.lstrip("US")) // 8
    return 4


def _both_from_shared(instruction: Instruction) -> bool:
    """Descriptors only: `HGMMA R24, gdesc[UR8], R24` or `UTCHMMA gdesc[..], gdesc[..], ...`.

    With operand A in registers, or in tensor memory, a register stands before the descriptor.
    """
    operands = [operand.strip() for operand in instruction.operands.split(",")]
    if instruction.kind.startswith("UTC"):
        return operands[0].startswith("gdesc") and operands[1].startswith("gdesc")
    return instruction.kind.endswith("GMMA") and operands[1].startswith("gdesc")


def _bytes(instructions: Iterable[Instruction], kinds: tuple[str, ...], least: int = 0) -> int:
    widths = (_width(i) for i in instructions if i.kind in kinds)
    return sum(width for width in widths if width >= least)


def _count(instructions: Iterable[Instruction], kind: str) -> int:
    return sum(i.kind == kind for i in instructions)


def _numbers(pattern: str, log: str) -> list[int]:
    return [int(number) for number in re.findall(pattern, log)]


def measure(
    log: str, disassembly: str, shared: int, narrow_addresses: tuple[str, ...]
) -> Measurement:
    """Read one compiled kernel.

    Args:
        log: what ptxas printed with `-v`.
        disassembly: what nvdisasm printed.
        shared: bytes of shared memory that a launch asks for.
        narrow_addresses: passed through.
    """
    instructions, labels = parse(disassembly)
    matrix = [i for i in instructions if i.kind in _MATRIX]
    loops = matrix_loops(instructions, labels)
    spilled = _numbers(r"(\d+) bytes spill", log) + _numbers(r"(\d+) bytes stack frame", log)
    loads, stores = ("LDG", "LDGSTS"), ("STG",)
    return Measurement(
        registers=max(_numbers(r"Used (\d+) registers", log)),
        spilled=sum(spilled),
        shared=shared,
        instructions=len(instructions),
        k_step=max(map(len, loops), default=0),
        matrix="+".join(sorted({i.kind for i in matrix})),
        matrix_count=len(matrix),
        from_shared=sum(_both_from_shared(i) for i in matrix),
        ldmatrix=sum(_count(body, "LDSM") for body in loops),
        serialised="; ".join(
            re.findall(r"are serialized (.*?)(?: in the function.*)?$", log, re.M)
        ),
        atomics=sum(_count(instructions, kind) for kind in ("ATOM", "ATOMG", "RED", "REDG")),
        tma_loads=_count(instructions, "UTMALDG"),
        tma_stores=_count(instructions, "UTMASTG"),
        loads=_bytes(instructions, loads),
        loads_16=_bytes(instructions, loads, 16),
        stores=_bytes(instructions, stores),
        stores_16=_bytes(instructions, stores, 16),
        narrow_addresses=narrow_addresses,
    )
