"""One convolution shape and operation: torch's way through cuDNN, and the registry's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from resunet_fast.registry import OPERATORS

from ..roofline import Ceilings, Work, size
from . import frontend
from .calls import candidates, device
from .job import FAILED, OK, UNAVAILABLE, WRONG, Record, UnavailableError, failed
from .measure import Results, row

OPERATIONS = ("fprop", "relu", "add_relu", "dgrad", "wgrad")
Shape = tuple[int, int, int, int, int, int]  # N, H, W, C, K, kernel
GEOMETRY: list[Any] = [[1, 1], [1, 1], [1, 1], 1]
# Of the norm of float32's result, from the same rounded operands: rounding once, and sums in
# float32 in another order.
ALLOWED = 1e-2


class Operands(NamedTuple):
    """x, weight, bias, residual z and gradient g, channels_last."""

    x: Tensor
    w: Tensor
    b: Tensor
    z: Tensor
    g: Tensor


def label(shape: Shape) -> str:
    n, h, w, c, k, _ = shape
    return f"{n}x{h}x{w} {c}->{k}"


def operands(shape: Shape, dtype: torch.dtype, at: str) -> Operands:
    n, h, w, c, k, kernel = shape
    nhwc = torch.channels_last

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, device=at).to(dtype).contiguous(memory_format=nhwc)

    weight = draw(k, c, kernel, kernel) * (c * kernel**2) ** -0.5
    bias = torch.randn(k, device=at).to(dtype)
    return Operands(draw(n, c, h, w), weight, bias, draw(n, k, h, w), draw(n, k, h, w))


def backward(o: Operands, mask: list[bool]) -> Results:
    arguments = (o.g, o.x, o.w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, mask)
    return list(torch.ops.aten.convolution_backward(*arguments))


MASKS = {"dgrad": [True, False, False], "wgrad": [False, True, False]}


def plain(o: Operands, operation: str) -> Results:
    """The formula in torch's own operators, in the operands' dtype."""
    if operation in MASKS:
        return backward(o, MASKS[operation])[:2]
    if operation == "fprop":
        return [F.conv2d(o.x, o.w, None, 1, 1)]
    y = F.conv2d(o.x, o.w, o.b, 1, 1)
    return [(y + o.z if operation == "add_relu" else y).relu()]


def fused_by_cudnn(o: Operands, operation: str) -> Results:
    """cuDNN's fused operators, as torch has them: without derivative, on a GPU only."""
    ones = [1, 1]
    if operation == "relu":
        return [torch.ops.aten.cudnn_convolution_relu(o.x, o.w, o.b, ones, ones, ones, 1)]
    residual = (o.z, 1.0, o.b, ones, ones, ones, 1)
    return [torch.ops.aten.cudnn_convolution_add_relu(o.x, o.w, *residual)]


def through_registry(o: Operands, operation: str) -> tuple[str, list[Any]]:
    """The operator and its arguments without `backend`."""
    if operation == "fprop":
        return "conv2d", [o.x, None, o.w, None, *GEOMETRY, "none"]
    if operation in ("relu", "add_relu"):
        residual = o.z if operation == "add_relu" else None
        return "conv_bias_act", [o.x, o.w, o.b, residual, True, *GEOMETRY]
    first, second, _ = MASKS[operation]
    mask = [first, False, second, False]
    return "conv2d_backward", [o.g, o.x, None, o.w, None, *GEOMETRY, "none", mask]


def work(o: Operands, operation: str) -> Work:
    """Every operand once, every result once."""
    moved = {
        "fprop": (o.x, o.w, o.g),
        "relu": (o.x, o.w, o.g),
        "add_relu": (o.x, o.w, o.z, o.g),
        "dgrad": (o.g, o.w, o.x),
        "wgrad": (o.g, o.x, o.w),
    }[operation]
    n, k, h, w = o.g.shape
    return Work(2.0 * n * h * w * k * o.w[0].numel(), size(*moved))


Way = tuple[str, Callable[[], Results], dict[str, Any]]


def ways(o: Operands, operation: str, dry: bool) -> Iterator[Way | Record]:
    """Every way to compute it, as (name, call, what to record); or a record that says why not."""
    yield "torch (cuDNN)", lambda: plain(o, operation), {}
    if operation in ("relu", "add_relu"):
        if dry:
            yield unavailable("cuDNN fused", "cuDNN's fused operators need a GPU")
            yield unavailable("cudnn-frontend", "cuDNN's graphs need a GPU")
        else:
            yield "cuDNN fused", lambda: fused_by_cudnn(o, operation), {}
            yield from _frontend(o, operation)
    name, arguments = through_registry(o, operation)
    for backend, reasons in candidates(dry).items():
        implementation = OPERATORS[name].implementations.get(backend)
        if implementation is None:
            continue
        against = reasons or implementation.refusals(*arguments)
        if against:
            yield unavailable(backend, "; ".join(against))
            continue

        def call(backend: str = backend) -> Results:
            result = OPERATORS[name](*arguments, backend)
            if not isinstance(result, tuple):
                return [result]
            return [result[0], result[2]]  # the gradients of input and weight

        yield backend, call, {}
        if backend == "triton" and not dry:
            from . import tiles  # needs Triton, which a machine without this backend may lack

            for config in tiles.alternatives(o.g.shape[1], o.x.shape[1], operation):
                tried = tiles.trying(call, name, o, config)
                yield f"triton {tiles.label(config)}", tried, {"config": asdict(config)}


def _frontend(o: Operands, operation: str) -> Iterator[Way | Record]:
    if find_spec("cudnn") is None:
        yield unavailable("cudnn-frontend", "nvidia-cudnn-frontend is not installed")
        return
    try:
        yield "cudnn-frontend", frontend.conv_bias_relu(o, operation), {}
    except UnavailableError as error:
        yield unavailable("cudnn-frontend", str(error))
    except Exception as error:  # of one way to compute: the others of the job are still measured
        yield {"implementation": "cudnn-frontend", **failed(error)}


def unavailable(name: str, reason: str) -> Record:
    return {"implementation": name, "status": UNAVAILABLE, "note": reason}


def measure(shape: Shape, operation: str, known: Callable[[], Ceilings], dry: bool) -> Record:
    """Check and time every way; the record has a row for each."""
    at = device(dry)
    torch.backends.cudnn.benchmark = False  # no search for the float32 judge
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    o = operands(shape, torch.float32 if dry else torch.bfloat16, at)
    exact = plain(Operands(*(t.float() for t in o)), operation)
    torch.backends.cudnn.benchmark = True
    rows: list[Record] = []
    for way in ways(o, operation, dry):
        if isinstance(way, dict):
            rows.append(way)
            continue
        name, call, more = way
        head = {"implementation": name, **more}
        rows.append(row(head, call, exact, ALLOWED, work(o, operation), known(), at))
    fields = dict(zip(("images", "height", "width", "channels", "filters"), shape, strict=False))
    record = {"operation": operation, **fields, "kernel": shape[5], "rows": rows}
    return {**record, "dtype": str(o.x.dtype)[6:], **judged(rows)}


def judged(rows: list[Record]) -> Record:
    """The record's status from its rows'."""
    wrong = [r for r in rows if r["status"] not in (OK, UNAVAILABLE)]
    if not wrong:
        return {"status": OK}
    bad = WRONG if any(r["status"] == WRONG for r in wrong) else FAILED
    return {"status": bad, "note": "; ".join(f"{r['implementation']}: {r['note']}" for r in wrong)}
