"""bn_act's Triton kernels: blocks in every direction, neighbouring memory, special values."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import guard_bands
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resunet_fast.ops.backends import triton_unavailable
from resunet_fast.ops.bn_act import reference
from resunet_fast.ops.bn_act.triton_tiling import (
    REDUCTION,
    SWEEP,
    WINDOW_REDUCTION,
    WINDOW_SWEEP,
    Blocks,
    Extent,
    extent_of,
    tiling,
)
from resunet_fast.testing import assert_close, tolerance

pytestmark = pytest.mark.skipif(bool(triton_unavailable()), reason="; ".join(triton_unavailable()))
kernel = pytest.importorskip("resunet_fast.ops.bn_act.triton_kernel")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
layouts = pytest.mark.parametrize("layout", LAYOUTS)
# Several blocks of positions per span, spans per run and blocks of channels, all of them ragged.
SMALL = Blocks(elements=32, channels=8, programs=8, steps=3)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "blocks_for", lambda *, reduces, pool: SMALL)
    monkeypatch.setattr(kernel, "MERGE_TILES", 2)
    monkeypatch.setattr(kernel, "MERGE_ELEMENTS", 4)


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def image(layout: str, *shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return draw(*shape, dtype=dtype, seed=seed).contiguous(memory_format=LAYOUTS[layout])


def forward_arguments(x: Tensor, residual: str, pool: bool, relu: bool = True) -> list[Any]:
    c = x.shape[1]
    own = [draw(c, dtype=x.dtype, seed=1), draw(c, dtype=x.dtype, seed=2), None, None, 1e-5]
    if residual == "none":
        return [x, *own, None, False, *[None] * 4, 0.0, relu, pool]
    r = draw(*x.shape, dtype=x.dtype, seed=3).contiguous(memory_format=LAYOUTS[layout_name(x)])
    if residual == "tensor":
        return [x, *own, r, False, *[None] * 4, 0.0, relu, pool]
    return [x, *own, r, True, draw(c, dtype=x.dtype, seed=4), None, None, None, 1e-3, relu, pool]


def layout_name(x: Tensor) -> str:
    return "nchw" if x.is_contiguous() else "nhwc"


def backward_arguments(
    forward: Sequence[Any], outputs: Sequence[Tensor | None], seed: int = 7
) -> list[Any]:
    x, weight, bias, mean, var, eps, r, norm, rweight, _, rmean, rvar, reps, relu, pool = forward
    z, pooled, own_mean, own_var, residual_mean, residual_var = outputs
    dz = torch.empty_like(z).copy_(draw(*z.shape, seed=seed))
    dpooled = torch.empty_like(pooled).copy_(draw(*pooled.shape, seed=seed + 1)) if pool else None
    stats = [own_mean if mean is None else mean, own_var if var is None else var]
    other = [residual_mean if rmean is None else rmean, residual_var if rvar is None else rvar]
    kept = z if pool or r is not None else None
    return [
        *[dz, dpooled, x, kept, weight, bias, *stats, eps, mean is None],
        *[r if norm else None, rweight, *other, reps, norm and rmean is None, relu],
        [True, True, True, r is not None, norm, norm],
    ]


def compare(results: Sequence[Any], expected: Sequence[Any], allowed: float) -> None:
    for i, (result, judge) in enumerate(zip(results, expected, strict=True)):
        assert (result is None) == (judge is None), i
        if result is not None:
            assert result.stride() == judge.stride(), i
            assert_close(f"result {i}", result, judge, allowed)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("pool", [False, True], ids=["flat", "pool"])
@pytest.mark.parametrize("residual", ["none", "tensor", "norm"])
@layouts
def test_ragged_blocks_in_every_direction(layout: str, residual: str, pool: bool) -> None:
    x = image(layout, 2, 5, 9, 13)
    arguments = forward_arguments(x, residual, pool)
    outputs = kernel.forward(*arguments)
    compare(outputs, reference.forward(*arguments), tolerance(torch.float64, 234))
    gradients = backward_arguments(arguments, outputs)
    compare(
        kernel.backward(*gradients),
        reference.backward(*gradients),
        4 * tolerance(torch.float64, 234),
    )


@pytest.mark.usefixtures("small_blocks")
@layouts
def test_small_blocks_are_many(layout: str) -> None:
    cut = tiling(extent_of(image(layout, 2, 5, 9, 13), LAYOUTS[layout], False), SMALL)
    assert cut.tiles > kernel.MERGE_TILES
    assert cut.spans > 1
    assert cut.steps > 1
    assert cut.programs > cut.tiles


@pytest.mark.usefixtures("small_blocks")
@layouts
def test_the_same_bits_every_time(layout: str) -> None:
    arguments = forward_arguments(image(layout, 2, 5, 7, 9, dtype=torch.float32), "norm", pool=True)
    outputs = [kernel.forward(*arguments) for _ in range(2)]
    gradients = [kernel.backward(*backward_arguments(arguments, o)) for o in outputs]
    for first, second in zip(outputs[0] + gradients[0], outputs[1] + gradients[1], strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@layouts
def test_what_is_not_finite_stays_in_its_channel(layout: str, value: float) -> None:
    x = image(layout, 2, 5, 4, 6)
    x[1, 2, 3, 1] = value
    arguments = forward_arguments(x, "none", pool=True)
    outputs = kernel.forward(*arguments)
    expected = reference.forward(*arguments)
    compare(outputs, expected, tolerance(torch.float64, 48))
    gradients = backward_arguments(arguments, expected)
    results, judges = kernel.backward(*gradients), reference.backward(*gradients)
    compare(results, judges, 4 * tolerance(torch.float64, 48))
    others = [0, 1, 3, 4]
    assert all(t[:, others].isfinite().all() for t in (*outputs[:2], results[0]))


@layouts
def test_relu_of_special_values(layout: str) -> None:
    values = torch.tensor([torch.nan, -0.0, 0.0, -1.0, 2.0, torch.inf, -torch.inf, 1e-300])
    x = values.double().view(1, 1, 2, 4).expand(1, 3, 2, 4)
    x = x.contiguous(memory_format=LAYOUTS[layout]).to(DEVICE)
    zeros, ones = torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE)
    z = kernel.forward(x, None, None, zeros, ones, 0.0, None, False, *[None] * 4, 0.0, True, False)
    # Bits: the sign of zero counts.
    expected = (x + 0.0).relu()  # x * 1 + 0 turns -0. into 0.
    assert torch.equal(z[0].isnan(), x.isnan())
    assert torch.equal(z[0].nan_to_num(), expected.nan_to_num())
    negative = kernel.forward(
        -x.abs() * 0.0, ones, -zeros, zeros, ones, 0.0, None, False, *[None] * 4, 0.0, True, False
    )[0]
    finite = x.isfinite()
    assert torch.equal(negative.signbit()[finite], torch.ones_like(finite)[finite])
    dz = torch.ones_like(x)
    for kept in (None, z[0]):
        dx = kernel.backward(
            *[dz, None, x, kept, None, None, zeros, ones, 0.0, False],
            *[None, None, None, None, 0.0, False, True, [True, *[False] * 5]],
        )[0]
        assert torch.equal(dx, ((x > 0) | x.isnan()).double())


@layouts
def test_ties_and_nan_in_a_window(layout: str) -> None:
    cells = torch.tensor([0.0, 1.0, torch.nan, -torch.inf], dtype=torch.float64)
    windows = torch.cartesian_prod(cells, cells, cells, cells)  # [256, 4]
    x = windows.view(1, 16, 16, 2, 2).permute(0, 1, 3, 2, 4).reshape(1, 1, 32, 32)
    x = x.expand(1, 2, 32, 32).contiguous(memory_format=LAYOUTS[layout]).to(DEVICE)
    zeros, ones = torch.zeros(2, device=DEVICE), torch.ones(2, device=DEVICE)
    arguments = [x, None, None, zeros, ones, 0.0, None, False, *[None] * 4, 0.0, False, True]
    z, pooled, *_ = kernel.forward(*arguments)
    leaf = z.clone().requires_grad_()
    expected = F.max_pool2d(leaf, 2)
    assert torch.equal(pooled.isnan(), expected.isnan())
    assert torch.equal(pooled.nan_to_num(), expected.nan_to_num())
    dpooled = torch.empty_like(pooled).copy_(draw(*pooled.shape))
    expected.backward(dpooled)
    dx = kernel.backward(
        *[None, dpooled, x, z, None, None, zeros, ones, 0.0, False],
        *[None, None, None, None, 0.0, False, False, [True, *[False] * 5]],
    )[0]
    assert torch.equal(dx, leaf.grad)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("outlier", [0.0, -1e4])
@layouts
def test_mean_of_a_thousand_deviations(layout: str, outlier: float) -> None:
    x = (image(layout, 2, 3, 9, 13) + 1e3).float()
    x[0, 1, 0, 0] += outlier  # in the block whose mean is the shift
    mean, var = kernel.statistics(x, LAYOUTS[layout])
    exact_mean, exact_var = reference.statistics(x.double())
    assert ((mean - exact_mean).abs() <= 1e3 * torch.finfo(torch.float32).eps).all()
    assert ((var - exact_var) / exact_var).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@layouts
def test_statistics_are_those_of_the_stored_values(layout: str, dtype: torch.dtype) -> None:
    x = image(layout, 2, 3, 9, 13, dtype=dtype)
    for result, exact in zip(
        kernel.statistics(x, LAYOUTS[layout]), reference.statistics(x.double()), strict=True
    ):
        assert result.dtype == torch.float32
        assert_close("statistics", result, exact, tolerance(torch.float32, 234))


STRANGE: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded": lambda x: x[:, :, :1].expand(x.shape),
    "transposed": lambda x: x.mT.contiguous().mT,
    "every-other": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "batch-innermost": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
}


@pytest.mark.parametrize("view", STRANGE)
def test_any_strides(view: str) -> None:
    x = STRANGE[view](image("nchw", 2, 3, 4, 6))
    arguments = forward_arguments(x, "tensor", pool=True)
    arguments[6] = STRANGE[view](arguments[6])
    expected = reference.forward(*arguments)
    compare(kernel.forward(*arguments), expected, tolerance(torch.float64, 48))
    gradients = backward_arguments(arguments, expected)
    gradients[:2] = [STRANGE[view](g) for g in gradients[:2]]
    compare(
        kernel.backward(*gradients), reference.backward(*gradients), tolerance(torch.float64, 48)
    )


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("pool", [False, True], ids=["flat", "pool"])
@layouts
def test_nothing_beside_an_image_is_read_or_written(layout: str, pool: bool) -> None:
    arguments = forward_arguments(image(layout, 2, 5, 5, 7), "norm", pool)
    guard_bands.check("bn_act", arguments, "triton")
    gradients = backward_arguments(arguments, kernel.forward(*arguments))
    guard_bands.check("bn_act_backward", gradients, "triton")


@pytest.fixture
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.usefixtures("poisoned", "small_blocks")
@layouts
def test_every_partial_and_vector_is_written(layout: str) -> None:
    assert torch.empty(3).isnan().all()
    arguments = forward_arguments(image(layout, 2, 5, 5, 7), "norm", pool=False)
    outputs = kernel.forward(*arguments)
    gradients = kernel.backward(*backward_arguments(arguments, outputs))
    assert all(t.isfinite().all() for t in (*outputs, *gradients) if t is not None)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5)])
def test_empty_images(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, device=DEVICE)
    vectors = [torch.ones(shape[1], device=DEVICE) for _ in range(2)]
    outputs = kernel.forward(
        x, *vectors, None, None, 1e-5, None, False, *[None] * 4, 0.0, True, True
    )
    assert [t.shape for t in outputs[:2]] == [x.shape, (*shape[:2], 2, 2)]
    assert outputs[2].isnan().all()
    grads = kernel.backward(
        *[x, None, x, None, *vectors, *vectors, 1e-5, True],
        *[None, None, None, None, 0.0, False, True, [True, True, True, False, False, False]],
    )
    assert grads[0].shape == x.shape
    assert torch.equal(grads[1], torch.zeros_like(vectors[0]))


EXTENTS = {
    "level-0": Extent(1, 16 * 512**2, 16 * 512**2, 64, True),
    "level-4": Extent(1, 16 * 32**2, 16 * 32**2, 1024, True),
    "level-0-planes": Extent(16, 512**2, 512**2, 64, False),
    "level-4-planes": Extent(16, 32**2, 32**2, 1024, False),
    "level-0-windows": Extent(16, 256**2, 512**2, 64, True),
    "odd": Extent(3, 35, 35, 70, True),
    "one": Extent(1, 1, 1, 1, False),
}


@pytest.mark.parametrize("blocks", [REDUCTION, SWEEP, WINDOW_REDUCTION, WINDOW_SWEEP, SMALL])
@pytest.mark.parametrize("name", EXTENTS)
def test_programs_cover_every_position_and_fill_the_gpu(name: str, blocks: Blocks) -> None:
    extent = EXTENTS[name]
    cut = tiling(extent, blocks)
    span = cut.steps * cut.block_p
    assert (cut.spans - 1) * span < extent.positions <= cut.spans * span
    assert cut.tiles == cut.spans * extent.runs
    assert cut.programs == cut.tiles * -(-extent.channels // cut.block_c)
    assert cut.block_p * cut.block_c <= blocks.elements
    if name.startswith("level"):
        assert cut.programs >= 4 * 132  # on each of an H200's multiprocessors
        assert cut.programs < 2 * blocks.programs or cut.steps in (
            blocks.steps,
            -(-extent.positions // cut.block_p),
        )


def test_the_package_is_imported_without_triton() -> None:
    code = "import sys, resunet_fast; print([m for m in sys.modules if m.startswith('triton')])"
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": root},
    )
    assert ast.literal_eval(done.stdout) == []


@pytest.mark.parametrize("operator", ["bn_act", "upsample", "running_stats"])
def test_builds_describe_whole_launches(operator: str) -> None:
    module = importlib.import_module(f"resunet_fast.ops.{operator}.triton_kernel")
    builds = module.builds()
    assert len({build.name for build in builds}) == len(builds)
    for build in builds:
        assert list(build.signature) == list(build.kernel.arg_names)
        constants = {name for name, kind in build.signature.items() if kind == "constexpr"}
        assert constants == set(build.constexprs)
        assert set(build.aligned) <= set(build.signature) - constants
