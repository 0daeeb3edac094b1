"""Operands and results between guard bands: what lies around them must not matter, nor change.

    python tests/guard_bands.py BACKEND SEED COUNT

tries an implementation on drawn shapes. It is a process of its own because an access far out of
bounds ends it; the case that ran is the last one printed.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import resunet_fast as rf
from resunet_fast.registry import OPERATORS
from resunet_fast.testing import CASES, Case, make_inputs

LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
Call = tuple[str, tuple[Any, ...]]

BAND = 4096  # elements on either side; whole cache lines, so that alignment stays as it was
aten = torch.ops.aten
UNFILLED = (aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided)
FILLED = (aten.zeros, aten.zeros_like, aten.new_zeros, aten.full, aten.full_like, aten.new_full)


def poison(dtype: torch.dtype) -> float | int:
    return torch.nan if dtype.is_floating_point else torch.iinfo(dtype).min + 7


class GuardBands(TorchDispatchMode):
    """Puts every tensor allocated inside the `with` between bands of NaN, and unfilled ones in."""

    def __init__(self) -> None:
        super().__init__()
        self.guarded: list[tuple[Tensor, Tensor]] = []  # (buffer, which elements are bands)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (*UNFILLED, *FILLED) and result.numel():
            return self.guard(result, func.overloadpacket in FILLED)
        return result

    def guard(self, tensor: Tensor, keep: bool = True) -> Tensor:
        """A tensor of the same strides inside a larger buffer; with its values if `keep`."""
        if tensor.numel() == 0:
            return tensor
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        extent = 1 + sum((size - 1) * stride for size, stride in steps)
        buffer = tensor.new_full((extent + 2 * BAND,), poison(tensor.dtype))
        band = torch.ones_like(buffer, dtype=torch.bool)
        place = (tensor.shape, tensor.stride(), BAND)
        band.as_strided(*place).fill_(False)
        self.guarded.append((buffer, band))
        view = buffer.as_strided(*place)
        return view.copy_(tensor) if keep else view

    def assert_intact(self) -> None:
        for buffer, band in self.guarded:
            around = buffer[band]
            expected = torch.full_like(around, poison(buffer.dtype))
            written = int((around != expected).sum() - (around.isnan() & expected.isnan()).sum())
            assert written == 0, f"{written} elements around a tensor were written"


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())


class _Recorder(TorchDispatchMode):
    """Keeps the arguments of every operator of ours that runs, without the backend."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func.name().split("::")
        if namespace == "resunet_fast":
            self.calls.append((name, OPERATORS[name].complete(args)[:-1]))
        return func(*args, **(kwargs or {}))


def calls(case: Case, backend: str, dtype: torch.dtype, layout: torch.memory_format) -> list[Call]:
    """The operators, with their arguments, that forward and backward of a case run."""
    differentiable = case.operator != "conv_bias_act"
    inputs = make_inputs(case, dtype, layout, requires_grad=differentiable)
    with _Recorder() as recorder:
        outputs = OPERATORS[case.operator](*inputs, backend)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if differentiable:
            results = [o for o in outputs[:2] if o is not None and o.requires_grad]
            torch.autograd.backward(results, [torch.randn_like(o) for o in results])
    return recorder.calls


def check(name: str, arguments: Sequence[Any], backend: str) -> None:
    """Compute once as it is and once between guard bands: the same bits, and the bands intact."""
    compute = OPERATORS[name].implementations[backend].compute
    plain = [_copied(value) for value in arguments]
    expected = _tensors(compute(*plain)) + _tensors(plain)
    bands = GuardBands()
    guarded = [bands.guard(v.detach()) if isinstance(v, Tensor) else v for v in arguments]
    with bands:
        results = compute(*guarded)
    found = _tensors(results) + _tensors(guarded)
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert _same(one, other), f"{name}: result {i} depends on what lies around the operands"
        assert one.stride() == other.stride(), f"{name}: result {i} has other strides"
    bands.assert_intact()


def _copied(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    layout = {"dtype": value.dtype, "device": value.device}
    return torch.empty_strided(value.shape, value.stride(), **layout).copy_(value.detach())


def _tensors(values: Any) -> list[Tensor]:
    values = values if isinstance(values, (tuple, list)) else (values,)
    return [value for value in values if isinstance(value, Tensor)]


def runnable(case: Case, backend: str) -> bool:
    implementation = OPERATORS[case.operator].implementations.get(backend)
    return implementation is not None and not implementation.refusals(*make_inputs(case))


def check_case(case: Case, backend: str, dtype: torch.dtype, layout: torch.memory_format) -> int:
    """Check every operator that a case runs; return how many had the implementation."""
    checked = 0
    with rf.use_backend(backend):
        for name, arguments in calls(case, backend, dtype, layout):
            if backend in OPERATORS[name].implementations:
                check(name, arguments, backend)
                checked += 1
    return checked


def drawn(draw: random.Random) -> Case:
    """A line of the table of cases with another shape."""
    case = draw.choice([c for c in CASES if "groups" not in c.options])
    n, c, h, w = draw.randint(1, 3), draw.randint(1, 40), draw.randint(2, 21), draw.randint(2, 21)
    options = dict(case.options)
    if "out" in options or "conv" in case.operator:
        options["out"] = draw.randint(1, 40)
    if "size" in options:
        options["size"] = [draw.randint(1, 30), draw.randint(1, 30)]
    if "skip" in options:
        size = (h, w) if options.get("upsample", "none") == "none" else (2 * h + 1, 2 * w)
        options["skip"] = (n, draw.randint(1, 20), *size)
    return replace(case, shape=(n, c, h, w), options=options)


def main(backend: str, seed: str, count: str) -> None:
    draw = random.Random(int(seed))
    for _ in range(int(count)):
        case = drawn(draw)
        dtype = draw.choice([torch.float32, torch.float16, torch.bfloat16])
        layout = draw.choice(list(LAYOUTS))
        if runnable(case, backend):
            print(case, dtype, layout, flush=True)
            assert check_case(case, backend, dtype, LAYOUTS[layout])


if __name__ == "__main__":
    main(*sys.argv[1:])
