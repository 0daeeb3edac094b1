"""Part `check`: is every implementation right on this GPU, wherever its operands come from?"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from resunet_fast.registry import OPERATORS
from resunet_fast.testing import Case
from resunet_fast.testing.checks import (
    DTYPES,
    LAYOUTS,
    check_backward,
    check_forward,
    differentiable,
    run,
)

from .. import table as tables
from ..timing import captured
from .calls import Call, candidates, device, misaligned, same, some_cases
from .job import Job, Record, UnavailableError

REPEATS, ITERATIONS = 20, 1000
# An image whose elements are no power of two: an address that wraps reads something else.
LARGE = (34, 64, 1000, 1030)


def jobs(dry: bool) -> list[Job]:
    """One job per backend and question; the comparison with float64 one per operator."""
    # Float32 is judged as float32, and the library's convolutions are asked for the same bits too.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    found = [Job("kernels compiled for sm_90", offline, patience=400)] if dry else []
    for backend, reasons in candidates(dry).items():
        if reasons:
            found.append(Job(backend, partial(_unavailable, reasons)))
            continue
        for name in sorted(OPERATORS):
            some = [case for case in some_cases(backend, first=dry) if case.operator == name]
            for dtype in (DTYPES[1:2] if dry else DTYPES) if some else ():
                ask = partial(float64, some, backend, dtype, dry)
                title = f"{backend}: {name} {str(dtype)[6:]} against float64"
                found.append(Job(title, ask, patience=240))
        for question, (run_one, needs_gpu) in QUESTIONS.items():
            ask = partial(_over_cases, run_one, backend, dry)
            found.append(Job(f"{backend}: {question}", ask, patience=240, needs_gpu=needs_gpu))
        ask = partial(large, backend)
        found.append(Job(f"{backend}: beyond 2^31 elements", ask, 200, needs_gpu=True))
    return found


def offline() -> Record:
    """Compile the first build of every Triton kernel without a GPU."""
    command = [sys.executable, "-m", "resunet_fast.testing.offline", "--arch", "90", "--main"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    said = (done.stdout + done.stderr).strip()
    assert done.returncode == 0, said[-500:]
    return {"note": said.splitlines()[-1]}


def _unavailable(reasons: list[str]) -> Record:
    raise UnavailableError("; ".join(reasons))


def float64(some: list[Case], backend: str, dtype: torch.dtype, dry: bool) -> Record:
    """Results and mask-conditioned gradients in both layouts; the worst as a share of allowed."""
    layouts = ["nhwc"] if dry else list(LAYOUTS)
    wrong, shares = [], []
    for case, layout in product(some, layouts):
        for check in (check_forward, check_backward):
            if check is check_backward and not differentiable(case):
                continue
            try:
                with torch.device(device(dry)):
                    shares.append(check(case, backend, LAYOUTS[layout], dtype))
            except AssertionError as error:
                name = check.__name__.removeprefix("check_")
                wrong.append(f"{case.id} {layout} {name}: {error}")
    count = len(wrong) + len(shares)
    assert not wrong, f"{len(wrong)} of {count}: " + " | ".join(wrong[:4])
    ran = [share for share in shares if share is not None]  # None: refused
    worst = max(ran, default=None)
    return {"checks": len(ran), "refused": count - len(ran), "worst_share_of_allowed": worst}


def _over_cases(run_one: Callable[[Call], None], backend: str, dry: bool) -> Record:
    """Ask one question of every case that the backend does not refuse."""
    count, wrong = 0, []
    for case in some_cases(backend, first=dry):
        call = Call(case, backend, torch.float32 if dry else torch.bfloat16, device(dry))
        if call.refused:
            continue
        count += 1
        try:
            run_one(call)
        except AssertionError as error:
            wrong.append(f"{case.id}: {error}")
    assert not wrong, f"{len(wrong)} of {count}: " + " | ".join(wrong[:4])
    return {"checks": count}


def offsets(call: Call) -> None:
    """Operands one element behind an aligned address."""
    moved = [misaligned(v) if isinstance(v, Tensor) else v for v in call.inputs]
    if OPERATORS[call.case.operator].implementations[call.backend].refusals(*moved):
        return
    same("misaligned", call(moved), call(), call.allowed())


def determinism(call: Call) -> None:
    """The same bits every time."""
    first = call()
    # Interpreted kernels are slow, and in order anyway.
    for _ in range(REPEATS if call.inputs[0].is_cuda else 2):
        same("repeated", call(), first)


def streams(call: Call) -> None:
    """Operands that another stream is still writing when the operator is called on it."""
    expected = call()
    late = [v.detach().clone().fill_(torch.nan) if _floating(v) else v for v in call.inputs]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for target, source in zip(late, call.inputs, strict=True):
            if _floating(source):
                target.copy_(source.detach())
                target.requires_grad_(source.requires_grad)
        results = call(late)
    stream.synchronize()
    same("on a stream", results, expected)


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def graphs(call: Call) -> None:
    """Recorded once, replayed on other values."""
    found: list[list[Tensor | None]] = []

    def once() -> None:
        found[:] = [call()]

    replay = captured(once, "cuda")
    with torch.no_grad():
        for tensor in call.tensors():
            if tensor.is_floating_point():
                tensor.mul_(1.25)
    replay()
    torch.cuda.synchronize()
    same("replayed", found[0], call())


def leaks(call: Call) -> None:
    """A thousand times without a byte more."""
    for _ in range(10):
        call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(ITERATIONS):
        call()
    torch.cuda.synchronize()
    more = torch.cuda.memory_allocated() - before
    assert more == 0, f"{more} bytes more after {ITERATIONS} calls"


QUESTIONS: dict[str, tuple[Callable[[Call], None], bool]] = {
    "misaligned offsets": (offsets, False),
    "determinism": (determinism, False),
    "non-default streams": (streams, True),
    "graph capture": (graphs, True),
    "no leak": (leaks, True),
}


def large(backend: str) -> Record:
    """Tensors of more than 2^31 elements: every image must come out as it does alone."""
    n, c, h, w = LARGE
    image = (1, c, h, w)
    half = (1, c, h // 2, w // 2)
    todo = [
        Case("bn_act", "large", image, {"frozen": True, "residual": "tensor", "pool": True}),
        Case("conv_bias_act", "large", image, {"out": c}),
        Case("conv2d", "large", image, {"out": c, "bias": False}),
        Case("upsample", "large", half, {"size": [h, w], "mode": "bilinear_align_corners"}),
    ]
    done = []
    for case in todo:
        if backend in OPERATORS[case.operator].implementations:
            call = Call(case, backend, torch.bfloat16, "cuda")
            if not call.refused:
                _images_alike(call, n)
                done.append(case.operator)
        torch.cuda.empty_cache()
    return {"checks": len(done), "operators": done}


@torch.no_grad()
def _images_alike(call: Call, count: int) -> None:
    alone = run(call.case, call.inputs, call.backend)[0]
    layout = torch.channels_last
    many = [
        v.expand(count, -1, -1, -1).contiguous(memory_format=layout)
        if isinstance(v, Tensor) and v.dim() == 4 and v.shape[0] == 1
        else v
        for v in call.inputs
    ]
    first = run(call.case, many, call.backend)[0]
    assert first is not None
    assert first.numel() > 2**31, f"only {first.numel()} elements"
    for number in range(count):
        # Tiles may cut images differently: the same numbers, not always the same order of sums.
        same(f"{call.case.operator}, image {number}", [first[number : number + 1]], [alone], 0.02)


def table(records: list[Record]) -> str:
    cells = [["question", "checks", "worst / allowed", "seconds", "status"]]
    for record in records[1:]:
        share = record.get("worst_share_of_allowed")
        worst = "" if share is None else f"{share:.2f}"
        seconds = f"{record.get('seconds', 0):.1f}"
        count = str(record.get("checks", ""))
        cells.append([record["job"], count, worst, seconds, record["status"]])
    return tables.columns(cells)
