"""Small saved models and pictures, what is wrong with those that are refused, and how to tell."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from resunet_fast import checkpoint, cli
from resunet_fast.checkpoint import ModelConfig, Normalisation


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


def expect_one_line(
    capsys: pytest.CaptureFixture[str],
    code: object,
    phrase: str,
    tmp_path: Path,
    command: str = "predict",
) -> None:
    """That a command refused in one line and wrote nothing."""
    captured = capsys.readouterr()
    assert code == 2
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith(f"{command}: ")
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
