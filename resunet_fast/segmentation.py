"""`rf.segment`: from an image of any size to probabilities, a mask and pictures of them."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from .checkpoint import Normalisation, SavedModel, load
from .freeze import freeze, refusals
from .frozen import FrozenResUNet
from .frozen.build import reservations
from .images import Array, ImageLike, Pixels, read_stored, to_float, with_channels
from .models import Wiring
from .sentences import first_line
from .tiling import Plane, bands, cell_size
from .windows import windowed

Network = Callable[[Tensor], Tensor]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Images of up to this many pixels go through the network in one piece unless a tile is asked for.
WHOLE = 2**19
TILE = 512
_OVERLAY_COLOUR = np.array([255.0, 64.0, 32.0], dtype=np.float32)
_OVERLAY_ROWS = 256


class SegmentationError(ValueError):
    """A request that cannot be fulfilled; the message is one sentence that says why."""


@dataclass(frozen=True)
class Segmentation:
    """The segmentation of one image.

    Attributes:
        pixels: [H, W, C], the image as it is stored (uint8, uint16 or floating point).
        probability: [H, W] float32, of being foreground.
        threshold: probability from which a pixel is foreground.
        seconds: time that the network took, with the preparation of its input.
    """

    pixels: Array
    probability: Plane
    threshold: float
    seconds: float

    @property
    def mask(self) -> NDArray[np.bool_]:
        """Where the probability reaches the threshold, [H, W] bool."""
        return self.probability >= self.threshold

    @property
    def foreground_share(self) -> float:
        """Share of the pixels that are foreground, in [0, 1]."""
        return float(self.mask.mean())

    def mask_image(self) -> Image.Image:
        """The mask as an 8-bit grey picture, 0 background and 255 foreground."""
        return Image.fromarray(self.mask.astype(np.uint8) * np.uint8(255))

    def probability_image(self) -> Image.Image:
        """The probability as a 16-bit grey picture, 65535 for certain foreground."""
        return Image.fromarray(np.rint(self.probability * np.float32(65535)).astype(np.uint16))

    def overlay_image(self) -> Image.Image:
        """The image with the foreground tinted, as 8-bit RGB; other channel counts as grey."""
        overlay = np.empty((*self.probability.shape, 3), dtype=np.uint8)
        for start in range(0, len(overlay), _OVERLAY_ROWS):
            rows = slice(start, start + _OVERLAY_ROWS)
            overlay[rows] = _tinted(to_float(self.pixels[rows]), self.mask[rows])
        return Image.fromarray(overlay)


def _tinted(pixels: Pixels, mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    shown = pixels if pixels.shape[2] == 3 else pixels.mean(axis=2, keepdims=True)
    shown = np.broadcast_to(shown * np.float32(255), (*mask.shape, 3)).copy()
    shown[mask] = 0.45 * shown[mask] + 0.55 * _OVERLAY_COLOUR
    tinted: NDArray[np.uint8] = np.rint(shown).astype(np.uint8)
    return tinted


def pick_device(name: str) -> torch.device:
    """Turn "auto", "cpu" or "cuda" into a device that exists.

    Args:
        name: "auto" takes the GPU if torch can use one.

    Raises:
        SegmentationError: "cuda" was asked for and torch cannot use it.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise SegmentationError(f"device: expected 'auto', 'cpu' or 'cuda', got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise SegmentationError("device 'cuda' was asked for, but torch finds no usable CUDA GPU")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def for_inference(model: SavedModel, dtype: str) -> tuple[SavedModel, list[str]]:
    """Freeze a model, or say why it goes on as it is.

    Args:
        model: whose network is in evaluation mode.
        dtype: see :class:`Settings`; one of those.

    Returns:
        The frozen model and no reasons; or the model itself and the reasons, each a sentence.
    """
    network, wanted = model.network, None if dtype == "float32" else DTYPES[dtype]
    if isinstance(network, FrozenResUNet):
        other = wanted not in (None, network.dtype)
        return model, [f"it is frozen in {network.dtype}, which {dtype!r} cannot change"] * other
    reasons = refusals(network)
    if wanted is not None:
        reasons += reservations(wanted, next(network.parameters()).device)
    return (model, reasons) if reasons else (replace(model, network=freeze(network, wanted)), [])


def announcement(reasons: Sequence[str]) -> str:
    """The sentence about a model that :func:`for_inference` leaves as it is."""
    return f"the model runs as it is, not frozen for this: {'; '.join(reasons)}"


@dataclass(frozen=True)
class Settings:
    """How an image goes through the network, whatever the image.

    Args:
        threshold: probability from which a pixel is foreground, in (0, 1).
        tile: height and width of a tile, a multiple of the network's coarsest pixel; None for the
            whole image where it is small, else 512.
        overlap: pixels that neighbouring tiles share at least; None for a quarter of a tile.
        batch: tiles per forward pass.
        dtype: "float32" for the network's own precision, or "bfloat16" (frozen in it, or autocast).
    """

    threshold: float = 0.5
    tile: int | None = None
    overlap: int | None = None
    batch: int = 1
    dtype: str = "float32"

    def check(self, network: Network) -> None:
        """Raise SegmentationError for what is out of its range with this network."""
        cell = cell_size(network)
        tile, overlap = self.sizes(cell)
        for name, wrong, expected in (
            ("threshold", not 0.0 < self.threshold < 1.0, "a number between 0 and 1"),
            ("batch", self.batch < 1, "at least 1"),
            ("dtype", self.dtype not in DTYPES, f"one of {list(DTYPES)}"),
            ("tile", tile < 2 * cell or tile % cell != 0, f"a multiple of {cell} from {2 * cell}"),
            ("overlap", not 0 <= overlap <= tile - cell, f"0 to {tile - cell} for tiles of {tile}"),
        ):
            if wrong:
                raise SegmentationError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

    def sizes(self, cell: int) -> tuple[int, int]:
        """Return (tile, overlap), chosen where they were left open."""
        tile = max(TILE, 2 * cell) if self.tile is None else self.tile
        return tile, tile // 4 // cell * cell if self.overlap is None else self.overlap


def segment(
    model: str | Path | SavedModel | Network,
    image: ImageLike,
    *,
    device: str = "auto",
    on_progress: Callable[[float], object] | None = None,
    **settings: Any,
) -> Segmentation:
    """Segment one image of any size.

    `probability = sigmoid(network((x - mean) / std))`, in overlapping tiles if the image is large
    (see docs/predict.md).

    Args:
        model: a model directory, which is loaded and frozen (a warning says why where it cannot
            be); or what `checkpoint.load` returned; or a bare network in evaluation mode, or any
            function, that takes values in [0, 1]. What is no directory runs as it is, where it is:
            to freeze takes longer than a small image, and is the caller's to do, once.
        image: see `images.read_stored`.
        device: "auto", "cpu" or "cuda"; read only when `model` is a directory.
        on_progress: called with the share of the rows that are done, in (0, 1].
        settings: threshold, tile, overlap, batch, dtype: see :class:`Settings`.

    Returns:
        The segmentation, on the CPU.

    Raises:
        CheckpointError: the model directory cannot be used.
        ImageError: the image cannot be read or has the wrong number of channels.
        SegmentationError: the model refuses the image, or an argument is out of range.
        TypeError: an unknown setting.
    """
    chosen = Settings(**settings)
    if isinstance(model, str | Path):
        model = load(model, pick_device(device))
        chosen.check(model.network)
        model, reasons = for_inference(model, chosen.dtype)
        if reasons:
            warnings.warn(announcement(reasons), stacklevel=2)
    network = model.network if isinstance(model, SavedModel) else model
    chosen.check(network)
    pixels = read_stored(image)
    channels = pixels.shape[2]
    if isinstance(model, SavedModel):
        channels, normalisation = model.config.in_channels, model.config.normalisation
    else:
        normalisation = Normalisation((0.0,) * channels, (1.0,) * channels)
    solve = _Solver(network, normalisation, channels, pixels, chosen.dtype)
    start = time.perf_counter()
    probability = _assemble(solve, pixels.shape[:2], cell_size(network), chosen, on_progress)
    return Segmentation(pixels, probability, chosen.threshold, time.perf_counter() - start)


def _assemble(
    solve: _Solver,
    shape: Sequence[int],
    cell: int,
    settings: Settings,
    on_progress: Callable[[float], object] | None,
) -> Plane:
    height, width = shape
    tile, overlap = settings.sizes(cell)
    if settings.tile is None and height * width <= WHOLE:
        tile = max(height, width)
    probability = np.empty((height, width), dtype=np.float32)
    for top, rows in bands(
        solve, height, width, tile=tile, overlap=overlap, cell=cell, batch=settings.batch
    ):
        bottom = top + len(rows)
        probability[top:bottom] = rows
        if on_progress is not None:
            on_progress(bottom / height)
    return probability


@dataclass(frozen=True)
class _Solver:
    """Probabilities of windows of an image; of the image, only they become floating point."""

    network: Network
    normalisation: Normalisation
    channels: int
    pixels: Array
    dtype: str

    def __call__(self, windows: Sequence[tuple[slice, slice]]) -> list[Plane]:
        inputs = [with_channels(to_float(self.pixels[w]), self.channels) for w in windows]
        batch = torch.from_numpy(np.stack(inputs).transpose(0, 3, 1, 2).copy())
        logits = self._forward(self._network_for(windows), self.normalisation(batch))
        if logits.shape[1] != 1:
            raise SegmentationError(f"expected a model with one class, got {logits.shape[1]}")
        if not bool(torch.isfinite(logits).all()):
            raise SegmentationError("the model's output is not finite: its weights are damaged")
        return list(torch.sigmoid(logits[:, 0]).numpy())

    def _network_for(self, windows: Sequence[tuple[slice, slice]]) -> Network:
        height, width = self.pixels.shape[:2]
        if windows[0] == (slice(0, height), slice(0, width)) or not isinstance(
            self.network, Wiring
        ):
            return self.network
        return windowed(self.network, windows, (height, width))

    def _forward(self, network: Network, batch: Tensor) -> Tensor:
        if isinstance(network, nn.Module) and network.training:
            raise SegmentationError("the network is in training mode: call its eval() first")
        batch = batch.to(**_home(network))
        try:
            with torch.inference_mode(), _precision(batch.device, self.dtype):
                return network(batch).float().cpu()
        except (RuntimeError, ValueError) as error:
            raise SegmentationError(f"the model refuses the image: {first_line(error)}") from error


def _precision(device: torch.device, dtype: str) -> AbstractContextManager[object]:
    """The model's own precision, or autocast."""
    return nullcontext() if dtype == "float32" else torch.autocast(device.type, DTYPES[dtype])


def _home(network: Network) -> dict[str, Any]:
    """Where and as what a network takes its input: as it says, or like its first weight."""
    device = getattr(network, "device", None)
    if isinstance(device, torch.device):
        return {"device": device}
    if isinstance(network, nn.Module):
        for tensor in chain(network.parameters(), network.buffers()):
            if tensor.is_floating_point():
                return {"device": tensor.device, "dtype": tensor.dtype}
    return {}
