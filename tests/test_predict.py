"""Saved models, `predict` and the command line: what works, and one sentence for what does not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from resunet_fast import checkpoint, cli
from resunet_fast.checkpoint import CheckpointError, ModelConfig, Normalisation
from resunet_fast.images import ImageError, read_image
from resunet_fast.segmentation import SegmentationError, segment


def config_of(in_channels: int = 3, num_classes: int = 1) -> ModelConfig:
    return ModelConfig(
        name="resunet",
        in_channels=in_channels,
        num_classes=num_classes,
        arguments={"base_width": 4, "width_factors": (1, 2)},
        normalisation=Normalisation((0.4,) * in_channels, (0.25,) * in_channels),
        training={"steps": 3},
    )


def save_model(directory: Path, in_channels: int = 3) -> Path:
    torch.manual_seed(3)
    config = config_of(in_channels)
    network = config.build()
    # Fresh batch statistics are 0 and 1; a round trip must also keep others.
    network.train()(torch.rand(2, in_channels, 8, 8))
    checkpoint.save(directory, network, config)
    return directory


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(random_pixels(21, 34, 3)).save(path)
    return path


def random_pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def run_python(arguments: list[str], directory: Path) -> subprocess.CompletedProcess[str]:
    """Run Python elsewhere; it finds the package whether or not it is installed."""
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=directory,
        env=environment,
    )


# Saving and loading


def test_round_trip_keeps_weights_config_and_output(tmp_path: Path) -> None:
    directory = save_model(tmp_path / "new" / "model")
    loaded = checkpoint.load(directory)
    assert loaded.config == config_of()
    assert not loaded.network.training
    stored = load_file(directory / "model.safetensors")
    state = loaded.network.state_dict()
    assert state.keys() == stored.keys()
    assert all(torch.equal(state[key], stored[key]) for key in stored)
    assert sorted(path.name for path in directory.iterdir()) == ["config.json", "model.safetensors"]


def test_saving_again_replaces_both_files(tmp_path: Path) -> None:
    directory = save_model(tmp_path / "model")
    config = config_of(in_channels=1)
    checkpoint.save(directory, config.build(), config)
    assert checkpoint.load(directory).config == config


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")

    def fail(self: Path, destination: Path) -> Path:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.write_atomically(target, b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert target.read_bytes() == b"old"


# Prediction from Python


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


# Reading images


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
    assert run("predict", "--model", model_dir, image, "--out", tmp_path / "out") == 2
    expect_one_line(capsys, phrase, tmp_path)


def expect_one_line(capsys: pytest.CaptureFixture[str], phrase: str, tmp_path: Path) -> None:
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert phrase in lines[0]
    assert captured.out == ""
    assert not (tmp_path / "out").exists()


def edit_config(key: str, value: object) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        document = json.loads((model / "config.json").read_text())
        if value is None:
            del document[key]
        else:
            document[key] = value
        (model / "config.json").write_text(json.dumps(document))

    return edit


def edit_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        state = load_file(model / "model.safetensors")
        change(state)
        save_file(state, model / "model.safetensors")

    return edit


def truncate_weights(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pickle_weights(model: Path) -> None:
    torch.save({"weight": torch.zeros(3)}, model / "model.safetensors")


BAD_MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no directory": (shutil.rmtree, "does not exist"),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "model.safetensors cannot be"),
    "no config": (lambda m: (m / "config.json").unlink(), "config.json cannot be read"),
    "truncated weights": (truncate_weights, "not a complete safetensors file"),
    "empty weights": (lambda m: (m / "model.safetensors").write_bytes(b""), "not a complete"),
    "pickled weights": (pickle_weights, "not a complete safetensors file"),
    "missing tensor": (edit_weights(lambda s: s.pop("outc.bias")), "such as outc.bias"),
    "unknown tensor": (edit_weights(lambda s: s.update(x=torch.ones(1))), "1 are unknown"),
    "wrong shape": (
        edit_weights(lambda s: s.update({"outc.bias": torch.ones(2)})),
        "outc.bias has shape [2], expected [1]",
    ),
    "wrong dtype": (
        edit_weights(lambda s: s.update({"outc.bias": torch.ones(1, dtype=torch.int64)})),
        "outc.bias is torch.int64",
    ),
    "config not JSON": (lambda m: (m / "config.json").write_text("{"), "not valid JSON"),
    "config not text": (lambda m: (m / "config.json").write_bytes(b"\xff\xfe\x00"), "not valid"),
    "config a list": (lambda m: (m / "config.json").write_text("[]"), "JSON object, got list"),
    "unknown model": (edit_config("name", "resnet"), "resnet"),
    "name missing": (edit_config("name", None), "'name' must be a string, it is missing"),
    "name a number": (edit_config("name", 5), "'name' must be a string, got 5"),
    "channels a string": (edit_config("in_channels", "3"), "'in_channels' must be a positive"),
    "channels true": (edit_config("in_channels", True), "'in_channels' must be a positive"),
    "foreign task": (edit_config("task", "depth"), "task 'depth'"),
    "two classes": (edit_config("num_classes", 2), "num_classes 2"),
    "arguments a list": (edit_config("arguments", [1]), "'arguments' must be an object"),
    "argument a float": (edit_config("arguments", {"base_width": 4.5}), "'arguments' must be"),
    "argument unknown": (edit_config("arguments", {"bogus": 4}), "bogus"),
    "argument out of range": (edit_config("arguments", {"base_width": 0}), "base_width"),
    "width a string": (edit_config("arguments", {"base_width": "4"}), "base_width"),
    "absurd width": (edit_config("arguments", {"base_width": 10**12}), "does not describe a model"),
    "other widths": (edit_config("arguments", {"base_width": 8}), "belongs to another model"),
    "no normalisation": (edit_config("normalisation", {}), "'normalisation' must be"),
    "zero deviation": (
        edit_config("normalisation", {"mean": [0, 0, 0], "std": [1, 0, 1]}),
        "positive 'std'",
    ),
    "short mean": (edit_config("normalisation", {"mean": [0], "std": [1, 1, 1]}), "each 3 finite"),
    "infinite mean": (
        edit_config("normalisation", {"mean": [0, 0, float("inf")], "std": [1, 1, 1]}),
        "each 3 finite",
    ),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_bad_models(
    case: str, model_dir: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, phrase = BAD_MODELS[case]
    model = tmp_path / "model"
    shutil.copytree(model_dir, model)
    damage(model)
    with pytest.raises(CheckpointError):
        checkpoint.load(model)
    assert run("predict", "--model", model, photo, "--out", tmp_path / "out") == 2
    expect_one_line(capsys, phrase, tmp_path)


def test_channels_that_the_model_does_not_take(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_model(tmp_path / "model", in_channels=2)
    assert run("predict", "--model", model, photo, "--out", tmp_path / "out") == 2
    expect_one_line(capsys, "takes 2 channels, the image has 3", tmp_path)


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
        assert run("predict", "--model", model_dir, *arguments) == 2
        expect_one_line(capsys, phrase, tmp_path)
    assert photo.read_bytes() == before


def test_an_unwritable_out_is_one_line(
    model_dir: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert run("predict", "--model", model_dir, photo, "--out", tmp_path / "file" / "sub") == 2
    expect_one_line(capsys, "cannot write to", tmp_path)


@pytest.mark.parametrize("threshold", ["0", "1", "-2", "nan"])
def test_thresholds_outside_the_open_interval(
    threshold: str,
    model_dir: Path,
    photo: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = (photo, "--out", tmp_path / "out", f"--threshold={threshold}")
    assert run("predict", "--model", model_dir, *arguments) == 2
    expect_one_line(capsys, "--threshold: expected a number between 0 and 1", tmp_path)


def test_cuda_where_there_is_none(
    model_dir: Path,
    photo: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = (photo, "--out", tmp_path / "out", "--device", "cuda")
    assert run("predict", "--model", model_dir, *arguments) == 2
    expect_one_line(capsys, "no usable CUDA GPU", tmp_path)


# The command line itself


def test_no_arguments_print_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 2
    out = capsys.readouterr().out
    assert all(name in out for name in ("info", "demo", "predict"))


def test_unknown_command_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run("segment")
    assert caught.value.code == 2
    assert "predict" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["demo", "predict"])
def test_commands_explain_themselves(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(command, "--help")
    assert caught.value.code == 0
    assert f"python -m resunet_fast {command}" in capsys.readouterr().out


@pytest.mark.parametrize(("command", "package"), [("demo", "skimage"), ("predict", "safetensors")])
def test_a_missing_package_is_one_sentence(command: str, package: str, tmp_path: Path) -> None:
    program = (
        f"import sys; sys.modules[{package!r}] = None\n"
        f"from resunet_fast.cli import main; sys.exit(main([{command!r}, '--help']))"
    )
    result = run_python(["-c", program], tmp_path)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert package in result.stderr
    assert 'pip install "resunet_fast[demo]"' in result.stderr


def test_a_broken_import_of_our_own_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = cli.Command("", "resunet_fast.does_not_exist")
    monkeypatch.setitem(cli.COMMANDS, "info", broken)
    with pytest.raises(ModuleNotFoundError):
        run("info")


def test_interruption_is_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(argv: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("resunet_fast.predict.main", interrupt)
    assert run("predict") == 130
    assert "Traceback" not in capsys.readouterr().err


def test_the_module_runs(model_dir: Path, tmp_path: Path) -> None:
    arguments = ["-m", "resunet_fast", "predict", "--model", str(model_dir), "no.png"]
    result = run_python(arguments, tmp_path)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
