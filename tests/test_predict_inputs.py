"""`predict`: what it reads, what it writes where, and what becomes of bad input and of a kill."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from saved_models import expect_one_line, random_pixels, run
from saved_models import model_dir as model_dir

import resunet_fast as rf
from resunet_fast import cli
from resunet_fast.images import read_image, read_stored
from resunet_fast.segmentation import segment


def write_png(path: Path, height: int = 12, width: int = 14) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(random_pixels(height, width, 3)).save(path)
    return path


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# What is read


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_tiff_keeps_every_channel_and_bit(
    channels: int, planar: bool, dtype: type, tmp_path: Path
) -> None:
    largest = np.iinfo(dtype).max
    values = np.random.default_rng(0).integers(0, largest + 1, (6, 7, channels)).astype(dtype)
    stored = np.moveaxis(values, -1, 0) if planar and channels > 1 else values.squeeze()
    tifffile.imwrite(
        tmp_path / "x.tif",
        stored,
        photometric="rgb" if channels == 3 else "minisblack",
        planarconfig=("separate" if planar else "contig") if channels > 1 else None,
    )
    np.testing.assert_array_equal(read_stored(tmp_path / "x.tif"), values)
    np.testing.assert_allclose(read_image(tmp_path / "x.tif"), values / largest, rtol=1e-6)


def test_arrays_are_read_from_files(tmp_path: Path) -> None:
    for number, values in enumerate(
        (random_pixels(5, 6), random_pixels(5, 6, 4), np.random.default_rng(0).random((5, 6, 3)))
    ):
        path = tmp_path / f"{number}.npy"
        np.save(path, values)
        stored = read_stored(path)
        assert stored.dtype == values.dtype
        np.testing.assert_array_equal(stored.squeeze(), values)


def test_arrays_are_mapped_not_read(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", random_pixels(5, 6, 3))
    assert isinstance(read_stored(tmp_path / "x.npy"), np.memmap)


def test_the_python_side_has_the_same_features(model_dir: Path, tmp_path: Path) -> None:
    image = write_png(tmp_path / "x.png", 50, 40)
    result = rf.segment(model_dir, image, tile=16, overlap=8, batch=2, device="cpu")
    arguments = ("--tile", 16, "--overlap", 8, "--batch", 2, "--save", "mask,probability")
    assert run("predict", "--model", model_dir, image, "--out", tmp_path / "out", *arguments) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "out/x_probability.npy"), result.probability)


# Which files, and where the results go


def test_folders_and_patterns(model_dir: Path, tmp_path: Path) -> None:
    for name in ("a.png", "b.JPG", "c.tif", "deeper/d.png"):
        write_png(tmp_path / "in" / name)
    np.save(tmp_path / "in" / "e.npy", random_pixels(8, 8, 3))
    (tmp_path / "in" / "notes.txt").write_text("not an image, and not taken for one")
    kinds = ("--save", "mask", "--out", tmp_path / "out")
    assert run("predict", "--model", model_dir, tmp_path / "in", *kinds) == 0
    assert names(tmp_path / "out") == [f"{stem}_mask.png" for stem in "abce"]
    shutil.rmtree(tmp_path / "out")
    assert run("predict", "--model", model_dir, tmp_path / "in" / "**" / "*.png", *kinds) == 0
    assert names(tmp_path / "out") == ["a_mask.png", "deeper/d_mask.png"]


def test_the_same_stem_in_two_folders(model_dir: Path, tmp_path: Path) -> None:
    images = [write_png(tmp_path / folder / "x.png", 9, 9 + i) for i, folder in enumerate("ab")]
    arguments = ("--save", "mask", "--out", tmp_path / "out")
    assert run("predict", "--model", model_dir, *images, *arguments) == 0
    assert names(tmp_path / "out") == ["a/x_mask.png", "b/x_mask.png"]
    for folder, width in (("a", 9), ("b", 10)):
        with Image.open(tmp_path / "out" / folder / "x_mask.png") as mask:
            assert mask.size == (width, 9)


def test_a_file_that_is_named_twice_is_done_once(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = write_png(tmp_path / "in" / "x.png")
    arguments = (image, tmp_path / "in", image, "--out", tmp_path / "out")
    assert run("predict", "--model", model_dir, *arguments) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_every_kind_of_result(model_dir: Path, tmp_path: Path) -> None:
    image = write_png(tmp_path / "x.png")
    kinds = "mask,overlay,probability,probability-png"
    out = tmp_path / "out"
    assert run("predict", "--model", model_dir, image, "--out", out, "--save", kinds) == 0
    probability = segment(model_dir, image).probability
    stored = np.load(out / "x_probability.npy", allow_pickle=False)
    assert stored.dtype == np.float32
    np.testing.assert_array_equal(stored, probability)
    with Image.open(out / "x_probability.png") as picture:
        np.testing.assert_allclose(np.asarray(picture) / 65535, probability, atol=1e-5)
    assert names(out) == [
        "x_mask.png",
        "x_overlay.png",
        "x_probability.npy",
        "x_probability.png",
    ]


# Bad input: one line each, nothing written


def truncated(path: Path, keep: float = 0.5) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    return path


def saved_as(suffix: str) -> Callable[[Path], Path]:
    def write(tmp: Path) -> Path:
        Image.fromarray(random_pixels(64, 64, 3)).save(tmp / f"cut.{suffix}")
        return truncated(tmp / f"cut.{suffix}")

    return write


def array(values: object, **options: bool) -> Callable[[Path], Path]:
    def write(tmp: Path) -> Path:
        np.save(tmp / "x.npy", values, **options)
        return tmp / "x.npy"

    return write


def content(name: str, data: bytes) -> Callable[[Path], Path]:
    def write(tmp: Path) -> Path:
        (tmp / name).write_bytes(data)
        return tmp / name

    return write


def npy_that_promises_too_much(tmp: Path) -> Path:
    header = io.BytesIO()
    shape = (10**6, 10**6, 3)
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": shape}
    )
    (tmp / "bomb.npy").write_bytes(header.getvalue())
    return tmp / "bomb.npy"


def png_that_promises_too_much(tmp: Path) -> Path:
    write_png(tmp / "bomb.png")
    data = bytearray((tmp / "bomb.png").read_bytes())
    data[16:24] = (100_000).to_bytes(4, "big") * 2

    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    (tmp / "bomb.png").write_bytes(data)
    return tmp / "bomb.png"


def tiff_with_channels(tmp: Path) -> Path:
    tifffile.imwrite(
        tmp / "x.tif", random_pixels(8, 8, 5), photometric="minisblack", planarconfig="contig"
    )
    return tmp / "x.tif"


def truncated_deep_tiff(tmp: Path) -> Path:
    values = random_pixels(64, 64, 5).astype(np.uint16)
    tifffile.imwrite(tmp / "x.tif", values, photometric="minisblack", planarconfig="contig")
    return truncated(tmp / "x.tif", 0.8)


BAD_IMAGES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "folder without images": (lambda tmp: tmp, "a folder without images (.png, .jpg"),
    "pattern without matches": (lambda tmp: tmp / "*.png", "matches no file"),
    "empty file": (content("x.png", b""), "not an image"),
    "empty array file": (content("x.npy", b""), "not a .npy file"),
    "text named .jpg": (content("x.jpg", b"hello"), "not an image"),
    "text named .npy": (content("x.npy", b"hello, world"), "not a .npy file"),
    "unknown suffix": (content("x.xyz", b"\x00" * 100), "not an image"),
    "truncated JPEG": (saved_as("jpg"), "cannot be decoded"),
    "truncated PNG": (saved_as("png"), "cannot be decoded"),
    "truncated TIFF": (saved_as("tif"), "cut.tif"),
    "truncated deep TIFF": (truncated_deep_tiff, "cannot be decoded"),
    "pickle": (array(np.array([{}], dtype=object), allow_pickle=True), "cannot be decoded"),
    "array of text": (array(np.full((4, 4), "x")), "expected uint8, uint16 or floating"),
    "array of integers": (array(np.zeros((4, 4), np.int32)), "floating point, got int32"),
    "array with four axes": (array(np.zeros((1, 4, 4, 3), np.uint8)), "got shape [1, 4, 4, 3]"),
    "empty array": (array(np.zeros((0, 4), np.uint8)), "got shape [0, 4]"),
    "NaN": (array(np.full((4, 4, 3), np.nan)), "must lie in [0, 1], got nan to nan"),
    "beyond 1": (array(np.full((4, 4, 3), 255.0)), "must lie in [0, 1], got 255 to 255"),
    "array bomb": (npy_that_promises_too_much, "cannot be decoded"),
    "picture bomb": (png_that_promises_too_much, "exceeds limit"),
    "five channels": (tiff_with_channels, "takes 3 channels, the image has 5"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_images(
    case: str, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, phrase = BAD_IMAGES[case]
    (tmp_path / "in").mkdir()
    image = make(tmp_path / "in")
    code = run("predict", "--model", model_dir, image, "--out", tmp_path / "out")
    expect_one_line(capsys, code, phrase, tmp_path)


BAD_ARGUMENTS: dict[str, tuple[tuple[object, ...], str]] = {
    "tile 0": (("--tile", 0), "--tile: expected a multiple of 2 from 4, got 0"),
    "tile negative": (("--tile=-64",), "--tile: expected a multiple of 2 from 4, got -64"),
    "tile odd": (("--tile", 33), "--tile: expected a multiple of 2 from 4, got 33"),
    "tile a word": (("--tile", "big"), "argument --tile: invalid int value: 'big'"),
    "overlap as the tile": (("--tile", 32, "--overlap", 32), "--overlap: expected 0 to 30"),
    "overlap negative": (("--overlap=-1",), "--overlap: expected 0 to"),
    "batch 0": (("--batch", 0), "--batch: expected at least 1, got 0"),
    "device": (("--device", "tpu"), "argument --device: invalid choice: 'tpu'"),
    "dtype": (("--dtype", "int8"), "argument --dtype: invalid choice: 'int8'"),
    "kind": (("--save", "mask,video"), "got 'video'"),
    "option": (("--bogus",), "unrecognized arguments: --bogus"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments(
    case: str, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, phrase = BAD_ARGUMENTS[case]
    image = write_png(tmp_path / "x.png")
    try:
        code = run("predict", "--model", model_dir, image, "--out", tmp_path / "out", *arguments)
    except SystemExit as stop:  # argparse's own way out
        code = stop.code
    expect_one_line(capsys, code, phrase, tmp_path)


def test_an_unreadable_file(
    model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Simulated: the administrator, who may run the tests, reads everything."""
    image = write_png(tmp_path / "x.png")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(image))

    monkeypatch.setattr("resunet_fast.images.Image.open", refuse)
    code = run("predict", "--model", model_dir, image, "--out", tmp_path / "out")
    expect_one_line(capsys, code, "x.png cannot be read: Permission denied", tmp_path)


