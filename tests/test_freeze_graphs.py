"""Capture of a frozen network's CUDA graphs, with what torch.cuda would do recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import resunet_fast as rf
from resunet_fast.frozen.graphs import GraphCache, cuda_capture


def stream(device: torch.device | None = None) -> SimpleNamespace:
    return SimpleNamespace(device=device, wait_stream=lambda _: None)


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The streams that were captured, on a torch.cuda that launches nothing."""
    streams: list[Any] = []

    @contextmanager
    def graph(_: Any, stream: Any = None, capture_error_mode: str = "global") -> Iterator[None]:
        streams.append(stream)
        yield

    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "graph", graph)
    return streams


def test_the_captured_stream_is_one_of_the_inputs_device(captured: list[Any]) -> None:
    x = torch.ones(2)
    cuda_capture(torch.neg, x)
    assert [one.device for one in captured] == [x.device]


def test_a_graph_captured_in_inference_mode_is_replayed_outside(captured: list[Any]) -> None:
    seen: list[Tensor] = []

    def run(x: Tensor) -> Tensor:
        seen.append(x)
        return -x

    with torch.inference_mode():
        replay = cuda_capture(run, torch.ones(2))
    with torch.no_grad():
        replay(torch.full((2,), 3.0))
    assert torch.equal(seen[-1], torch.full((2,), 3.0))


def test_every_choice_of_kernels_has_a_graph_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    captures = 0

    def capture(run: Callable[[Tensor], Tensor], _: Tensor) -> Callable[[Tensor], Tensor]:
        nonlocal captures
        captures += 1
        return run

    cache = GraphCache(capture)
    cache(torch.neg, torch.ones(2))
    with rf.use_backend("reference"):
        cache(torch.neg, torch.ones(2))
        cache(torch.neg, torch.ones(2))
    assert captures == 2
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    cache(torch.neg, torch.ones(2))
    assert captures == 3
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    try:
        conv.fp32_precision = "ieee"
        cache(torch.neg, torch.ones(2))
    finally:
        conv.fp32_precision = before
    assert captures == 4


def test_an_input_on_another_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = rf.freeze(rf.ResUNet(3, 2, base_width=4, width_factors=(1, 2)))
    monkeypatch.setitem(frozen.__dict__, "device", torch.device("cuda:0"))
    with FakeTensorMode(), pytest.raises(ValueError, match="on cuda:0, got one on cuda:1"):
        frozen(torch.empty(1, 3, 8, 8, device="cuda:1"))


def test_a_loaded_copy_is_where_its_tensors_are() -> None:
    frozen = rf.freeze(rf.ResUNet(3, 2, base_width=4, width_factors=(1, 2)))
    state = {**frozen.__getstate__(), "device": torch.device("cuda:1")}
    twin = object.__new__(type(frozen))
    twin.__setstate__(state)
    assert twin.device == torch.device("cpu")
