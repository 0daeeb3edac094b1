"""The demo's results for the eye: a table to print and a figure to look at."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from resunet_fast.demo.dataset import Mask, Scene
from resunet_fast.demo.measure import Agreement, Quality, Spread, Timing

FAST_COLOUR = "#d1495b"
REFERENCE_COLOUR = "#2e6f95"
_TRUE_COLOUR = "#3a9d5d"


@dataclass(frozen=True)
class Results:
    """Everything the demo found; pairs are (fast, reference).

    Attributes:
        description: task, model and run, one sentence each, for the table's head.
        machine: what it ran on, one line.
        losses: one value per step of each.
        quality: on the held-out pictures.
        agreement: of both networks at the weights of the trained fast one.
        training: of one training step.
        inference: of one forward pass in evaluation mode.
        training_bytes: see `measure.training_bytes`.
        training_bytes_meaning: in a few words.
        process_bytes: peak resident size of the whole process, None where unknown.
    """

    description: tuple[str, ...]
    machine: str
    losses: tuple[Sequence[float], Sequence[float]]
    quality: tuple[Quality, Quality]
    agreement: Agreement
    training: Timing
    inference: Timing
    training_bytes: tuple[int, int]
    training_bytes_meaning: str
    process_bytes: int | None

    @property
    def differences(self) -> NDArray[np.float64]:
        """Absolute difference of the two losses at each step."""
        fast, reference = (np.asarray(curve, dtype=np.float64) for curve in self.losses)
        difference: NDArray[np.float64] = np.abs(fast - reference)
        return difference


def table(results: Results) -> str:
    """The results as lines of text."""
    (fast, reference), differences = results.quality, results.differences
    kept = results.training_bytes
    worst = int(differences.argmax())
    rows = [
        ("", "fast", "reference", ""),
        _quality_row("held-out Dice", fast.dice, reference.dice),
        _quality_row("held-out IoU", fast.iou, reference.iou),
        _time_row("training step, median", results.training),
        _time_row("inference, median", results.inference),
        (
            results.training_bytes_meaning,
            _mebibytes(kept[0]),
            _mebibytes(kept[1]),
            f"fast needs {kept[0] / kept[1]:.2f}x",
        ),
    ]
    lines = [f"  {name:<26}{first:>12}{second:>12}   {note}" for name, first, second, note in rows]
    peak = results.process_bytes
    return "\n".join(
        [
            *results.description,
            "",
            *(line.rstrip() for line in lines),
            "",
            "largest difference of the loss curves (training amplifies rounding): "
            f"{differences[worst]:.2e} at step {worst + 1} "
            f"(first step: {differences[0]:.1e}, mean: {differences.mean():.1e})",
            "at equal weights (the trained fast model's): largest difference of a probability "
            f"{results.agreement.probability:.1e}, relative difference of the gradients "
            f"{results.agreement.gradient:.1e}",
            *([f"peak memory of the whole process: {_mebibytes(peak)}"] if peak else []),
            results.machine,
        ]
    )


def _quality_row(name: str, fast: float, reference: float) -> tuple[str, str, str, str]:
    return name, f"{fast:.4f}", f"{reference:.4f}", f"difference {fast - reference:+.4f}"


def _time_row(name: str, timing: Timing) -> tuple[str, str, str, str]:
    return name, _milliseconds(timing.first), _milliseconds(timing.second), _speed(timing.ratio)


def _speed(ratio: Spread) -> str:
    return f"fast is {ratio.median:.2f}x as fast (p20 to p80: {ratio.p20:.2f} to {ratio.p80:.2f})"


def _milliseconds(spread: Spread) -> str:
    return f"{spread.median * 1e3:.1f} ms"


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.0f} MiB"


def figure(
    results: Results, pictures: Sequence[Scene], predictions: Sequence[tuple[Mask, Mask]]
) -> bytes:
    """Draw loss curves, their difference, and a few held-out pictures.

    Args:
        results: what the curves and titles are taken from.
        pictures: a few held-out scenes.
        predictions: the masks that (fast, reference) predict for each.

    Returns:
        A PNG file's content.
    """
    count = len(pictures)
    fig = Figure(figsize=(11, 4.6 + 2.45 * count), dpi=110, layout="constrained")
    FigureCanvasAgg(fig)
    top, bottom = fig.subfigures(2, 1, height_ratios=(4.2, 2.45 * count), squeeze=False)[:, 0]
    top.suptitle("\n".join(_headline(results)), fontsize=11)
    curves, differences = top.subplots(1, 2)
    _draw_curves(curves, results)
    _draw_differences(differences, results)
    bottom.suptitle(
        "held-out pictures (digits composited onto photographs), the first of the set", fontsize=11
    )
    grid = bottom.subplots(count, 4, squeeze=False)
    for row, scene, (fast, reference) in zip(grid, pictures, predictions, strict=True):
        _draw_row(row, scene, fast, reference)
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png")
    return buffer.getvalue()


def _headline(results: Results) -> tuple[str, str]:
    fast, reference = results.quality
    kept = results.training_bytes
    return (
        f"held-out Dice: fast {fast.dice:.4f}, reference {reference.dice:.4f}; at equal weights "
        f"their probabilities differ by at most {results.agreement.probability:.0e}",
        f"speed against the reference: training {results.training.ratio.median:.2f}x, "
        f"inference {results.inference.ratio.median:.2f}x; "
        f"{results.training_bytes_meaning}: {kept[0] / kept[1]:.2f}x",
    )


def _steps(results: Results) -> NDArray[np.int64]:
    return np.arange(1, len(results.differences) + 1)


def _draw_curves(axes: Axes, results: Results) -> None:
    fast, reference = results.losses
    steps = _steps(results)
    axes.plot(steps, reference, color=REFERENCE_COLOUR, linewidth=3.5, alpha=0.45)
    axes.plot(steps, fast, color=FAST_COLOUR, linewidth=1.0)
    axes.legend(["reference", "fast"], frameon=False)
    axes.set(title="training loss, same batches", xlabel="step", ylabel="BCE + Dice loss")
    _plain_frame(axes)


def _draw_differences(axes: Axes, results: Results) -> None:
    # A logarithmic axis has no place for equal losses.
    shown = np.maximum(results.differences, 1e-9)
    axes.semilogy(_steps(results), shown, color="0.25", linewidth=1.0)
    axes.set(
        title="difference of the losses (training amplifies rounding)",
        xlabel="step",
        ylabel="|fast - reference|",
    )
    _plain_frame(axes)


def _plain_frame(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def _draw_row(row: Sequence[Any], scene: Scene, fast: Mask, reference: Mask) -> None:
    row[0].imshow(scene.image)
    row[0].set_title(f"on {scene.photograph!r}", fontsize=9)
    shown = (
        ("true mask", scene.mask, _TRUE_COLOUR),
        (f"fast, Dice {_dice(fast, scene.mask):.3f}", fast, FAST_COLOUR),
        (f"reference, Dice {_dice(reference, scene.mask):.3f}", reference, REFERENCE_COLOUR),
    )
    for axes, (title, mask, colour) in zip(row[1:], shown, strict=True):
        axes.imshow(_overlay(scene.image, mask, colour))
        axes.set_title(title, fontsize=9)
    for axes in row:
        axes.set_axis_off()


def _dice(mask: Mask, truth: Mask) -> float:
    return float(2 * (mask & truth).sum() / max(1, mask.sum() + truth.sum()))


def _overlay(image: NDArray[np.uint8], mask: Mask, colour: str) -> NDArray[np.uint8]:
    """The picture in pale grey with the mask in colour."""
    grey = 90 + 0.6 * image.mean(axis=2, keepdims=True)
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)], dtype=np.float64)
    painted: NDArray[np.float64] = np.where(mask[:, :, None], 0.15 * grey + 0.85 * rgb, grey)
    return painted.astype(np.uint8)
