"""The decoder's input, written into a given buffer, and the memory that is lent for it."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
import torch.nn.functional as F
from networks import one_thread as one_thread
from torch import Tensor

import resunet_fast as rf
from resunet_fast.ops import scratch as module
from resunet_fast.ops.scratch import scratch
from resunet_fast.ops.upsample_concat.op import UPSAMPLE_CONCAT
from resunet_fast.testing import assert_close, tolerance

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = (
    ((2, 5, 4, 3), (2, 3, 9, 7)),
    ((1, 16, 8, 8), (1, 16, 16, 16)),
    ((2, 3, 1, 1), (2, 4, 3, 2)),
    ((1, 2, 1, 1), (1, 3, 1, 1)),
    ((1, 1, 3, 3), (1, 1, 7, 6)),
    ((0, 2, 2, 2), (0, 2, 4, 4)),
)
MODES = ("nearest", "bilinear", "bilinear_align_corners")


def operands(shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    low, skip = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    n, c, h, w = skip.shape
    # Poisoned: what is left unwritten shows.
    return [low, skip, torch.full((n, c + low.shape[1], h, w), torch.nan, dtype=dtype)]


def judge(low: Tensor, skip: Tensor, mode: str) -> Tensor:
    size = skip.shape[2:]
    if mode == "nearest" or low.numel() == 0:
        enlarged = F.interpolate(low.double(), size=size) if low.numel() else low.new_empty(
            (*low.shape[:2], *size), dtype=torch.float64
        )  # fmt: skip
    else:
        aligned = mode.endswith("corners")
        enlarged = F.interpolate(low.double(), size=size, mode="bilinear", align_corners=aligned)
    return torch.cat([enlarged, skip.double()], 1)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_both_halves_are_written(mode: str, dtype: torch.dtype, backend: str) -> None:
    layouts = (torch.contiguous_format, torch.channels_last)
    # The reference of an empty batch is torch's, which refuses it.
    shapes = SHAPES if backend == "cpu" else SHAPES[:-1]
    for pair, (inner, outer) in itertools.product(shapes, itertools.product(layouts, layouts)):
        low, skip, output = operands(pair, dtype)
        output = output.contiguous(memory_format=outer)
        skip = skip.contiguous(memory_format=inner)
        assert UPSAMPLE_CONCAT(low, skip, output, mode, backend) is None
        assert_close(str(pair), output, judge(low, skip, mode), 2 * tolerance(dtype))


def test_opcheck() -> None:
    arguments = operands(SHAPES[0], torch.float32)
    for backend in ("cpu", "reference"):
        torch.library.opcheck(UPSAMPLE_CONCAT.overload, (*arguments, "bilinear", backend))


def test_the_buffers_version_moves() -> None:
    *sources, output = operands(SHAPES[0], torch.float32)
    before = output._version
    UPSAMPLE_CONCAT(*sources, output, "nearest")
    assert output._version > before


def test_memory_is_lent_again_and_never_twice_at_once() -> None:
    like = torch.zeros(1, dtype=torch.float32)
    with scratch(like, (1, 2, 3, 4)) as first:
        assert first.shape == (1, 2, 3, 4)
        assert first.is_contiguous(memory_format=torch.channels_last)
        with scratch(like, (1, 2, 3, 4)) as inner:
            assert inner.data_ptr() != first.data_ptr()
    with scratch(like.bfloat16(), (1, 2, 3, 2)) as again:
        assert again.dtype == torch.bfloat16
    with scratch(like, (1, 2, 3, 4)) as last:
        assert last.data_ptr() in (first.data_ptr(), inner.data_ptr())
        seen: list[int] = []

        def other() -> None:
            with scratch(like, (1, 2, 3, 4)) as theirs:
                seen.append(theirs.data_ptr())

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert seen != [last.data_ptr()]


def test_what_is_too_large_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LIMIT", 100)
    module._kept.__dict__.clear()
    with scratch(torch.zeros(1), (1, 2, 4, 4)) as large:
        assert large.numel() == 32
    assert not module._kept.__dict__


def test_a_frozen_network_inside_a_hook_of_another_and_in_threads() -> None:
    torch.manual_seed(0)
    frozen = rf.freeze(rf.ResUNet(3, 2, base_width=4, width_factors=(1, 2)))
    other = rf.freeze(rf.ResUNet(3, 2, base_width=6, width_factors=(1, 2)))
    x = torch.randn(1, 3, 12, 14)
    expected, nested = frozen(x), other(x)
    hook = frozen.decoder_layers[0].register_forward_pre_hook(lambda *_: seen.append(other(x)))
    seen: list[Tensor] = []
    assert torch.equal(frozen(x), expected)
    assert torch.equal(seen[0], nested)
    hook.remove()
    results: list[Tensor] = []
    threads = [threading.Thread(target=lambda: results.append(frozen(x))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(torch.equal(result, expected) for result in results)
    with torch.inference_mode():
        assert torch.equal(frozen(x), expected)
    assert torch.equal(frozen(x), expected)
