"""Read pictures as the networks want them: channels last, floating point, values in [0, 1].

8-bit pictures are divided by 255, 16-bit ones by 65535. Transparent pictures are laid over white,
as viewers show them; palettes become RGB; the orientation that a camera recorded is applied. Of an
animation or a multi-page file the first picture is taken.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

Pixels = NDArray[np.float32]
ImageLike = str | Path | Image.Image | NDArray[np.generic]

_LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)
_EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")


class ImageError(ValueError):
    """An image that cannot be used; the message is one sentence that says why."""


def read_image(image: ImageLike) -> Pixels:
    """Read an image as [H, W, C] float32 in [0, 1]; C is 1 or 3 for files.

    Args:
        image: a file, a Pillow image, or an array [H, W] or [H, W, C] of uint8, uint16 or
            floating point values in [0, 1].

    Raises:
        ImageError: it is not an image, is damaged, or holds values without a known range.
    """
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if isinstance(image, Image.Image):
        return _from_pillow(image)
    path = Path(image)
    if not path.is_file():
        raise ImageError(f"{path} does not exist or is not a file")
    try:
        with warnings.catch_warnings():
            # Pillow warns of large pictures; only from twice that size on does it refuse them.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                opened.load()
                return _from_pillow(opened)
    except UnidentifiedImageError as error:
        raise ImageError(f"{path} is not an image that Pillow can read") from error
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"{path} cannot be decoded: {str(error).splitlines()[0]}") from error


def _from_pillow(image: Image.Image) -> Pixels:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        return _from_integers(np.asarray(image))
    if image.mode == "F":
        return _from_array(np.asarray(image))
    if image.mode not in _EIGHT_BIT_MODES:
        raise ImageError(f"colour mode {image.mode!r} is not supported")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    elif image.mode not in ("L", "RGB"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    return _from_array(np.asarray(image))


def _from_integers(values: NDArray[np.generic]) -> Pixels:
    """A 16-bit grey picture, which Pillow may hand over in 32 bits."""
    wide = values.astype(np.int64)
    if wide.min() < 0 or wide.max() > 65535:
        raise ImageError(
            f"integer pixels must lie between 0 and 65535, got {wide.min()} to {wide.max()}"
        )
    return _from_array(wide.astype(np.uint16))


def _from_array(array: NDArray[np.generic]) -> Pixels:
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise ImageError(
            f"expected an array [H, W] or [H, W, C] with pixels, got shape {list(array.shape)}"
        )
    pixels = array.astype(np.float32)
    if array.dtype in (np.uint8, np.uint16):
        pixels /= np.float32(255 if array.dtype == np.uint8 else 65535)
    elif not np.issubdtype(array.dtype, np.floating):
        raise ImageError(f"expected uint8, uint16 or floating point, got {array.dtype}")
    elif not (pixels.min() >= 0 and pixels.max() <= 1):
        raise ImageError(
            f"floating point pixels must lie in [0, 1], got {pixels.min():g} to {pixels.max():g}"
        )
    return pixels if array.ndim == 3 else pixels[:, :, None]


def with_channels(pixels: Pixels, wanted: int) -> Pixels:
    """Turn grey into three equal channels, or colour into luminance, where the model needs it.

    Args:
        pixels: [H, W, C] float32.
        wanted: the model's number of input channels.

    Returns:
        [H, W, wanted] float32.

    Raises:
        ImageError: C and `wanted` differ and are not 1 and 3.
    """
    channels = pixels.shape[2]
    if channels == wanted:
        return pixels
    if channels == 1 and wanted == 3:
        return np.repeat(pixels, 3, axis=2)
    if channels == 3 and wanted == 1:
        grey: Pixels = (pixels @ _LUMINANCE)[:, :, None]
        return grey
    raise ImageError(f"the model takes {wanted} channels, the image has {channels}")
