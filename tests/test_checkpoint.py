"""Saved models: what is kept, how it is replaced, and one sentence for what is no model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from saved_models import BAD_MODELS, config_of, expect_one_line, run, save_model
from saved_models import model_dir as model_dir
from saved_models import photo as photo

from resunet_fast import checkpoint
from resunet_fast.checkpoint import CheckpointError


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
    code = run("predict", "--model", model, photo, "--out", tmp_path / "out")
    expect_one_line(capsys, code, phrase, tmp_path)
