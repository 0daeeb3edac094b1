"""Segmentation with frozen models: the same results, tiled or not; sentences where it is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import one_thread as one_thread
from saved_models import config_of, run
from saved_models import model_dir as model_dir
from test_predict_inputs import write_png
from test_tiling import SIZE, TILE, core, network, picture
from torch import Tensor

import resunet_fast as rf
from resunet_fast import checkpoint
from resunet_fast.frozen import FrozenResUNet, build
from resunet_fast.frozen.graphs import GraphCache
from resunet_fast.segmentation import for_inference, segment
from resunet_fast.tiling import cell_size, receptive_radius


def save_frozen(directory: Path, model_dir: Path, dtype: torch.dtype) -> Path:
    saved = checkpoint.load(model_dir)
    checkpoint.save(directory, rf.freeze(saved.network, dtype), saved.config)
    return directory


# The same results


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("downsample", ["maxpool", "stride"])
@pytest.mark.parametrize("upsample", ["bilinear", "nearest", "transpose"])
def test_tiled_is_whole_and_frozen_is_unfrozen(
    upsample: str, downsample: str, dtype: torch.dtype
) -> None:
    model = network(upsample=upsample, downsample=downsample)
    frozen = rf.freeze(model, dtype)
    cell = cell_size(frozen)
    overlap = -(-receptive_radius(frozen) // cell) * cell
    image = picture(*SIZE)
    expected = segment(model, image).probability
    whole = segment(frozen, image).probability
    np.testing.assert_allclose(whole, expected, atol=1e-5)
    tiled = segment(frozen, image, tile=TILE, overlap=overlap, batch=2).probability
    inside = np.ix_(*(core(size, TILE, overlap, cell) for size in SIZE))
    assert whole[inside].std() > 0.05
    np.testing.assert_allclose(tiled[inside], whole[inside], atol=1e-5)


def test_a_directory_is_frozen_and_what_is_loaded_is_not(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    forward = FrozenResUNet.forward

    def note(self: FrozenResUNet, x: Tensor) -> Tensor:
        seen.append(x)
        return forward(self, x)

    monkeypatch.setattr(FrozenResUNet, "forward", note)
    image = picture(40, 30)
    result = segment(model_dir, image, tile=16, device="cpu").probability
    assert len(seen) > 4
    seen.clear()
    saved = checkpoint.load(model_dir)
    expected = segment(saved, image, tile=16).probability
    assert not seen
    np.testing.assert_allclose(result, expected, atol=1e-5)
    assert saved.network.outc.weight.requires_grad  # neither changed nor kept


def test_frozen_once_for_many_images(model_dir: Path) -> None:
    saved = checkpoint.load(model_dir)
    model = replace(saved, network=rf.freeze(saved.network))
    for size in ((20, 30), (41, 17)):
        image = picture(*size)
        expected = segment(model_dir, image, device="cpu").probability
        np.testing.assert_array_equal(segment(model, image).probability, expected)


def test_bfloat16_is_as_good_as_autocast(model_dir: Path) -> None:
    image = picture(64, 48)
    saved = checkpoint.load(model_dir)
    exact = segment(saved, image).probability
    frozen, autocast = (
        np.linalg.norm(segment(model, image, dtype="bfloat16", device="cpu").probability - exact)
        for model in (model_dir, saved)
    )
    assert 0 < frozen <= 2 * autocast


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_saved_frozen_model(
    model_dir: Path, dtype: torch.dtype, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = save_frozen(tmp_path / "frozen", model_dir, dtype)
    image = write_png(tmp_path / "x.png", 50, 40)
    arguments = ("--save", "probability", "--tile", 16, "--out", tmp_path / "out")
    name = str(dtype).removeprefix("torch.")
    code = run("predict", "--model", directory, image, *arguments, "--dtype", name)
    assert (code, capsys.readouterr().err) == (0, "")
    stored = np.load(tmp_path / "out" / "x_probability.npy")
    expected = segment(model_dir, image, tile=16, dtype=name, device="cpu").probability
    np.testing.assert_allclose(stored, expected, atol=1e-6 if name == "float32" else 1e-2)


def test_tiles_do_not_capture_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tile is enlarged by coordinates of its own: a graph would be used once."""

    def capture(run: object, example: Tensor) -> object:
        raise AssertionError("a tile was captured")

    frozen = rf.freeze(network(), torch.float32)
    image = picture(*SIZE)
    expected = segment(frozen, image, tile=48).probability
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setitem(frozen.__dict__, "_graphs", GraphCache(capture))
    np.testing.assert_array_equal(segment(frozen, image, tile=48).probability, expected)
    with pytest.raises(AssertionError, match="a tile was captured"):
        segment(frozen, image)


