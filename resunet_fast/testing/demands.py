"""What machine code must look like: demands by name, each a check that answers with a sentence."""

from __future__ import annotations

from collections.abc import Callable

from .machine_code import Measurement

# Bytes that one block can have on the GPUs of each architecture: A100, H100 and H200, B200.
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
# Per-channel vectors and tails may be narrow; the images may not.
_MOSTLY = 2 / 3
# Stores of less than this share of the loaded bytes are results of a reduction.
_FEW = 1 / 4
_MATRIX = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}

Check = Callable[[Measurement, int], str]


def _no_spills(m: Measurement, arch: int) -> str:
    return f"{m.spilled} bytes of registers spill to memory" if m.spilled else ""


def _shared_memory_fits(m: Measurement, arch: int) -> str:
    limit = SHARED_MEMORY[arch]
    if m.shared <= limit:
        return ""
    return f"{m.shared} bytes of shared memory, a block on sm_{arch} has at most {limit}"


def _addresses_64_bit(m: Measurement, arch: int) -> str:
    places = ", ".join(m.narrow_addresses)
    return f"32-bit arithmetic that may overflow reaches an address at {places}" if places else ""


def _matrix_pipelined(m: Measurement, arch: int) -> str:
    if not m.serialised:
        return ""
    return (
        f"each matrix instruction waits for the one before, {m.serialised}; if the loop may"
        " run zero times, make its trip count constexpr or tl.maximum(steps, 1)"
    )


def _no_atomics(m: Measurement, arch: int) -> str:
    return f"{m.atomics} atomics, whose order changes the last bits" if m.atomics else ""


def _vector_16_bytes(m: Measurement, arch: int) -> str:
    wrong = []
    if m.loads_16 < _MOSTLY * m.loads and not m.tma_loads:
        wrong.append(f"{m.loads_16} of {m.loads} bytes are loaded 16 at a time")
    if m.stores_16 < _MOSTLY * m.stores and m.stores >= _FEW * m.loads:
        wrong.append(f"{m.stores_16} of {m.stores} bytes are stored 16 at a time")
    return "; ".join(wrong)


def _matrix_instruction(m: Measurement, arch: int) -> str:
    return "" if m.matrix_count else "there is no matrix instruction"


def _tma(m: Measurement, arch: int) -> str:
    return "" if m.tma_loads else "nothing is loaded by tensor descriptor (UTMALDG)"


def _wgmma_from_shared_memory(m: Measurement, arch: int) -> str:
    kind = _MATRIX[arch]
    if m.matrix != kind:
        return f"expected {kind} as matrix instruction, got {m.matrix or 'none'}"
    if arch == 80:  # its instruction reads registers
        return ""
    if m.from_shared < m.matrix_count:
        others = m.matrix_count - m.from_shared
        return f"{others} of {m.matrix_count} {kind} read an operand from registers"
    return f"{m.ldmatrix} ldmatrix carry an operand through registers" if m.ldmatrix else ""


# Demanded of every build.
ALWAYS = frozenset(
    {"no_spills", "shared_memory_fits", "addresses_64_bit", "no_atomics", "matrix_pipelined"}
)

DEMANDS: dict[str, Check] = {
    "no_spills": _no_spills,
    "shared_memory_fits": _shared_memory_fits,
    "addresses_64_bit": _addresses_64_bit,
    "no_atomics": _no_atomics,
    "matrix_pipelined": _matrix_pipelined,
    "vector_16_bytes": _vector_16_bytes,
    "matrix_instruction": _matrix_instruction,
    "tma": _tma,
    "wgmma_from_shared_memory": _wgmma_from_shared_memory,
}


def check_names(build: str, demands: frozenset[str]) -> None:
    """Refuse demands that do not exist, which would never be broken.

    Raises:
        ValueError: a demand has a name that is not in :data:`DEMANDS`.
    """
    if unknown := sorted(demands - DEMANDS.keys()):
        raise ValueError(
            f"demands: expected some of {sorted(DEMANDS)}, got {unknown} in the build {build!r}"
        )


def unmet(measurement: Measurement, arch: int, demands: frozenset[str]) -> dict[str, str]:
    """Return the demands that the machine code breaks, with a sentence each.

    Args:
        measurement: of one build.
        arch: its architecture.
        demands: names in :data:`DEMANDS`; those of :data:`ALWAYS` are added.
    """
    answers = {name: DEMANDS[name](measurement, arch) for name in sorted(ALWAYS | demands)}
    return {name: sentence for name, sentence in answers.items() if sentence}
