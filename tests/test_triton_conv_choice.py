"""Which convolution runs on a GPU: refusals, preferences, the table of measurements, the tiles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import resunet_fast as rf
from resunet_fast import environment, tuning
from resunet_fast.ops.backends import cudnn_unavailable
from resunet_fast.ops.conv2d import gpu
from resunet_fast.registry import OPERATORS, nothing
from resunet_fast.testing import CASES, Case, assert_close, make_inputs, tolerance
from resunet_fast.tuning import ConvConfig, ConvProblem, pick, table

CONFIG = {
    "family": "tma",
    "filters": 64,
    "rows": 8,
    "columns": 16,
    "channels": 64,
    "warps": 4,
    "stages": 2,
}
LINE = {
    "operator": "conv2d",
    "channels": 64,
    "filters": 64,
    "kernel": [3, 3],
    "stride": [1, 1],
    "positions": 2 * 16 * 16,
    "dtype": "bfloat16",
    "microseconds": {"cudnn": 812.0, "triton": 640.0},
    "config": CONFIG,
}
CONVOLUTIONS = [c for c in CASES if c.operator in ("conv2d", "conv_bn_act", "bn_act_conv")]


def convolution(dtype: torch.dtype = torch.bfloat16, **changes: Any) -> tuple[Any, ...]:
    """Arguments of conv2d; a change of `dilation`, `groups` or `layout` makes another."""
    layout = changes.get("layout", torch.channels_last)
    x = torch.zeros(2, 64, 16, 16, dtype=dtype).contiguous(memory_format=layout)
    weight = torch.zeros(64, 64 // changes.get("groups", 1), 3, 3, dtype=dtype)
    dilation = (changes.get("dilation", 1),) * 2
    return (x, None, weight, None, (1, 1), (1, 1), dilation, changes.get("groups", 1), "none")


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the rules believe that the tensors lie on a GPU that runs Triton."""
    monkeypatch.setattr(environment, "compute_capability", lambda _: (9, 0))
    monkeypatch.setattr(gpu, "triton_declines", nothing)
    monkeypatch.setattr(gpu, "triton_refusals", nothing)


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder of tables."""
    monkeypatch.setattr(table, "_FOLDER", tmp_path)
    monkeypatch.setattr(table, "load", table.load.__wrapped__)
    return tmp_path


def write(folder: Path, *lines: dict[str, Any]) -> None:
    content = {
        "architecture": "sm_90",
        "gpu": "NVIDIA H200",
        "date": "2026-12-01",
        "commit": "0123456789ab",
        "versions": {"torch": "2.11.0"},
        "measurements": list(lines),
    }
    (folder / "sm_90.json").write_text(json.dumps(content))


PROBLEM = ConvProblem("conv2d", 2, 16, 16, 64, 64, (3, 3), (1, 1), "bfloat16", 2)


def test_a_table_round_trip(folder: Path) -> None:
    write(folder, LINE, {**LINE, "dtype": "float16", "config": None})
    loaded = tuning.table.load("sm_90")
    assert loaded.origin["gpu"] == "NVIDIA H200"
    assert len(loaded.measurements) == 2
    found = tuning.lookup(PROBLEM, (9, 0))
    assert found is not None
    assert found.fastest == "triton"
    assert found.config == ConvConfig("tma", 64, 8, 16, 64, 4, 2)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"images": 3}, True),  # 768 positions round to 1024, but 512 * sqrt(2) = 724 is between
        ({"images": 1}, False),
        ({"filters": 128}, False),
        ({"dtype": "float16"}, False),
        ({"stride": (2, 2)}, False),
        ({"operator": "conv_bn_act"}, False),
    ],
)
def test_a_measurement_speaks_for_its_shape_class(
    folder: Path, change: dict[str, Any], found: bool
) -> None:
    write(folder, {**LINE, "positions": 1024 if "images" in change else 512})
    problem = ConvProblem(**{**vars(PROBLEM), **change})
    assert (tuning.lookup(problem, (9, 0)) is not None) == found
    assert tuning.lookup(problem, (8, 0)) is None
    assert tuning.lookup(problem, None) is None


@pytest.mark.parametrize("field", ["microseconds", "config", "operator"])
def test_a_damaged_table_says_what_is_missing(folder: Path, field: str) -> None:
    write(folder, {name: value for name, value in LINE.items() if name != field})
    with pytest.raises(KeyError, match=field):
        tuning.table.load("sm_90")
    write(folder, {**LINE, "microseconds": {}})
    with pytest.raises(ValueError, match="microseconds: expected at least one time"):
        tuning.table.load("sm_90")


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_the_committed_tables_can_be_read(architecture: str) -> None:
    loaded = tuning.load(architecture)
    assert set(loaded.origin) == {"gpu", "date", "commit", "versions"}
    # A number without a machine and a date is no measurement.
    assert not loaded.measurements or all(loaded.origin.values())


def test_cudnn_is_the_default_until_a_measurement(hopper: None, folder: Path) -> None:
    triton, cudnn = gpu.triton(gpu.conv2d), gpu.cudnn(gpu.conv2d)
    assert triton.refusals(*convolution()) == []
    assert triton.declines(*convolution()) == [
        "no measurement on this GPU says that it is faster than cuDNN"
    ]
    assert cudnn.declines(*convolution()) == []


def test_the_fastest_measured_is_chosen(hopper: None, folder: Path) -> None:
    triton, cudnn = gpu.triton(gpu.conv2d), gpu.cudnn(gpu.conv2d)
    write(folder, LINE)
    assert triton.declines(*convolution()) == []
    assert cudnn.declines(*convolution()) == ["Triton's convolution was measured to be faster here"]
    contiguous = convolution(layout=torch.contiguous_format)
    assert "only channels_last was measured" in triton.declines(*contiguous)[0]
    assert cudnn.declines(*contiguous) == []
    assert cudnn.declines(*convolution(dilation=2)) == []  # which Triton refuses
    write(folder, {**LINE, "microseconds": {"cudnn": 500.0, "triton": 640.0}})
    assert triton.declines(*convolution()) == [
        "cudnn was measured to be faster (microseconds: cudnn 500, triton 640)"
    ]
    assert cudnn.declines(*convolution()) == []


def test_the_fused_convolution_gives_way_where_tritons_was_faster(
    hopper: None, folder: Path
) -> None:
    implementations = OPERATORS["conv_bias_act"].implementations
    x, _, weight, bias, *geometry, _ = convolution()
    arguments = (x, weight, bias, None, True, *geometry)
    assert implementations["cudnn"].declines(*arguments) == []
    write(folder, {**LINE, "operator": "conv_bias_act"})
    assert implementations["triton"].declines(*arguments) == []
    assert implementations["cudnn"].declines(*arguments) == [
        "Triton's convolution was measured to be faster here"
    ]


def test_backward_is_measured_as_the_data_gradient(hopper: None, folder: Path) -> None:
    x, _, _, *geometry = convolution()
    weight = torch.zeros(32, 64, 3, 3, dtype=x.dtype)
    arguments = (x.new_zeros(2, 32, 16, 16), x, None, weight, *geometry, [True, True, True, False])
    write(folder, {**LINE, "operator": "conv2d_backward", "channels": 32, "filters": 64})
    assert gpu.triton(gpu.conv2d_backward).declines(*arguments) == []


def test_the_backward_of_a_unit_goes_where_its_data_gradient_does(
    hopper: None, folder: Path
) -> None:
    implementations = OPERATORS["bn_act_conv_backward"].implementations
    x, _, weight, bias, *geometry, _ = convolution()
    vectors = [torch.zeros(64) for _ in range(4)]
    arguments = (x, None, x, x, *vectors, 1e-5, True, True, weight, bias, *geometry, [True] * 5)
    assert implementations["triton"].refusals(*arguments) == []
    assert implementations["cudnn"].declines(*arguments) == []
    write(folder, {**LINE, "operator": "conv2d_backward"})
    assert implementations["triton"].declines(*arguments) == []
    assert implementations["cudnn"].declines(*arguments) == [
        "Triton's convolution was measured to be faster here"
    ]


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        (convolution(dilation=2), "dilation is left to ATen, got (2, 2)"),
        (convolution(groups=4), "groups are left to ATen, got 4"),
        (convolution(torch.float64), "float64 is left to cuDNN"),
    ],
)
def test_refusals_on_a_gpu(hopper: None, inputs: tuple[Any, ...], sentence: str) -> None:
    assert gpu.triton(gpu.conv2d).refusals(*inputs) == [sentence]


def test_float32_follows_the_switch_of_tf32(hopper: None) -> None:
    refusals = gpu.triton(gpu.conv2d).refusals
    before = torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = True
        assert refusals(*convolution(torch.float32)) == []
        torch.backends.cudnn.allow_tf32 = False
        assert "float32 without TF32 is left to cuDNN" in refusals(*convolution(torch.float32))[0]
        assert refusals(*convolution(torch.float16)) == []
    finally:
        torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("capability", [(7, 5), (13, 0)])
def test_the_range_of_architectures_has_two_ends(
    hopper: None, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    monkeypatch.setattr(environment, "compute_capability", lambda _: capability)
    expected = f"it needs compute capability 8.0 to 12.9, got {capability[0]}.{capability[1]}"
    assert gpu.triton(gpu.conv2d).refusals(*convolution()) == [expected]


def test_cudnn_refuses_tensors_on_the_cpu_and_says_so() -> None:
    explanation = rf.explain("conv2d", *convolution())
    assert explanation.refusals["cudnn"] == ["it needs tensors on an NVIDIA GPU, got one on cpu"]
    assert explanation.chosen == "cpu" or explanation.refusals["cpu"]


def test_cudnn_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(rf.BackendError, match="cuDNN needs an NVIDIA GPU"), rf.use_backend("cudnn"):
        pass
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch._C, "_has_cudnn", False)
    assert cudnn_unavailable() == ["this torch was built without cuDNN"]
    monkeypatch.setattr(torch._C, "_has_cudnn", True)
    assert cudnn_unavailable() == []
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)
    assert cudnn_unavailable() == ["torch.backends.cudnn.enabled is False"]


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("boxes", [True, False])
def test_picked_tiles_fit_into_shared_memory(boxes: bool, itemsize: int) -> None:
    limit = 227 if boxes else 99 * itemsize // 2  # KiB: sm_90 has 227, the smallest GPUs 99
    for size in (1, 2, 5, 16, 33, 512):
        for channels in (3, 8, 40, 64, 1024):
            for filters in (1, 24, 64, 200):
                shape = (2, size, size + 1, channels, filters, (3, 3), (1, 1))
                config = pick(ConvProblem("conv2d", *shape, "", itemsize), boxes=boxes)
                assert config.family == ("tma" if boxes else "pointer")
                rows = config.filters + config.rows * config.columns
                assert rows * config.channels * itemsize * config.stages <= limit * 1024


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"filters": 24}, "tiles: expected powers of two of at least 16"),
        ({"channels": 8}, "tiles: expected powers of two of at least 16"),
        ({"rows": 2}, "rows, columns: expected at least"),
        ({"family": "im2col"}, "family: expected 'tma' or 'pointer', got 'im2col'"),
    ],
)
def test_tiles_that_no_kernel_has(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ConvConfig(**{**CONFIG, **change})


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=lambda case: case.id)
def test_cudnn_implementations_compute_as_the_reference(case: Case) -> None:
    """On the CPU ATen's convolution is oneDNN's; what is around it is what runs on a GPU."""
    implementations = OPERATORS[case.operator].implementations
    inputs = make_inputs(case, torch.float64)
    results = implementations["cudnn"].compute(*inputs)
    expected = implementations["reference"].compute(*inputs)
    pairs = zip(_tuple(results), _tuple(expected), strict=True)
    for i, (result, judge) in enumerate(pairs):
        assert (result is None) == (judge is None)
        if result is not None and judge is not None:
            assert result.stride() == judge.stride()
            assert_close(f"output {i}", result, judge, tolerance(torch.float64, 1000))


def _tuple(results: Any) -> tuple[Tensor | None, ...]:
    return results if isinstance(results, tuple) else (results,)


@pytest.mark.parametrize("mask", [(True, True, True, True), (False, True, False, True)])
@pytest.mark.parametrize("case", [c for c in CONVOLUTIONS if c.operator == "conv2d"], ids=str)
def test_cudnn_backward_computes_as_the_reference(case: Case, mask: tuple[bool, ...]) -> None:
    inputs = make_inputs(case, torch.float64)
    grad = torch.randn_like(OPERATORS["conv2d"](*inputs))
    implementations = OPERATORS["conv2d_backward"].implementations
    results, expected = (
        implementations[name].compute(grad, *inputs, mask) for name in ("cudnn", "reference")
    )
    for i, (result, judge) in enumerate(zip(results, expected, strict=True)):
        assert (result is None) == (judge is None)
        if result is not None and judge is not None:
            assert_close(f"gradient {i}", result, judge, tolerance(torch.float64, 1000))