# Announced where it is not so


def test_what_cannot_be_frozen_goes_on_as_it_is(
    model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    image = write_png(tmp_path / "x.png")
    arguments = ("predict", "--model", model_dir, image, "--save", "probability", "--out", tmp_path)
    monkeypatch.setattr("resunet_fast.segmentation.refusals", lambda _: ["it is odd", "and old"])
    assert run(*arguments) == 0
    announced = "predict: the model runs as it is, not frozen for this: it is odd; and old\n"
    assert capsys.readouterr().err == announced
    expected = segment(checkpoint.load(model_dir), image).probability
    np.testing.assert_array_equal(np.load(tmp_path / "x_probability.npy"), expected)


def test_segment_warns_of_a_directory_that_it_cannot_freeze(
    model_dir: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    directory, image = save_frozen(tmp_path / "frozen", model_dir, torch.float32), picture(20, 20)
    with pytest.warns(UserWarning, match="not frozen for this: it is frozen in torch.float32") as w:
        result = segment(directory, image, dtype="bfloat16", device="cpu").probability
    assert w[0].filename == __file__
    np.testing.assert_array_equal(result, segment(directory, image, device="cpu").probability)
    segment(model_dir, image, device="cpu")
    assert not recwarn.list


def test_bfloat16_on_a_processor_without_it(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.ops.mkldnn._is_mkldnn_bf16_supported", lambda: False)
    saved = checkpoint.load(model_dir)
    model, reasons = for_inference(saved, "bfloat16")
    assert model is saved
    assert reasons == ["oneDNN has no bfloat16 on this processor"]
    assert not build.reservations(torch.float32, torch.device("cpu"))


def test_a_frozen_model_keeps_its_dtype(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = save_frozen(tmp_path / "frozen", model_dir, torch.float32)
    image = write_png(tmp_path / "x.png")
    arguments = ("--out", tmp_path / "out", "--dtype", "bfloat16")
    assert run("predict", "--model", directory, image, *arguments) == 0
    reason = "it is frozen in torch.float32, which 'bfloat16' cannot change"
    assert capsys.readouterr().err.splitlines() == [
        f"predict: the model runs as it is, not frozen for this: {reason}"
    ]


# What a frozen model says of itself


def test_explain_names_what_is_folded_packed_and_neither() -> None:
    shape = {"base_width": 4, "width_factors": (1, 2)}
    blocks = ["encoder_layers.0", "bottleneck", "ups.0", "decoder_layers.0", "res_blocks.0", "outc"]
    explanation = rf.explain(rf.freeze(rf.ResUNet(3, 1, **shape)))
    assert explanation.blocks == {name: [] for name in blocks if name != "ups.0"}
    lines = str(explanation).splitlines()
    assert lines[0] == "encoder_layers.0: folded and packed"
    assert lines[-1] == "calls run layer by layer"
    other = rf.freeze(rf.ResUNet(3, 1, order="pre", upsample="transpose", **shape), torch.float64)
    explanation = rf.explain(other)
    assert sorted(explanation.blocks) == sorted(blocks)
    unpacked = "is not packed: oneDNN's fused convolution has no torch.float64 kernel"
    assert explanation.blocks["bottleneck"] == [
        "norm is a pass of its own: others read its input",
        f"conv1 {unpacked}",
        f"conv2 {unpacked}",
    ]
    assert explanation.blocks["ups.0"][0].startswith("ATen's transposed convolution")


def test_explain_says_how_calls_would_run_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = rf.freeze(rf.ResUNet(3, 1, base_width=4, width_factors=(1, 2)))
    monkeypatch.setitem(frozen.__dict__, "device", torch.device("cuda"))
    lines = str(rf.explain(frozen)).splitlines()
    assert lines[0] == "encoder_layers.0: folded"
    assert lines[-1].startswith("calls replay a CUDA graph, captured at the first of each shape")


def test_the_card_of_a_frozen_model_counts_its_tensors(model_dir: Path, tmp_path: Path) -> None:
    saved = checkpoint.load(save_frozen(tmp_path / "frozen", model_dir, torch.float32))
    rf.save_pretrained(saved, tmp_path / "hub")
    total = sum(tensor.numel() for tensor in saved.network.state_dict().values())
    assert total > 1000
    assert f"| parameters | {total:,} |" in (tmp_path / "hub" / "README.md").read_text()
    again = rf.from_pretrained(tmp_path / "hub")
    assert isinstance(again.network, FrozenResUNet)
    assert again.config.frozen_dtype == "float32"
    assert again.config.name == config_of().name
