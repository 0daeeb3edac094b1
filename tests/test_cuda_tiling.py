"""How the CUDA kernels divide an image among blocks and threads, against brute force."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import emulation
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

MODES = ("nearest", "bilinear", "bilinear_align_corners")
SHAPES = [(2, 3, 5, 7), (1, 8, 4, 4), (2, 520, 3, 2), (1, 1, 1, 1), (3, 24, 40, 33), (0, 4, 2, 2)]


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    output = tmp_path_factory.mktemp("tiling") / "probe.so"
    cxx, _ = emulation.setup_script()["find_compiler"]()
    source = Path(__file__).parent / "cuda/tiling_probe.cpp"
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Werror", "-Wno-unused-function"]
    subprocess.run([cxx, *flags, str(source), "-o", str(output)], check=True)
    library = ctypes.CDLL(str(output))
    library.block_count.restype = library.visit_elements.restype = ctypes.c_int64
    library.share.restype = ctypes.c_float
    return library


def numbers(*values: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(value) for value in values]


def pointer(t: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(t.data_ptr())


# The widths that vector_width gives: see below.
SWEEPS = [
    (shape, last, width)
    for shape in SHAPES
    for last in (True, False)
    for width in (1, 4, 8)
    if (shape[1] if last else shape[2] * shape[3]) % width == 0
]


@pytest.mark.parametrize(("shape", "last", "width"), SWEEPS)
@pytest.mark.parametrize("blocks", [1, 3, 528])
def test_every_element_has_one_owner(
    probe: ctypes.CDLL, shape: tuple[int, ...], last: bool, width: int, blocks: int
) -> None:
    n, c, h, w = shape
    total = n * c * h * w
    visits, channels, slots = torch.zeros(3, max(total, 1), dtype=torch.int64)
    sizes = torch.zeros(100000, dtype=torch.int64)
    outputs = [pointer(t) for t in (visits, channels, slots, sizes)]
    count = probe.visit_elements(*numbers(*shape), last, width, *numbers(blocks), *outputs)
    assert count >= 0
    assert visits[:total].eq(1).all()
    index = torch.arange(total)
    expected = index % c if last else index // (h * w) % c
    assert torch.equal(channels[:total], expected)
    # Elements of one channel behind each slot, as counted.
    for channel in {0, c - 1}:
        found = torch.bincount(slots[:total][expected == channel], minlength=count)
        assert torch.equal(found, sizes[:count])


@pytest.mark.parametrize("last", [True, False])
def test_the_number_of_blocks_is_bounded(probe: ctypes.CDLL, last: bool) -> None:
    shape = numbers(16, 64, 512, 512)
    assert 132 <= probe.block_count(*shape, last, 8, *numbers(2112)) <= 2112
    more_planes = numbers(4096, 64, 4, 4)
    blocks = probe.block_count(*more_planes, last, 8, *numbers(2112))
    assert blocks <= 2112 if last else blocks == 4096 * 64


def test_more_than_two_to_the_31_elements(probe: ctypes.CDLL) -> None:
    result = torch.zeros(2, dtype=torch.int64)
    for a, b in [(2**40 + 5, 7), (2**33, 2**32), (7, 2**35), (2**32 - 1, 3), (2**62, 2**31)]:
        probe.divide_64(*numbers(a, b), pointer(result))
        assert result.tolist() == [a // b, a % b]
    offsets, complete = torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.bool)
    n, c, h, w = 4096, 64, 112, 112
    position = n * (h // 2) * (w // 2) - 1
    probe.window_at(
        *numbers(n, c, h, w), True, *numbers(position), pointer(offsets), pointer(complete)
    )
    assert offsets.tolist() == [((n * h - 2) * w + w - 2) * c, position * c]


def test_vectors_never_cross_a_run(probe: ctypes.CDLL) -> None:
    for run in range(1, 40):
        for full in (1, 4, 8):
            width = probe.width_for(*numbers(run), full, True)
            assert width == (full if run % full == 0 else 1)
            assert probe.width_for(*numbers(run), full, False) == 1


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (1, 4), (3, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("last", [True, False])
def test_windows_tile_the_image(probe: ctypes.CDLL, size: tuple[int, int], last: bool) -> None:
    n, c, (h, w) = (2, 3, size) if last else (1, 1, size)
    pixel = c if last else 1
    covered = torch.zeros(n * h * w, dtype=torch.int64)
    pooled = []
    offsets, complete = torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.bool)
    for position in range(n * ((h + 1) // 2) * ((w + 1) // 2)):
        probe.window_at(
            *numbers(n, c, h, w), last, *numbers(position), pointer(offsets), pointer(complete)
        )
        upper = int(offsets[0]) // pixel
        right, lower = complete.tolist()
        inside = [upper, *[upper + 1] * right, *[upper + w] * lower]
        covered[inside + [upper + w + 1] * (right and lower)] += 1
        if right and lower:
            pooled.append(int(offsets[1]) // pixel)
            assert upper == _corner(pooled[-1], h, w)
    assert covered.eq(1).all()
    assert pooled == list(range(n * (h // 2) * (w // 2)))


def _corner(pooled: int, h: int, w: int) -> int:
    """The upper left pixel of a complete window, from the index of its pooled pixel."""
    row, column = divmod(pooled, w // 2)
    image, pair = divmod(row, h // 2)
    return (image * h + 2 * pair) * w + 2 * column


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 21, 32, 255, 256])
def test_joining_takes_in_every_row_once(probe: ctypes.CDLL, rows: int) -> None:
    pairs = torch.zeros(2 * rows + 2, dtype=torch.int32)
    count = probe.joins(rows, pointer(pairs))
    held = [{row} for row in range(rows)]
    for into, other in pairs[: 2 * count].view(-1, 2).tolist():
        assert not held[into] & held[other]
        held[into] |= held[other]
        held[other] = set()
    assert held[0] == set(range(rows))


@pytest.mark.parametrize("mode", range(3), ids=MODES)
@pytest.mark.parametrize("sizes", [(1, 1), (1, 5), (5, 1), (4, 8), (8, 4), (7, 17), (32, 64)])
def test_the_gather_is_the_transpose_of_upsampling(
    probe: ctypes.CDLL, mode: int, sizes: tuple[int, int]
) -> None:
    source, target = sizes
    found = torch.zeros(target, source)
    window = torch.zeros(2, dtype=torch.int64)
    for i in range(source):
        probe.readers_of(*numbers(i, source, target), mode, pointer(window))
        begin, end = window.tolist()
        assert 0 <= begin <= target
        for j in range(begin, end):
            found[j, i] = probe.share(*numbers(j, i, source, target), mode)
    kind = {"mode": "nearest"} if mode == 0 else {"mode": "bilinear", "align_corners": mode == 2}
    units = torch.eye(source)[None, :, :, None]
    matrix = F.interpolate(units, size=(target, 1), **kind)[0, :, :, 0].t()  # type: ignore[arg-type]
    torch.testing.assert_close(found, matrix, atol=1e-6, rtol=0)
