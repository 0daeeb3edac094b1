"""Tiles: weights, equality with the whole image, how far a network sees, memory."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from children import run_python
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import VARIANTS, randomised, variant_id
from PIL import Image
from torch import Tensor, nn

import resunet_fast as rf
from resunet_fast import checkpoint
from resunet_fast.checkpoint import ModelConfig, Normalisation
from resunet_fast.segmentation import SegmentationError, Settings, segment
from resunet_fast.tiling import bands, cell_size, receptive_radius, spans
from resunet_fast.windows import windowed

LEVELS = {"base_width": 4, "width_factors": (1, 2, 3)}
SIZE = (237, 202)  # odd on some levels, so that rounding the size matters
TILE = 96


def network(bias: float = 0.5, **options: object) -> rf.ResUNet:
    """Narrow, in float64, with batch norms that open ReLUs and logits that are about as wide as 1.

    Args:
        bias: added to the batch norms'; with a large one every ReLU is open everywhere.
        options: of the model.
    """
    torch.manual_seed(0)
    model = randomised(rf.ResUNet(3, 1, **{**LEVELS, **options})).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.bias.data += bias
    with torch.no_grad():
        logits = model(torch.rand(1, 3, 64, 64, dtype=torch.float64))
        model.outc.weight /= logits.std()
        model.outc.bias.copy_((model.outc.bias - logits.mean()) / logits.std())
    return model


def picture(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).random((height, width, channels))


def core(size: int, tile: int, overlap: int, cell: int) -> np.ndarray:
    """Where only one tile lies."""
    count = np.zeros(size, dtype=int)
    for span in spans(size, tile, overlap, cell):
        count[span.pixels] += 1
    return np.flatnonzero(count == 1)


# Weights


@given(
    size=st.integers(1, 400),
    cell=st.sampled_from([1, 2, 4, 16]),
    tiles=st.integers(2, 8),
    share=st.floats(0, 1),
)
@settings(deadline=None)
def test_weights_add_up_to_one(size: int, cell: int, tiles: int, share: float) -> None:
    tile = tiles * cell
    overlap = int(share * (tile - cell))
    total = np.zeros(size)
    parts = spans(size, tile, overlap, cell)
    for span in parts:
        assert span.start % cell == 0
        assert span.stop - span.start <= tile
        assert span.weight.min() > 0
        total[span.pixels] += span.weight
    np.testing.assert_allclose(total, 1, rtol=1e-6)
    for before, after in itertools.pairwise(parts):
        assert before.stop - after.start >= min(overlap, size)


def test_weights_fall_towards_the_edge_and_are_one_alone() -> None:
    first, second = spans(150, 100, 50, 1)
    assert (first.start, first.stop, second.start, second.stop) == (0, 100, 50, 150)
    assert np.all(first.weight[:50] == 1)
    assert np.all(np.diff(first.weight[50:]) < 0)
    np.testing.assert_allclose(first.weight[50:] + second.weight[:50], 1, rtol=1e-6)


def test_bands_keep_no_more_than_a_row_of_tiles() -> None:
    asked: list[tuple[slice, slice]] = []

    def solve(windows: list[tuple[slice, slice]]) -> list[np.ndarray]:
        asked.extend(windows)
        shapes = [tuple(s.stop - s.start for s in window) for window in windows]
        return [np.ones(shape, dtype=np.float32) for shape in shapes]

    tops = []
    for top, rows in bands(solve, 500, 90, tile=64, overlap=16, cell=4, batch=3):
        # Nothing below the next row of tiles has been computed when these rows are handed over.
        assert max(window[0].stop for window in asked) <= top + 64
        np.testing.assert_allclose(rows, 1, rtol=1e-6)
        tops.append((top, len(rows)))
    assert [top for top, _ in tops[1:]] == [top + count for top, count in tops[:-1]]
    assert sum(count for _, count in tops) == 500


# Equality with the whole image


@pytest.mark.parametrize("options", VARIANTS, ids=variant_id)
def test_inside_tiles_the_result_is_that_of_the_whole_image(options: dict[str, object]) -> None:
    model = network(**options)
    cell = cell_size(model)
    overlap = -(-receptive_radius(model) // cell) * cell
    image = picture(*SIZE)
    whole = segment(model, image).probability
    tiled = segment(model, image, tile=TILE, overlap=overlap, batch=2).probability
    rows, columns = (core(size, TILE, overlap, cell) for size in SIZE)
    assert len(rows) > 40
    assert len(columns) > 40
    inside = np.ix_(rows, columns)
    assert whole[inside].std() > 0.05
    np.testing.assert_allclose(tiled[inside], whole[inside], atol=1e-6)
    # In the seams the tile's border is in sight, and fades.
    assert np.abs(tiled - whole).mean() < 0.2 * whole.std()


def test_without_the_images_coordinates_tiles_would_differ(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The comparison above is sharp enough to see what windows.py is for."""
    model = network()
    overlap = -(-receptive_radius(model) // 4) * 4
    image = picture(*SIZE)
    whole = segment(model, image).probability
    monkeypatch.setattr("resunet_fast.segmentation.windowed", lambda network, *_: network)
    tiled = segment(model, image, tile=TILE, overlap=overlap).probability
    inside = np.ix_(*(core(size, TILE, overlap, 4) for size in SIZE))
    assert np.abs(tiled[inside] - whole[inside]).max() > 1e-4


def test_a_windowed_network_shares_weights_and_leaves_the_network_alone() -> None:
    model = network()
    before = model.stages
    twin = windowed(model, [(slice(0, 32), slice(0, 32))], (64, 64))
    assert model.stages is before
    assert twin.outc.weight is model.outc.weight


def test_an_image_smaller_than_a_tile_is_done_whole() -> None:
    model = network()
    image = picture(40, 61)
    whole, tiled = (segment(model, image, **o).probability for o in ({}, {"tile": 64}))
    np.testing.assert_array_equal(whole, tiled)


def test_batches_change_nothing() -> None:
    model, image = network(), picture(*SIZE)
    one, three = (segment(model, image, tile=48, batch=n).probability for n in (1, 3))
    np.testing.assert_allclose(one, three, atol=1e-6)


def test_any_function_of_a_batch_can_be_tiled() -> None:
    def brightness(batch: Tensor) -> Tensor:
        return torch.logit(batch.mean(1, keepdim=True))

    image = picture(150, 90)
    probability = segment(brightness, image, tile=32, overlap=5).probability
    np.testing.assert_allclose(probability, image.mean(2), atol=1e-5)


def test_a_function_that_says_where_it_is_gets_its_input_there() -> None:
    class Elsewhere:
        device = torch.device("meta")

        def __call__(self, batch: Tensor) -> Tensor:
            assert batch.device == self.device
            return torch.zeros(len(batch), 1, *batch.shape[2:])

    assert segment(Elsewhere(), picture(8, 9)).probability.max() == 0.5


def test_large_images_are_tiled_unasked() -> None:
    sizes = []

    def note(batch: Tensor) -> Tensor:
        sizes.append(tuple(batch.shape[2:]))
        return batch[:, :1]

    segment(note, picture(700, 700))
    assert sizes[0] == (700, 700)
    sizes.clear()
    segment(note, picture(800, 700))
    assert max(sizes) <= (512, 512)
    assert len(sizes) == 4


def test_the_defaults_of_the_articles_network() -> None:
    model = rf.create_model("resunet", base_width=1)
    assert cell_size(model) == 16
    assert receptive_radius(model) == 182
    assert Settings().sizes(16) == (512, 128)


def test_bfloat16_rounds_and_float32_does_not() -> None:
    model, image = network().float(), picture(64, 64)
    exact = segment(model.double(), image).probability
    model.float()
    errors = [
        np.abs(segment(model, image, dtype=dtype).probability - exact).max()
        for dtype in ("float32", "bfloat16")
    ]
    assert errors[0] < 1e-5 < errors[1] < 0.1


def test_progress_ends_with_one() -> None:
    seen: list[float] = []
    segment(network(), picture(*SIZE), tile=48, on_progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 1
    assert len(seen) > 3


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"tile": 0}, "tile: expected a multiple of 4 from 8, got 0"),
        ({"tile": -64}, "tile: expected a multiple of 4 from 8, got -64"),
        ({"tile": 4}, "tile: expected a multiple of 4 from 8, got 4"),
        ({"tile": 66}, "tile: expected a multiple of 4 from 8, got 66"),
        ({"tile": 32, "overlap": 32}, "overlap: expected 0 to 28 for tiles of 32, got 32"),
        ({"overlap": -1}, "overlap: expected 0 to 508 for tiles of 512, got -1"),
        ({"batch": 0}, "batch: expected at least 1, got 0"),
        ({"dtype": "int8"}, "dtype: expected one of ['float32', 'bfloat16'], got 'int8'"),
        ({"threshold": 2}, "threshold: expected a number between 0 and 1, got 2"),
    ],
)
def test_arguments_out_of_range(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(SegmentationError) as caught:
        segment(network(), picture(16, 16), **options)
    assert str(caught.value) == sentence


# How far a network sees


@pytest.mark.parametrize("options", VARIANTS, ids=variant_id)
def test_the_receptive_radius_bounds_what_a_pixel_depends_on(options: dict[str, object]) -> None:
    model = network(bias=5.0, **options)
    radius = receptive_radius(model)
    size, centre = 128, 64
    x = torch.rand(1, 3, size, size, dtype=torch.float64, requires_grad=True)
    reach = 0
    y = model(x)
    for pixel in (centre, centre + 1, centre + 3):
        (grad,) = torch.autograd.grad(y[0, 0, pixel, pixel], x, retain_graph=True)
        rows, columns = (grad[0].abs().sum(0) > 0).nonzero(as_tuple=True)
        reach = max(reach, int((rows - pixel).abs().max()), int((columns - pixel).abs().max()))
    assert reach <= radius
    assert reach > 0.4 * radius  # not a bound that anything would keep


# Memory


PROGRAM = """
import re, sys
from pathlib import Path
from resunet_fast import cli, predict
from resunet_fast.checkpoint import load
def kibibytes(field):
    return int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
model, image, out, *settings = sys.argv[1:]
keep = load(model)
before = kibibytes("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
kinds = "mask,overlay,probability,probability-png"
arguments = ["--model", model, image, "--out", out, "--save", kinds, *settings]
code = cli.main(["predict", *arguments])
print((kibibytes("VmHWM") - before) * 1024)
sys.exit(code)
"""


def peak_bytes(directory: Path, size: int, *settings: str, **options: object) -> int:
    """Memory over the loaded model's own that the command takes for a square image."""
    config = ModelConfig("resunet", 3, 1, options, Normalisation((0.5,) * 3, (0.2,) * 3))
    checkpoint.save(directory / "model", config.build(), config)
    stripes = np.arange(size * 3, dtype=np.uint8).reshape(1, size, 3)
    image = directory / "image.tif"
    Image.fromarray(np.broadcast_to(stripes, (size, size, 3)).copy()).save(image)
    paths = [str(directory / name) for name in ("model", "image.tif", "out")]
    result = run_python("-c", PROGRAM, *paths, *settings, cwd=directory, OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    probability = np.load(directory / "out" / "image_probability.npy", mmap_mode="r")
    assert probability.shape == (size, size)
    return int(result.stdout.splitlines()[-1])


def test_memory_grows_with_the_bytes_of_the_results(tmp_path: Path) -> None:
    narrow = {"base_width": 1, "width_factors": (1, 1)}
    sizes = 500, 1500
    small, large = (
        peak_bytes(tmp_path / str(size), size, "--tile", "128", **narrow) for size in sizes
    )
    # Image and overlay 3 bytes each, probability 4, mask 1, their encodings and a copy in decoding.
    assert 8 < (large - small) / (sizes[1] ** 2 - sizes[0] ** 2) < 30
    # The whole image in one piece: a float for each of the network's channels and the input's.
    whole = peak_bytes(tmp_path / "whole", 1500, "--tile", "1536", **narrow)
    assert whole > large + 1500**2 * 4 * 6


@pytest.mark.slow
def test_six_thousand_pixels_square_within_two_gigabytes(tmp_path: Path) -> None:
    """The image's share with a narrow network, and a tile's share with the full one."""
    narrow = {"base_width": 1, "width_factors": (1, 1)}
    image = peak_bytes(tmp_path / "image", 6000, **narrow)
    tile = peak_bytes(tmp_path / "tile", 800, base_width=64)
    assert image > 6000**2 * 8
    assert tile > 512**2 * 4 * 64 * 3
    assert image + tile < 2e9
