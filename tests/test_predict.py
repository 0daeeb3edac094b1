"""Segmentation from Python and by `predict`: what works, and one sentence for what does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from saved_models import expect_one_line, random_pixels, run, save_model
from saved_models import model_dir as model_dir
from saved_models import photo as photo
from torch import nn

from resunet_fast import checkpoint
from resunet_fast.segmentation import SegmentationError, segment

# From Python


@pytest.mark.parametrize(("height", "width"), [(2, 2), (17, 33), (64, 5), (40, 40)])
def test_any_size(model_dir: Path, height: int, width: int) -> None:
    result = segment(model_dir, random_pixels(height, width, 3), device="cpu")
    assert result.mask.shape == result.probability.shape == (height, width)
    assert result.mask.dtype == np.bool_
    assert np.array_equal(result.mask, result.probability >= 0.5)
    assert result.foreground_share == pytest.approx(result.mask.mean())


def test_prediction_is_the_network_on_normalised_pixels(model_dir: Path) -> None:
    pixels = random_pixels(12, 10, 3)
    model = checkpoint.load(model_dir)
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        expected = torch.sigmoid(model.network((x - 0.4) / 0.25))[0, 0].numpy()
    np.testing.assert_allclose(segment(model, pixels).probability, expected, atol=1e-5)


def test_threshold_moves_the_mask(model_dir: Path) -> None:
    pixels = random_pixels(16, 16, 3)
    probability = segment(model_dir, pixels, device="cpu").probability
    middle = float(np.median(probability))
    result = segment(model_dir, pixels, threshold=middle, device="cpu")
    assert 0.4 < result.foreground_share < 0.6
    with pytest.raises(SegmentationError, match="between 0 and 1, got 1"):
        segment(model_dir, pixels, threshold=1.0)


def test_a_bare_network_takes_plain_pixels() -> None:
    network = nn.Conv2d(3, 1, 1).eval()
    pixels = random_pixels(6, 7, 3)
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    expected = torch.sigmoid(network(x))[0, 0].detach().numpy()
    np.testing.assert_allclose(segment(network, pixels).probability, expected, atol=1e-6)
    with pytest.raises(SegmentationError, match="training mode"):
        segment(network.train(), pixels)


def test_output_that_is_not_finite_is_refused() -> None:
    network = nn.Conv2d(3, 1, 1).eval()
    nn.init.constant_(network.weight, float("nan"))
    with pytest.raises(SegmentationError, match="not finite"):
        segment(network, random_pixels(4, 4, 3))


def test_a_model_with_several_classes_is_refused() -> None:
    with pytest.raises(SegmentationError, match="one class, got 2"):
        segment(nn.Conv2d(3, 2, 1).eval(), random_pixels(4, 4, 3))


# The command


def test_command_writes_mask_and_overlay_and_one_line_each(
    model_dir: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.jpg"
    Image.fromarray(random_pixels(9, 13)).save(other)
    assert run("predict", "--model", model_dir, photo, other, "--out", tmp_path / "out") == 0
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["other_mask.png", "other_overlay.png", "photo_mask.png", "photo_overlay.png"]
    result = segment(model_dir, photo)
    mask = np.asarray(Image.open(tmp_path / "out" / "photo_mask.png"))
    np.testing.assert_array_equal(mask, result.mask * np.uint8(255))
    with Image.open(tmp_path / "out" / "photo_overlay.png") as overlay:
        assert (overlay.mode, overlay.size) == ("RGB", (34, 21))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "34 x 21 pixels" in lines[0]
    assert f"{result.foreground_share:.1%}" in lines[0]


def test_out_may_name_the_mask_file(model_dir: Path, photo: Path, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "m.png"
    assert run("predict", "--model", model_dir, photo, "--out", target) == 0
    assert sorted(path.name for path in target.parent.iterdir()) == ["m.png", "m_overlay.png"]


def test_the_overlay_changes_exactly_the_foreground(model_dir: Path, photo: Path) -> None:
    threshold = float(np.median(segment(model_dir, photo).probability))
    result = segment(model_dir, photo, threshold=threshold)
    changed = (np.asarray(result.overlay_image()) != np.asarray(Image.open(photo))).any(axis=2)
    np.testing.assert_array_equal(changed, result.mask)


def test_a_bad_image_does_not_stop_the_others(
    model_dir: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run("predict", "--model", model_dir, tmp_path / "no.png", photo, "--out", tmp_path)
    assert code == 1
    assert (tmp_path / "photo_mask.png").exists()
    assert len(capsys.readouterr().err.splitlines()) == 1


def write_text_image(tmp: Path) -> Path:
    (tmp / "text.png").write_text("this is not a picture")
    return tmp / "text.png"


def write_truncated_image(tmp: Path) -> Path:
    path = tmp / "cut.png"
    Image.fromarray(random_pixels(64, 64, 3)).save(path)
    path.write_bytes(path.read_bytes()[:4000])
    return path


def write_tiny_image(tmp: Path) -> Path:
    Image.fromarray(random_pixels(1, 1, 3)).save(tmp / "tiny.png")
    return tmp / "tiny.png"


def write_wide_integers(tmp: Path) -> Path:
    Image.fromarray(np.full((4, 4), 70000, dtype=np.int32)).save(tmp / "wide.tif")
    return tmp / "wide.tif"


BAD_IMAGES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda tmp: tmp / "no.png", "does not exist"),
    "directory": (lambda tmp: tmp, "a folder without images"),
    "text": (write_text_image, "not an image"),
    "truncated": (write_truncated_image, "cannot be decoded"),
    "too small": (write_tiny_image, "1 x 1"),
    "wide integers": (write_wide_integers, "between 0 and 65535, got 70000"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_images(
    case: str, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, phrase = BAD_IMAGES[case]
    image = make(tmp_path)
    code = run("predict", "--model", model_dir, image, "--out", tmp_path / "out")
    expect_one_line(capsys, code, phrase, tmp_path)


def test_channels_that_the_model_does_not_take(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_model(tmp_path / "model", in_channels=2)
    code = run("predict", "--model", model, photo, "--out", tmp_path / "out")
    expect_one_line(capsys, code, "takes 2 channels, the image has 3", tmp_path)


def test_results_never_overwrite_inputs_or_each_other(
    model_dir: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twin = photo.with_suffix(".jpg")
    before = photo.read_bytes()
    for arguments, phrase in (
        ((photo, twin, "--out", tmp_path / "out"), "both be written to photo_mask.png"),
        ((photo, "--out", photo), "would overwrite an input"),
        ((photo, twin, "--out", tmp_path / "one.png"), "names one file, but 2 images"),
    ):
        code = run("predict", "--model", model_dir, *arguments)
        expect_one_line(capsys, code, phrase, tmp_path)
    assert photo.read_bytes() == before


def test_an_unwritable_out_is_one_line(
    model_dir: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    code = run("predict", "--model", model_dir, photo, "--out", tmp_path / "file" / "sub")
    expect_one_line(capsys, code, "cannot write to", tmp_path)


@pytest.mark.parametrize("threshold", ["0", "1", "-2", "nan"])
def test_thresholds_outside_the_open_interval(
    threshold: str,
    model_dir: Path,
    photo: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = (photo, "--out", tmp_path / "out", f"--threshold={threshold}")
    code = run("predict", "--model", model_dir, *arguments)
    expect_one_line(capsys, code, "--threshold: expected a number between 0 and 1", tmp_path)


def test_cuda_where_there_is_none(
    model_dir: Path,
    photo: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = (photo, "--out", tmp_path / "out", "--device", "cuda")
    code = run("predict", "--model", model_dir, *arguments)
    expect_one_line(capsys, code, "no usable CUDA GPU", tmp_path)