def test_the_code_says_whether_some_or_all_failed(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = write_png(tmp_path / "good.png"), content("bad.png", b"x")(tmp_path)
    out = ("--out", tmp_path / "out")
    assert run("predict", "--model", model_dir, bad, good, *out) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert names(tmp_path / "out") == ["good_mask.png", "good_overlay.png"]
    assert run("predict", "--model", model_dir, bad, *out) == 2
    assert run("predict", "--model", model_dir, good, tmp_path / "*.tif", *out) == 1
    assert run("predict", "--model", model_dir, good, *out) == 0


def test_a_picture_that_is_damaged_far_down_writes_nothing(model_dir: Path, tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((100, 20, 3))
    values[97, 3, 1] = np.nan
    np.save(tmp_path / "x.npy", values)
    arguments = ("--tile", 16, "--out", tmp_path / "out")
    assert run("predict", "--model", model_dir, tmp_path / "x.npy", *arguments) == 2
    assert not (tmp_path / "out").exists()


# Killed in the middle

KILLED = """
import sys
import zlib
from pathlib import Path
from resunet_fast import checkpoint, cli
write = Path.write_bytes
def write_half(self, data):
    if self.name.startswith(".x_{kind}"):
        write(self, data[: len(data) // 2])
        print("half", flush=True)
        sys.stdin.read()
    return write(self, data)
Path.write_bytes = write_half
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("kind", ["mask", "overlay"])
def test_killed_while_writing(kind: str, model_dir: Path, tmp_path: Path) -> None:
    image = write_png(tmp_path / "x.png")
    out = tmp_path / "out"
    arguments = ["predict", "--model", str(model_dir), str(image), "--out", str(out)]
    assert run(*arguments) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED.replace("{kind}", kind), *arguments, "--threshold", "0.9"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])},
    )
    assert process.stdout.readline() == b"half\n"
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdin.close()
    process.stdout.close()
    for name in before:
        with Image.open(out / name) as picture:
            picture.load()
    # What was half written is the old file still, and the half lies hidden beside it.
    assert (out / f"x_{kind}.png").read_bytes() == before[f"x_{kind}.png"]
    left = [path.name for path in out.iterdir() if path.name not in before]
    assert all(name.startswith(".") and name.endswith(".tmp") for name in left)
    assert run(*arguments) == 0
    assert {name: (out / name).read_bytes() for name in before} == before
