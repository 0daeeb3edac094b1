"""The demo's task: find handwritten digits composited onto photographs, with exact masks.

Both ingredients are real and ship inside scikit-learn and scikit-image, so nothing is downloaded;
the pictures themselves are composited, which is what makes every mask exact. Training and held-out
pictures share neither a digit nor a pixel of a photograph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from skimage import data as photographs
from sklearn.datasets import load_digits
from torch import Tensor

# All of them lie in the wheel itself. Pictures that show writing are left out: a digit there
# would be foreground that no mask mentions.
PHOTOGRAPHS = (
    "astronaut",
    "brick",
    "camera",
    "cell",
    "chelsea",
    "coffee",
    "coins",
    "grass",
    "gravel",
    "immunohistochemistry",
    "moon",
    "retina",
    "rocket",
    "stereo_motorcycle",
)
# The held-out strip of the narrowest photograph (384 columns) is then 115 pixels wide.
HELD_OUT_SHARE = 0.3
CROP = 96

Pixels = NDArray[np.float32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Split:
    """What one side of the split may draw from.

    Attributes:
        digits: [K, 8, 8] float32, ink in [0, 1].
        regions: one [H, W, 3] float32 array in [0, 1] per photograph, in the order of PHOTOGRAPHS.
    """

    digits: Pixels
    regions: tuple[Pixels, ...]


class Scene(NamedTuple):
    """One composited picture.

    Attributes:
        image: [H, W, 3] uint8.
        mask: [H, W] bool, true exactly where a digit was painted.
        photograph: the name of the photograph behind it.
    """

    image: NDArray[np.uint8]
    mask: Mask
    photograph: str


class Batch(NamedTuple):
    """Scenes as tensors: images [N, 3, H, W] float32 in [0, 1], masks [N, 1, H, W] float32 0/1."""

    images: Tensor
    masks: Tensor


def load_splits() -> tuple[Split, Split]:
    """Read digits and photographs and divide both.

    The last 30 % of each photograph along its longer side, and the last 30 % of the digit samples
    in the data set's own order, are held out.

    Returns:
        The training split and the held-out split.
    """
    digits = (load_digits().images / 16.0).astype(np.float32)
    cut = _cut(len(digits))
    pictures = [_photograph(name) for name in PHOTOGRAPHS]
    halves = [_divide(picture) for picture in pictures]
    training = Split(digits[:cut], tuple(first for first, _ in halves))
    held_out = Split(digits[cut:], tuple(second for _, second in halves))
    return training, held_out


def _cut(length: int) -> int:
    return length - int(length * HELD_OUT_SHARE)


def _photograph(name: str) -> Pixels:
    loaded = getattr(photographs, name)()
    # The stereo pair shows one scene twice: its right picture would leak across the split.
    picture = loaded[0] if isinstance(loaded, tuple) else loaded
    if picture.ndim == 2:
        picture = np.repeat(picture[:, :, None], 3, axis=2)
    pixels: Pixels = picture.astype(np.float32) / np.float32(255)
    return pixels


def _divide(picture: Pixels) -> tuple[Pixels, Pixels]:
    height, width = picture.shape[:2]
    if width >= height:
        return picture[:, : _cut(width)], picture[:, _cut(width) :]
    return picture[: _cut(height)], picture[_cut(height) :]


def render_digit(digit: Pixels, side: int, angle: float) -> Mask:
    """Enlarge one 8 x 8 digit, rotate it and cut it at half ink.

    Args:
        digit: [8, 8] float32, ink in [0, 1].
        side: height and width of the result in pixels.
        angle: counter-clockwise rotation in radians.

    Returns:
        [side, side] bool, true where there is ink.
    """
    cosine, sine = math.cos(angle), math.sin(angle)
    theta = torch.tensor([[[cosine, -sine, 0.0], [sine, cosine, 0.0]]])
    grid = F.affine_grid(theta, [1, 1, side, side], align_corners=False)
    ink = F.grid_sample(
        torch.from_numpy(digit)[None, None], grid, mode="bicubic", align_corners=False
    )
    mask: Mask = (ink[0, 0] > 0.5).numpy()
    return mask


def paint(image: Pixels, stroke: Mask, rng: np.random.Generator) -> None:
    """Paint one stroke onto an image in place, lighter or darker than what lies under it.

    Args:
        image: [H, W, 3] float32 in [0, 1]; changed where `stroke` is true and nowhere else.
        stroke: [H, W] bool.
        rng: gives polarity, contrast (0.3 to 0.7), tint and opacity (0.8 to 1).
    """
    under = float(image[stroke].mean())
    change = float(rng.choice((-1.0, 1.0)) * rng.uniform(0.3, 0.7))
    if not 0.0 <= under + change <= 1.0:
        change = -change
    ink = under + change + rng.uniform(-0.05, 0.05, size=3)
    opacity = rng.uniform(0.8, 1.0)
    image[stroke] = np.clip((1 - opacity) * image[stroke] + opacity * ink, 0, 1)


def add_noise(image: Pixels, rng: np.random.Generator) -> None:
    """Add Gaussian noise of a random strength, up to 0.03, to an image in place."""
    image += rng.normal(0.0, rng.uniform(0.0, 0.03), size=image.shape).astype(np.float32)


def compose(
    split: Split, rng: np.random.Generator, index: int, size: tuple[int, int] = (CROP, CROP)
) -> Scene:
    """Cut a random piece out of one photograph and paint random digits onto it.

    Args:
        split: where digits and photograph come from.
        rng: every random choice is drawn from it.
        index: which photograph.
        size: height and width in pixels, each cut to what the region has.

    Returns:
        The picture, after image noise and rounding to 8 bits, with its exact mask.
    """
    image = _crop(split.regions[index], rng, size)
    height, width = image.shape[:2]
    mask = np.zeros((height, width), dtype=np.bool_)
    for _ in range(_digit_count(rng, height * width)):
        stroke = _place(split.digits[rng.integers(len(split.digits))], mask, rng)
        if stroke is not None:
            paint(image, stroke, rng)
            mask |= stroke
    add_noise(image, rng)
    eight_bits = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
    return Scene(eight_bits, mask, PHOTOGRAPHS[index])


def _place(digit: Pixels, taken: Mask, rng: np.random.Generator) -> Mask | None:
    height, width = taken.shape
    for _ in range(10):
        side = int(rng.integers(28, min(60, height, width) + 1))
        top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
        glyph = render_digit(digit, side, rng.uniform(-math.pi / 4, math.pi / 4))
        stroke = np.zeros_like(taken)
        stroke[top : top + side, left : left + side] = glyph
        if not (stroke & taken).any():
            return stroke
    return None


def _crop(region: Pixels, rng: np.random.Generator, size: tuple[int, int]) -> Pixels:
    height, width = min(size[0], region.shape[0]), min(size[1], region.shape[1])
    top = rng.integers(region.shape[0] - height + 1)
    left = rng.integers(region.shape[1] - width + 1)
    piece: Pixels = region[top : top + height, left : left + width].copy()
    return piece if rng.random() < 0.5 else np.ascontiguousarray(piece[:, ::-1])


def _digit_count(rng: np.random.Generator, area: int) -> int:
    # One to four digits on a training crop, as densely on larger pictures; fewer where none fits.
    return max(1, round(int(rng.integers(1, 5)) * area / CROP**2))


def scenes(
    split: Split, rng: np.random.Generator, count: int, size: tuple[int, int] = (CROP, CROP)
) -> list[Scene]:
    """Compose pictures that go through the photographs in random order, each as often as the next.

    Args:
        split: where digits and photographs come from.
        rng: every random choice is drawn from it.
        count: how many.
        size: height and width in pixels.

    Returns:
        `count` scenes.
    """
    rounds = -(-count // len(split.regions))
    order = np.concatenate([rng.permutation(len(split.regions)) for _ in range(rounds)])
    return [compose(split, rng, int(index), size) for index in order[:count]]


def to_batch(pictures: list[Scene]) -> Batch:
    """Stack scenes of one size into tensors on the CPU."""
    images = torch.from_numpy(np.stack([scene.image for scene in pictures]))
    masks = torch.from_numpy(np.stack([scene.mask for scene in pictures]))
    return Batch(images.permute(0, 3, 1, 2).contiguous() / 255, masks[:, None].float())


def pixel_statistics(split: Split) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each colour channel, every photograph weighing the same."""
    regions = [region.reshape(-1, 3).astype(np.float64) for region in split.regions]
    mean = np.mean([pixels.mean(axis=0) for pixels in regions], axis=0)
    square = np.mean([(pixels**2).mean(axis=0) for pixels in regions], axis=0)
    std = np.sqrt(square - mean**2)
    return tuple(mean.round(4).tolist()), tuple(std.round(4).tolist())
