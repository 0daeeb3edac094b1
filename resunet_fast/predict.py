"""Segment photographs with a saved model: `python -m resunet_fast predict`."""

from __future__ import annotations

import argparse
import io
import sys
import time
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from resunet_fast.checkpoint import (
    CheckpointError,
    Normalisation,
    SavedModel,
    load,
    write_atomically,
)
from resunet_fast.images import ImageError, ImageLike, Pixels, read_image, with_channels

_OVERLAY_COLOUR = np.array([255.0, 64.0, 32.0], dtype=np.float32)


class PredictionError(ValueError):
    """A request that cannot be fulfilled; the message is one sentence that says why."""


@dataclass(frozen=True)
class Prediction:
    """The segmentation of one image.

    Attributes:
        image: [H, W, C] float32 in [0, 1], as the network saw it before normalisation.
        probability: [H, W] float32, of being foreground.
        mask: [H, W] bool, where the probability reaches the threshold.
        seconds: time of the forward pass.
    """

    image: Pixels
    probability: Pixels
    mask: NDArray[np.bool_]
    seconds: float

    @property
    def foreground_share(self) -> float:
        """Share of the pixels that are foreground, in [0, 1]."""
        return float(self.mask.mean())

    def mask_image(self) -> Image.Image:
        """The mask as an 8-bit grey picture, 0 background and 255 foreground."""
        return Image.fromarray(self.mask.astype(np.uint8) * np.uint8(255))

    def overlay_image(self) -> Image.Image:
        """The image with the foreground tinted, as 8-bit RGB."""
        shown = self.image if self.image.shape[2] == 3 else self.image.mean(axis=2, keepdims=True)
        shown = np.broadcast_to(shown * np.float32(255), (*self.mask.shape, 3)).copy()
        shown[self.mask] = 0.45 * shown[self.mask] + 0.55 * _OVERLAY_COLOUR
        return Image.fromarray(np.rint(shown).astype(np.uint8))


