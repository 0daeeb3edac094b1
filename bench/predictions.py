"""What fusion can give on a GPU, computed from the layers before anything is measured there."""

from __future__ import annotations

from .layers import MODES, Layer, Prediction, layers, predict, total
from .roofline import Ceilings

BATCH, SIZE, WIDTH = 16, 512, 64
# Assumed, not measured here: what an NVIDIA H200 is reported to reach in a large bfloat16 matrix
# product on random data, and in a large copy.
ASSUMED = Ceilings(4.3e12, 790e12, "bfloat16", source="assumed")
# Assumed: the share of the copy rate that passes over memory reach.
PASSES = 0.92
# Assumed: shares of the matrix ceiling that the library's convolutions and ours reach.
EFFICIENCIES = ((1.0, 1.0), (0.7, 0.7), (0.6, 0.6), (0.7, 0.6), (0.7, 0.8))


def text() -> str:
    """docs/performance.md's block."""
    rates = (
        f"{ASSUMED.flops_per_second / 1e12:.0f} TFLOP/s and {ASSUMED.bytes_per_second / 1e12} TB/s"
    )
    intro = (
        f"Assumed, not measured: {rates}, {PASSES:.0%} of the latter in passes over memory."
        f" N={BATCH}, {SIZE}x{SIZE}, bfloat16, width {WIDTH}; bench/layers.py has the formulas and"
        " what each way to run means."
    )
    some = layers(BATCH, SIZE, SIZE, base_width=WIDTH)
    parts = [intro]
    for phase in ("inference", "training"):
        parts.append(level_table(some, phase))
    parts.append(ratio_table(some))
    parts.append(
        "Measured: not yet run on a GPU. `make gpu PART=shapes` measures the ceilings and every"
        " convolution, `make gpu PART=nets` the two networks; `python -m bench report` then puts"
        " them here."
    )
    return "\n\n".join(parts)


def _predict(some: list[Layer], phase: str, mode: str, efficiency: float) -> dict[int, Prediction]:
    return predict(some, phase, mode, ASSUMED, efficiency=efficiency, pass_efficiency=PASSES)


def level_table(some: list[Layer], phase: str) -> str:
    """Milliseconds per level at the full matrix rate, for the four ways to run."""
    lines = [f"| {phase}, ms predicted | {' | '.join(MODES)} |", "|" + "---|" * (len(MODES) + 1)]
    found = {mode: _predict(some, phase, mode, 1.0) for mode in MODES}
    for level in found["eager"]:
        cells = " | ".join(f"{found[mode][level].total:.2f}" for mode in MODES)
        lines.append(
            f"| level {level}: {SIZE >> level}x{SIZE >> level}, {WIDTH << level} | {cells} |"
        )
    cells = " | ".join(f"{total(found[mode]):.1f}" for mode in MODES)
    return "\n".join([*lines, f"| all | {cells} |"])


def ratio_table(some: list[Layer]) -> str:
    """The best ratios over torch.compile, by how well both sides' convolutions run."""
    lines = [
        "| convolutions reach (library / ours) | inference: fused, ideal | training: fused, ideal |"
    ]
    lines.append("|---|---|---|")
    for library, ours in EFFICIENCIES:
        cells = []
        for phase in ("inference", "training"):
            compiled = total(_predict(some, phase, "compiled", library))
            ratios = [compiled / total(_predict(some, phase, m, ours)) for m in ("fused", "ideal")]
            cells.append(", ".join(f"{ratio:.2f}x" for ratio in ratios))
        lines.append(f"| {library:.0%} / {ours:.0%} | {' | '.join(cells)} |")
    return "\n".join(lines)
