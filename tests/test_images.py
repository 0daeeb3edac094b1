"""Pictures and arrays as the networks want them, or one sentence."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from saved_models import random_pixels, run, save_model

from resunet_fast import images
from resunet_fast.images import ImageError, read_image, read_stored


def test_grey_and_colour_files_keep_their_values(tmp_path: Path) -> None:
    for shape in ((5, 6), (5, 6, 3)):
        pixels = random_pixels(*shape)
        Image.fromarray(pixels).save(tmp_path / "x.png")
        expected = pixels.reshape(5, 6, -1).astype(np.float32) / 255
        np.testing.assert_array_equal(read_image(tmp_path / "x.png"), expected)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled_by_65535(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 257, 65535], [1, 32768, 40000]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"x.{suffix}")
    expected = (values / 65535)[:, :, None]
    np.testing.assert_allclose(read_image(tmp_path / f"x.{suffix}"), expected, rtol=1e-6)


def test_transparent_pixels_lie_over_white(tmp_path: Path) -> None:
    pixels = np.zeros((1, 3, 4), dtype=np.uint8)
    pixels[0, :, 3] = (255, 0, 51)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    expected = np.repeat(np.array([0, 1, 0.8], dtype=np.float32)[None, :, None], 3, axis=2)
    np.testing.assert_allclose(read_image(tmp_path / "x.png"), expected, atol=1e-6)


def test_palette_bilevel_and_cmyk_are_converted() -> None:
    colour = Image.fromarray(random_pixels(4, 5, 3))
    palette = colour.quantize(8)
    np.testing.assert_array_equal(read_image(palette), read_image(palette.convert("RGB")))
    assert read_image(colour.convert("CMYK")).shape == (4, 5, 3)
    assert set(np.unique(read_image(colour.convert("1")))) <= {0.0, 1.0}
    assert read_image(colour.convert("1")).shape == (4, 5, 1)


def test_camera_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.fromarray(random_pixels(4, 6, 3))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "x.png", exif=exif)
    expected = np.rot90(np.asarray(image), -1).astype(np.float32) / 255
    np.testing.assert_array_equal(read_image(tmp_path / "x.png"), expected)


def test_colour_of_sixteen_bits_in_a_png_is_read_with_eight(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (4, 5, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)  # 0: not filtered
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", 5, 4, 16, 2, 0, 0, 0),
        b"IDAT": zlib.compress(rows),
        b"IEND": b"",
    }
    (tmp_path / "x.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in chunks.items()
        )
    )
    stored = read_stored(tmp_path / "x.png")
    assert stored.dtype == np.uint8
    np.testing.assert_allclose(stored / 255, values / 65535, atol=1 / 255)


@pytest.mark.parametrize("channels", [3, 5])
def test_of_several_pages_the_first_is_read(channels: int, tmp_path: Path) -> None:
    pages = random_pixels(3, 6, 7, channels)
    with tifffile.TiffWriter(tmp_path / "x.tif") as file:
        for page in pages:
            file.write(page, photometric="rgb" if channels == 3 else "minisblack", planarconfig=1)
    np.testing.assert_array_equal(read_stored(tmp_path / "x.tif"), pages[0])


def test_deep_pictures_have_the_same_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert images.LARGEST == 178_956_970
    monkeypatch.setattr(images, "LARGEST", 41)
    values = random_pixels(6, 7, 5)
    tifffile.imwrite(tmp_path / "x.tif", values, photometric="minisblack", planarconfig="contig")
    with pytest.raises(ImageError, match="7 x 6 pixels are too many"):
        read_stored(tmp_path / "x.tif")


@pytest.mark.parametrize(
    ("array", "phrase"),
    [
        (np.zeros((3, 4, 3), dtype=np.int64), "uint8, uint16 or floating point, got int64"),
        (np.full((3, 4), 1.5), r"must lie in \[0, 1\]"),
        (np.full((3, 4), np.nan), r"must lie in \[0, 1\]"),
        (np.zeros((3,), dtype=np.uint8), r"got shape \[3\]"),
        (np.zeros((0, 4), dtype=np.uint8), r"got shape \[0, 4\]"),
    ],
)
def test_arrays_without_a_known_meaning_are_refused(array: np.ndarray, phrase: str) -> None:
    with pytest.raises(ImageError, match=phrase):
        read_image(array)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "I;16"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_reaches_grey_and_colour_models(
    tmp_path: Path, mode: str, channels: int
) -> None:
    model = save_model(tmp_path / "model", channels)
    if mode == "I;16":
        image = Image.fromarray(np.arange(80, dtype=np.uint16).reshape(8, 10) * 800)
    else:
        image = Image.fromarray(random_pixels(8, 10, 3)).convert(mode)
    image.save(tmp_path / "x.png")
    assert run("predict", "--model", model, tmp_path / "x.png", "--out", tmp_path) == 0
    with Image.open(tmp_path / "x_mask.png") as mask:
        assert (mask.mode, mask.size) == ("L", (10, 8))
