"""What the export command makes of bad models and bad arguments: one line, and no file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from saved_models import BAD_MODELS, expect_one_line, run
from saved_models import model_dir as model_dir


@pytest.mark.parametrize("case", BAD_MODELS)
def test_bad_models(
    case: str, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, phrase = BAD_MODELS[case]
    shutil.copytree(model_dir, tmp_path / "model")
    damage(tmp_path / "model")
    folder = tmp_path / "out"
    folder.mkdir()
    code = run(
        "export", "--model", tmp_path / "model", "--format", "torch", "--out", folder / "model.pt2"
    )
    expect_one_line(capsys, code, phrase, folder, "export")
    assert list(folder.iterdir()) == []


TORCH = ("--format", "torch", "--out", "{}/model.pt2")
BAD_ARGUMENTS: dict[str, tuple[tuple[str, ...], str]] = {
    "no format": (("--out", "{}/x"), "the following arguments are required: --format"),
    "format": (("--format", "tflite", "--out", "{}/x"), "argument --format: invalid choice"),
    "no out": (("--format", "torch"), "the following arguments are required: --out"),
    "one size": ((*TORCH, "--size", "16"), "argument --size: expected 2 arguments"),
    "size a word": ((*TORCH, "--size", "16", "big"), "argument --size: invalid int value: 'big'"),
    "size 0": ((*TORCH, "--size", "0", "16"), "size: expected two positive numbers, got (0, 16)"),
    "size negative": (
        (*TORCH, "--size", "16", "-4"),
        "expected two positive numbers, got (16, -4)",
    ),
    "size too small": ((*TORCH, "--size", "1", "1"), "x: expected at least 2 x 2 pixels"),
    "option": ((*TORCH, "--bogus"), "unrecognized arguments: --bogus"),
    "out a folder": (("--format", "torch", "--out", "{}", "--size", "16", "16"), "cannot write"),
    "out below no folder": (
        ("--format", "torch", "--out", "{}/a/b.pt2", "--size", "16", "16"),
        "No such file or directory",
    ),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments(
    case: str, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, phrase = BAD_ARGUMENTS[case]
    try:
        code = run("export", "--model", model_dir, *(a.format(tmp_path) for a in arguments))
    except SystemExit as stop:  # argparse's own way out
        code = stop.code
    expect_one_line(capsys, code, phrase, tmp_path, "export")
    assert list(tmp_path.iterdir()) == []
