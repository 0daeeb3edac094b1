from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from networks import one_thread as one_thread

from bench import inference
from resunet_fast.frozen.errors import relative_error


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "WIDTH", 8)
    monkeypatch.setattr(inference, "SIZE", 32)


def test_the_command_writes_what_it_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "find_spec", lambda name: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    out = tmp_path / "deep" / "inference.json"
    assert inference.main(["--rounds", "2", "--no-compile", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    results = json.loads(out.read_text())
    assert set(results["variants"]) == {variant.name for variant in inference.VARIANTS}
    assert results["variants"]["freeze"]["ms"]["samples"] == 2
    assert results["variants"]["freeze"]["error"] < inference.EXACT
    assert results["variants"]["ONNX Runtime"]["missing"] == "onnxruntime is not installed"
    assert "freeze bf16 / eager autocast channels_last" in results["ratios"]
    assert "left out: --no-compile" in printed
    assert "first call" in printed


def test_a_wrong_variant_is_reported_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = inference.Variant("broken", "fp32", lambda model: lambda x: model(x) * 1.01)
    eager = [v for v in inference.VARIANTS if v.name.startswith("eager")]
    monkeypatch.setattr(inference, "VARIANTS", (*eager, broken))
    results = inference.measure(2, with_compiled=False)
    assert results["variants"]["broken"]["wrong"]
    assert "ms" not in results["variants"]["broken"]
    machine = {"machine": {"threads": 1}, "first_calls_s": {}}
    assert "WRONG" in inference.report({**results, **machine})


def test_every_peer_computes_the_network() -> None:
    x, judge = inference.image(), inference.plain()(inference.image()).detach()
    for make in (inference.eager_nchw, inference.eager_nhwc, inference.onnx_runtime):
        with torch.no_grad():
            assert relative_error(make(inference.plain())(x), judge) < inference.EXACT
