"""Exported networks: right, in standard operators, open in size, and one sentence when refused."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import onnx
import pytest
import torch
from networks import image, randomised
from networks import one_thread as one_thread
from torch import nn

import resunet_fast as rf
from resunet_fast import checkpoint, cli, export, reference
from resunet_fast.checkpoint import ModelConfig, Normalisation
from resunet_fast.frozen.errors import relative_error
from resunet_fast.models.wiring import Wiring

# One of each choice; what they are made of is tested in test_freeze.py.
ROWS = {
    "listing": {},
    "residual-pre-stride-transpose": {
        "encoder": "residual",
        "order": "pre",
        "downsample": "stride",
        "upsample": "transpose",
    },
    "pre-nearest": {"order": "pre", "upsample": "nearest", "decoder_residual": False},
}


def network(kind: type[Wiring], **options: object) -> Wiring:
    shape = {"base_width": 4, "width_factors": (1, 2, 3)}
    return randomised(kind(3, 2, **{**shape, **options})).float().eval()


def run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ("listing", "plain"),
        ("listing", "fast"),
        ("listing", "frozen"),
        ("residual-pre-stride-transpose", "frozen"),
        ("pre-nearest", "frozen"),
        pytest.param("residual-pre-stride-transpose", "fast", marks=pytest.mark.slow),
        pytest.param("pre-nearest", "fast", marks=pytest.mark.slow),
    ],
)
def test_programs_are_open_in_size_and_hold_standard_operators(row: str, kind: str) -> None:
    model = network(reference.ResUNet if kind == "plain" else rf.ResUNet, **ROWS[row])
    model = rf.freeze(model) if kind == "frozen" else model
    program = export.program(model, (16, 24), dynamic=True)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [name for name in names if "resunet_fast" in name]
    # Traced where a transposed convolution fits its skip, torch's guards ask for that ever after.
    fits = model.downsample == "stride" and model.upsample == "transpose"
    for size in ((16, 24), (40, 8)) if fits else ((16, 24), (17, 31), (40, 9)):
        x = image(1, 3, *size).float()
        assert relative_error(run(program.module(), x), run(model, x)) < 1e-5


def test_a_program_is_traced_in_evaluation_and_the_model_left_in_its_mode() -> None:
    model = network(rf.ResUNet).train()
    program = export.program(model, (16, 16))
    assert model.training
    x = image(1, 3, 16, 16).float()
    assert relative_error(run(program.module(), x), run(model.eval(), x)) < 1e-5


def test_checking_leaves_a_model_as_it_was(tmp_path: Path) -> None:
    model = network(reference.ResUNet).train()
    model.bottleneck.eval()  # as where batch norms are kept while the rest is trained
    before = copy.deepcopy(model)
    export.to_onnx(model, tmp_path / "model.onnx", (16, 16))
    assert export.check_onnx(model, tmp_path / "model.onnx", [(16, 16)]) < 1e-5
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    torch.testing.assert_close(model.state_dict(), before.state_dict(), rtol=0, atol=0)


def test_torch_files_need_no_part_of_this_package(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    frozen = rf.freeze(network(rf.ResUNet), torch.bfloat16)
    export.to_torch(frozen, path, (16, 16))
    x = image(1, 3, 16, 16).bfloat16()
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import sys, torch; x = torch.load('x.pt');"
        " y = torch.export.load('model.pt2').module()(x);"
        " assert 'resunet_fast' not in sys.modules;"
        " torch.save(y, 'y.pt')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert relative_error(torch.load(tmp_path / "y.pt"), run(frozen, x)) < 0.01
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.pt2", "x.pt", "y.pt"]


def test_onnx_in_onnx_runtime(tmp_path: Path) -> None:
    frozen = rf.freeze(network(rf.ResUNet))
    path = tmp_path / "model.onnx"
    export.to_onnx(frozen, path, (16, 24), dynamic=True)
    assert export.check_onnx(frozen, path, [(16, 24), (33, 19)]) < 1e-6
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    assert {"Conv", "Relu", "Resize", "MaxPool", "Concat"} <= kinds
    assert "BatchNormalization" not in kinds
    with pytest.raises(export.ExportError, match=r"is off by .* in ONNX Runtime; allowed are"):
        export.check_onnx(rf.freeze(network(rf.ResUNet, width_factors=(1, 3))), path, [(16, 24)])
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(export.ExportError, match=r"^ONNX Runtime refuses .*model.onnx: "):
        export.check_onnx(frozen, path, [(16, 24)])


def test_a_difference_that_is_not_a_number_is_too_large(tmp_path: Path) -> None:
    model, path = network(rf.ResUNet), tmp_path / "model.onnx"
    export.to_onnx(model, path, (16, 16), dynamic=True)
    with torch.no_grad():
        model.outc.bias.fill_(float("nan"))
    with pytest.raises(export.ExportError, match="off by nan"):
        export.check_onnx(model, path, [(16, 16), (24, 16)])


def test_what_cannot_be_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(rf.ResUNet)
    with pytest.raises(export.ExportError, match=r"x: expected at least 4 x 4 pixels .* got 3 x 8"):
        export.program(model, (3, 8))
    with pytest.raises(export.ExportError, match=r"needs a float32 network, got torch.bfloat16"):
        export.to_onnx(rf.freeze(model, torch.bfloat16), tmp_path / "model.onnx")
    with monkeypatch.context() as patched:
        refused = mock.Mock(side_effect=torch.onnx.OnnxExporterError("no such operator"))
        patched.setattr(torch.onnx, "export", refused)
        with pytest.raises(export.ExportError, match="as ONNX with an open height and width; try"):
            export.to_onnx(model, tmp_path / "model.onnx", (16, 16), dynamic=True)
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(export.ExportError, match=r"'onnxscript': pip install .*\[export\]"):
        export.to_onnx(model, tmp_path / "model.onnx")
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    with pytest.raises(export.ExportError, match=r"'onnxruntime': pip install .*\[export\]"):
        export.check_onnx(model, tmp_path / "model.onnx", [(8, 8)])
    assert list(tmp_path.iterdir()) == []


def test_transposed_convolutions_behind_max_pooling_take_the_multiples_they_were_traced_with(
    tmp_path: Path,
) -> None:
    model, path = network(rf.ResUNet, upsample="transpose"), tmp_path / "model.onnx"
    export.to_onnx(model, path, (16, 16), dynamic=True)
    assert export.check_onnx(model, path, [(16, 16), (24, 8)]) < 1e-5
    with pytest.raises(export.ExportError, match="ONNX Runtime refuses"):
        export.check_onnx(model, path, [(17, 19)])


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    config = ModelConfig(
        name="resunet",
        in_channels=3,
        num_classes=1,
        arguments={"base_width": 4, "width_factors": (1, 2)},
        normalisation=Normalisation((0.4,) * 3, (0.25,) * 3),
    )
    checkpoint.save(directory / "fast", config.build(), config)
    checkpoint.save(directory / "frozen", rf.freeze(config.build(), torch.bfloat16), config)
    (directory / "empty").mkdir()
    return directory


def command(*arguments: object) -> int:
    return cli.main(["export", *map(str, arguments)])


def test_the_command_writes_checks_and_says_what_the_file_takes(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model.onnx"
    options = ("--out", out, "--size", 16, 24, "--dynamic")
    assert command("--model", model_dir / "fast", "--format", "onnx", *options) == 0
    printed = capsys.readouterr().out
    assert f"{out}: takes [1, 3, H, W], (pixels in [0, 1] - mean) / std" in printed
    assert "relative difference in ONNX Runtime: " in printed
    out = tmp_path / "model.pt2"
    options = ("--out", out, "--size", 16, 24)
    assert command("--model", model_dir / "frozen", "--format", "torch", *options) == 0
    assert "takes [1, 3, 16, 24]" in capsys.readouterr().out
    z = torch.export.load(out).module()(torch.zeros(1, 3, 16, 24, dtype=torch.bfloat16))
    assert z.shape == (1, 1, 16, 24)


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("_onnx", "ONNX Runtime refuses the program: "),
        ("_TOLERANCE", "the program is off by"),
    ],
)
def test_an_onnx_file_that_fails_its_check_is_not_written(
    fault: str,
    sentence: str,
    model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(export, fault, {"_onnx": lambda *_: b"damaged", "_TOLERANCE": -1.0}[fault])
    out = tmp_path / "model.onnx"
    options = ("--format", "onnx", "--out", out, "--size", 16, 16)
    assert command("--model", model_dir / "fast", *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"export: {out} is not written: {sentence}")
    assert list(tmp_path.iterdir()) == []
    out.write_text("an earlier export")
    assert command("--model", model_dir / "fast", *options) == 2
    assert [path.read_text() for path in tmp_path.iterdir()] == ["an earlier export"]


def test_without_onnx_runtime_the_command_says_that_nothing_was_checked(
    model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxruntime" else name)
    options = ("--format", "onnx", "--out", tmp_path / "model.onnx", "--size", 16, 16)
    assert command("--model", model_dir / "fast", *options) == 0
    assert "not checked: onnxruntime is not installed" in capsys.readouterr().out
    onnx.checker.check_model(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("model", "out", "size", "sentence"),
    [
        ("nowhere", "model.pt2", 16, "the model directory .* does not exist"),
        ("empty", "model.pt2", 16, "config.json cannot be read"),
        ("fast", "deep/er/model.pt2", 16, "cannot write .*model.pt2: No such file or directory"),
        ("fast", "model.pt2", 1, "x: expected at least 2 x 2 pixels"),
        ("frozen", "model.onnx", 16, "format onnx needs a float32 network, got torch.bfloat16"),
    ],
)
def test_the_command_refuses_in_one_line(
    model: str,
    out: str,
    size: int,
    sentence: str,
    model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kind = "onnx" if out.endswith("onnx") else "torch"
    options = ("--format", kind, "--out", tmp_path / out, "--size", size, size)
    assert command("--model", model_dir / model, *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("export: ")
    assert re.search(sentence, line), line
    assert list(tmp_path.iterdir()) == []
