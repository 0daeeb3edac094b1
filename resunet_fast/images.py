"""Read pictures as the networks want them: channels last, values with a known range.

8-bit pictures are divided by 255, 16-bit ones by 65535. Transparent pictures are laid over white,
as viewers show them; palettes and CMYK become RGB; the orientation that a camera recorded is
applied. Of an animation or a multi-page file the first picture is taken. TIFF files with more
channels than a colour has, or with colours of more than 8 bits, keep them all. Arrays are read from
.npy files without pickles.
"""

from __future__ import annotations

import io
import struct
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from .sentences import first_line

Pixels = NDArray[np.float32]
Array = NDArray[np.generic]
ImageLike = str | Path | Image.Image | Array

# What a folder is searched for; any other file is tried when it is named.
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".npy")
# Twice the size at which Pillow warns of a decompression bomb, as Pillow itself.
LARGEST = 2 * 89_478_485

_LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)
_EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")
# TIFF tags and the channels that a colour has in each photometric interpretation.
_BITS, _PHOTOMETRIC, _SAMPLES, _EXTRA = 258, 262, 277, 338
_COLOURS = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3, 8: 3}
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_DAMAGED = (OSError, SyntaxError, ValueError, RuntimeError, LookupError, TypeError, struct.error)


class ImageError(ValueError):
    """An image that cannot be used; the message is one sentence that says why."""


def read_image(image: ImageLike) -> Pixels:
    """Read an image as [H, W, C] float32 in [0, 1].

    Args:
        image: see :func:`read_stored`.

    Raises:
        ImageError: see :func:`read_stored`; or a value lies outside [0, 1].
    """
    return to_float(read_stored(image))


def read_stored(image: ImageLike) -> Array:
    """Read an image as [H, W, C] in the type that it is stored in.

    Args:
        image: a PNG, JPEG, TIFF or .npy file, or any other that Pillow reads; a Pillow image; or an
            array [H, W] or [H, W, C] of uint8, uint16 or floating point values in [0, 1].

    Returns:
        uint8, uint16 or floating point; an array that is given is returned without a copy.

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
        if path.suffix.lower() == ".npy":
            return _from_array(_load_npy(path))
        return _read_picture(path)
    except UnidentifiedImageError as error:
        raise ImageError(f"{path} is not an image that Pillow can read") from error
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error
    except PermissionError as error:
        raise ImageError(f"{path} cannot be read: {error.strerror}") from error
    except (*_DAMAGED, Image.DecompressionBombError) as error:
        raise ImageError(f"{path} cannot be decoded: {first_line(error)}") from error


def to_float(stored: Array) -> Pixels:
    """Scale stored values to [0, 1].

    Args:
        stored: what :func:`read_stored` returned, or a window of it.

    Returns:
        float32 of the same shape, a copy.

    Raises:
        ImageError: a floating point value lies outside [0, 1] or is not a number.
    """
    pixels = stored.astype(np.float32)
    if stored.dtype in (np.uint8, np.uint16):
        pixels /= np.float32(255 if stored.dtype == np.uint8 else 65535)
    elif not (pixels.min() >= 0 and pixels.max() <= 1):
        raise ImageError(
            f"floating point pixels must lie in [0, 1], got {pixels.min():g} to {pixels.max():g}"
        )
    return pixels


def _load_npy(path: Path) -> Array:
    with path.open("rb") as file:
        if file.read(6) != b"\x93NUMPY":
            raise ImageError("it is not a .npy file")
    # Mapped, not read: a header that promises more than there is costs no memory.
    array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    return array


def _read_picture(path: Path) -> Array:
    try:
        with warnings.catch_warnings():
            # Pillow warns of large pictures; only from twice that size on does it refuse them.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                if opened.format != "TIFF" or _is_plain(opened):
                    opened.load()
                    return _from_pillow(opened)
    except UnidentifiedImageError:
        with path.open("rb") as file:
            if file.read(4) not in _TIFF:
                raise
    return _from_array(_read_tiff(path))


def _is_plain(tiff: Image.Image) -> bool:
    """Whether Pillow keeps every channel and bit: it drops extra channels, and bits of colours."""
    tags = tiff.tag_v2  # type: ignore[attr-defined]
    samples, colours = tags.get(_SAMPLES, 1), _COLOURS.get(tags.get(_PHOTOMETRIC, 1), 0)
    alpha = tags.get(_EXTRA) in ((1,), (2,))
    deep = samples > 1 and max(tags.get(_BITS, (1,))) > 8
    return samples == colours + alpha and not deep


def _read_tiff(path: Path) -> Array:
    # Only where it is needed: most pictures are not such.
    import tifffile

    try:
        with tifffile.TiffFile(path) as file:
            page = file.pages.first
            if page.imagelength * page.imagewidth > LARGEST:
                raise ImageError(f"{page.imagewidth} x {page.imagelength} pixels are too many")
            array: Array = page.asarray()
            return np.moveaxis(array, 0, -1) if page.axes == "SYX" else array
    except tifffile.TiffFileError as error:
        raise ImageError(f"damaged TIFF file: {error}") from error


def _from_pillow(image: Image.Image) -> Array:
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


def _from_integers(values: Array) -> Array:
    """A 16-bit grey picture, which Pillow may hand over in 32 bits."""
    if values.dtype == np.uint16:
        return _from_array(values)
    wide = values.astype(np.int64)
    if wide.min() < 0 or wide.max() > 65535:
        raise ImageError(
            f"integer pixels must lie between 0 and 65535, got {wide.min()} to {wide.max()}"
        )
    return _from_array(wide.astype(np.uint16))


def _from_array(array: Array) -> Array:
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise ImageError(
            f"expected an array [H, W] or [H, W, C] with pixels, got shape {list(array.shape)}"
        )
    if array.dtype not in (np.uint8, np.uint16) and not np.issubdtype(array.dtype, np.floating):
        raise ImageError(f"expected uint8, uint16 or floating point, got {array.dtype}")
    return array if array.ndim == 3 else array[:, :, None]


def to_png(image: Image.Image) -> bytes:
    """Return the content of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


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