def pick_device(name: str) -> torch.device:
    """Turn "auto", "cpu" or "cuda" into a device that exists.

    Args:
        name: "auto" takes the GPU if torch can use one.

    Raises:
        PredictionError: "cuda" was asked for and torch cannot use it.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise PredictionError("device 'cuda' was asked for, but torch finds no usable CUDA GPU")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def predict(
    model: str | Path | SavedModel | nn.Module,
    image: ImageLike,
    *,
    threshold: float = 0.5,
    device: str = "auto",
) -> Prediction:
    """Segment one image of any size.

    `mask = sigmoid(network((x - mean) / std)) >= threshold`

    Args:
        model: a model directory, or what `checkpoint.load` returned (it stays on its device), or
            a bare network in evaluation mode that takes values in [0, 1].
        image: see `images.read_image`.
        threshold: probability from which a pixel is foreground, in (0, 1).
        device: "auto", "cpu" or "cuda"; read only when `model` is a directory.

    Returns:
        The prediction, on the CPU.

    Raises:
        CheckpointError: the model directory cannot be used.
        ImageError: the image cannot be read or has the wrong number of channels.
        PredictionError: the model refuses the image, or an argument is out of range.
    """
    if not 0.0 < threshold < 1.0:
        raise PredictionError(f"the threshold must lie between 0 and 1, got {threshold}")
    if isinstance(model, str | Path):
        model = load(model, pick_device(device))
    pixels = read_image(image)
    if isinstance(model, SavedModel):
        pixels = with_channels(pixels, model.config.in_channels)
        network, normalisation = model.network, model.config.normalisation
    else:
        channels = pixels.shape[2]
        network, normalisation = model, Normalisation((0.0,) * channels, (1.0,) * channels)
    batch = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))[None]
    logits, seconds = _forward(network, normalisation(batch))
    probability: Pixels = torch.sigmoid(logits).numpy()
    return Prediction(pixels, probability, probability >= threshold, seconds)


def _forward(network: nn.Module, batch: Tensor) -> tuple[Tensor, float]:
    """Logits [H, W] on the CPU and the seconds that they took."""
    # A frozen network may hold nothing but buffers.
    device = next(chain(network.parameters(), network.buffers())).device
    if network.training:
        raise PredictionError("the network is in training mode: call its eval() first")
    start = time.perf_counter()
    try:
        with torch.inference_mode():
            logits = network(batch.to(device)).float().cpu()
    except (RuntimeError, ValueError) as error:
        raise PredictionError(f"the model refuses the image: {_first_line(error)}") from error
    seconds = time.perf_counter() - start
    if logits.shape[1] != 1:
        raise PredictionError(f"expected a model with one class, got {logits.shape[1]}")
    if not bool(torch.isfinite(logits).all()):
        raise PredictionError("the model's output is not finite: its weights are damaged")
    return logits[0, 0], seconds


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@dataclass(frozen=True)
class _Job:
    """One image of the command line and where its results go."""

    source: Path
    mask: Path
    overlay: Path


def _plan(sources: list[Path], out: Path) -> list[_Job]:
    """Name all results; refuse before any work what would overwrite an input or another result."""
    if out.suffix.lower() == ".png" and not out.is_dir():
        if len(sources) > 1:
            raise PredictionError(
                f"--out {out} names one file, but {len(sources)} images were given: "
                "name a directory"
            )
        jobs = [_Job(sources[0], out, out.with_name(f"{out.stem}_overlay.png"))]
    else:
        jobs = [
            _Job(source, out / f"{source.stem}_mask.png", out / f"{source.stem}_overlay.png")
            for source in sources
        ]
    targets = [path.resolve() for job in jobs for path in (job.mask, job.overlay)]
    for target in targets:
        if targets.count(target) > 1:
            raise PredictionError(f"two of the images would both be written to {target.name}")
        if target in [source.resolve() for source in sources]:
            raise PredictionError(f"the result {target.name} would overwrite an input image")
    return jobs


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _run(job: _Job, model: SavedModel, threshold: float) -> str:
    """Segment one file, write both pictures and return the line to print."""
    pixels = read_image(job.source)
    try:
        result = predict(model, pixels, threshold=threshold)
    except (ImageError, PredictionError) as error:
        raise PredictionError(f"{job.source}: {error}") from error
    job.mask.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(job.mask, _png(result.mask_image()))
    write_atomically(job.overlay, _png(result.overlay_image()))
    height, width = result.mask.shape
    return (
        f"{job.source}: {width} x {height} pixels, foreground {result.foreground_share:.1%}, "
        f"{result.seconds * 1e3:.0f} ms -> {job.mask}, {job.overlay}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m resunet_fast predict",
        description="Segment photographs with a saved model; writes NAME_mask.png (0 or 255) and "
        "NAME_overlay.png for each.",
        epilog="Any size. Grey, palette and transparent pictures (laid over white) become RGB, "
        "16-bit ones are scaled by 65535. An image that cannot be used is reported in one line "
        "and the others are still done; the exit code is then 2.",
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="image")
    parser.add_argument("--model", required=True, type=Path, help="directory that demo wrote")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/predict"),
        help="directory, or for one image the mask's file name ending in .png (%(default)s)",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.5,
        help="probability from which a pixel is foreground (%(default)s)",
    )
    return parser


def main(argv: list[str]) -> int:
    """Run the `predict` command.

    Args:
        argv: the arguments after `predict`.

    Returns:
        0, or 2 when the model or any of the images could not be used.
    """
    options = _parser().parse_args(argv)
    try:
        if not 0.0 < options.threshold < 1.0:
            raise PredictionError(f"--threshold must lie between 0 and 1, got {options.threshold}")
        jobs = _plan(options.images, options.out)
        model = load(options.model, pick_device(options.device))
    except (CheckpointError, PredictionError) as error:
        return _complain(error)
    failed = False
    for job in jobs:
        try:
            print(_run(job, model, options.threshold), flush=True)
        except (ImageError, PredictionError) as error:
            failed = bool(_complain(error))
        except OSError as error:
            return _complain(f"cannot write to {options.out}: {error.strerror or error}")
    return 2 if failed else 0


def _complain(problem: object) -> int:
    print(f"predict: {problem}", file=sys.stderr)
    return 2
