"""The tiles that `bench gpu shapes` tries, as builds that are compiled without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

from bench.gpu import tiles
from resunet_fast.ops.conv2d import triton_builds
from resunet_fast.ops.triton_build import Build

EPILOGUES = {
    "plain": (),
    "add_relu": ("HAS_SHIFT", "HAS_RESIDUAL", "RELU"),
    # A data gradient takes the tiles that were fastest without its sums.
    "sums": ("SUMS", "MASK", "HAS_WEIGHT", "HAS_BIAS"),
}


def builds() -> list[Build]:
    return list(_builds())


def _builds() -> Iterator[Build]:
    for filters, tried in ((64, tiles.NARROW), (128, tiles.WIDE)):
        for config in tried:
            with mock.patch.object(triton_builds, "_picked", return_value=config):
                for name, epilogue in EPILOGUES.items():
                    label = f"{name} {tiles.label(config)}"
                    yield triton_builds.box_build(label, "bf16", filters, filters, *epilogue)
    for config in tiles.POINTER:
        with mock.patch.object(triton_builds, "_picked", return_value=config):
            yield triton_builds.pointer_build(tiles.label(config), "bf16", 3, 64)
