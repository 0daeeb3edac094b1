"""Calls without the dispatcher: the same results and bookkeeping as through it; their benchmark."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from twins import BACKENDS

import resunet_fast as rf
from bench import launch
from bench.command import main
from resunet_fast import native
from resunet_fast.functional import Norm
from resunet_fast.ops.upsample_concat.op import UPSAMPLE_CONCAT
from resunet_fast.registry import _plain, unobserved


def test_what_the_dispatcher_must_see() -> None:
    x = torch.randn(2, 3)
    assert unobserved()
    assert _plain([x, None, nn.Parameter(x), 1.0, "", [1, 1]])
    assert not _plain([None, torch.empty(2, device="meta")])
    with torch._subclasses.FakeTensorMode() as mode:
        assert not unobserved()
        fake = mode.from_tensor(x)
    assert not _plain([fake])
    with torch.profiler.profile():
        assert not unobserved()
    assert torch.func.vmap(lambda v: v if unobserved() else v + 1)(x).equal(x + 1)


def results(by_dispatcher: bool) -> list[Tensor]:
    torch.manual_seed(0)
    x, bn = torch.randn(2, 4, 6, 6, requires_grad=True), nn.BatchNorm2d(4)
    assert bn.running_mean is not None
    version = bn.running_mean._version
    if by_dispatcher:
        with torch.profiler.profile():
            z = rf.functional.bn_act(x, Norm.of(bn), residual=x)
    else:
        z = rf.functional.bn_act(x, Norm.of(bn), residual=x)
    assert isinstance(z, Tensor)
    assert bn.running_mean._version > version
    z.square().sum().backward()
    assert x.grad is not None
    return [z.detach(), x.grad, *(p.grad for p in bn.parameters() if p.grad is not None)]


def test_results_are_the_same_through_the_dispatcher_and_without() -> None:
    for a, b in zip(results(True), results(False), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_an_operator_writes_stays_out_of_the_graph(backend: str) -> None:
    bn, bias = nn.BatchNorm2d(2), nn.Parameter(torch.ones(2))
    x, output = torch.randn(1, 2, 4, 4, requires_grad=True), torch.empty(1, 4, 8, 8)
    with rf.use_backend(backend):
        rf.functional.update_running_stats(Norm.of(bn), torch.ones(2), torch.ones(2), 10, bias)
        UPSAMPLE_CONCAT(x, torch.randn(1, 2, 8, 8), output, "bilinear", backend)
    assert bn.running_mean is not None
    assert torch.equal(bn.running_mean, torch.full((2,), 0.2))
    assert not bn.running_mean.requires_grad
    assert not output.requires_grad


def test_inference_mode_leaves_versions_alone() -> None:
    bn = nn.BatchNorm2d(4)
    assert bn.running_mean is not None
    with torch.inference_mode():
        rf.functional.bn_act(torch.randn(2, 4, 6, 6), Norm.of(bn))
    assert bn.running_mean.abs().sum() > 0


def test_the_benchmark_writes_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "CALLS", 2)
    before = torch.get_num_threads()
    assert main(["launch", "--rounds", "2", "--json", str(tmp_path / "rows.json")]) == 0
    assert torch.get_num_threads() == before
    written = json.loads((tmp_path / "rows.json").read_text())
    assert {"date", "commit", "machine", "versions"} <= written.keys()
    rows = written["launch"]
    ways = ["eager"] if native.unavailable() else ["eager", "cpu"]
    assert {f"bn_act, no grad: {way}, cpu tensors" for way in ways} < set(rows)
    assert all(row["ms"]["median"] > 0 for row in rows.values())
    assert all(("ratio" in row) == ("eager" not in name) for name, row in rows.items())
    printed = capsys.readouterr().out
    assert "conv_bn_act, forward and backward: eager" in printed
    assert "eager's over it" in printed
    assert rf.registry.forced_backend() == ""
