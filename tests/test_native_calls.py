"""How the compiled CPU operators are called: configurations, empty images, refusals."""

from __future__ import annotations

import hashlib
import re
import subprocess
from pathlib import Path
from typing import Any

import native_calls as call
import pytest
import torch
from children import run_python
from native_calls import Norm, image
from torch import Tensor

from resunet_fast import native

pytestmark = pytest.mark.skipif(bool(native.unavailable()), reason="; ".join(native.unavailable()))

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
layouts = pytest.mark.parametrize("layout", call.LAYOUTS)


def digest() -> str:
    """One number for the bits of every operator's results."""
    torch.manual_seed(0)
    results: list[Tensor] = []
    for dtype in DTYPES:
        for layout in call.LAYOUTS:
            x, r = image((2, 20, 70, 91), dtype, layout), image((2, 20, 70, 91), dtype, layout)
            norm, shortcut = Norm.random(x), Norm.random(r)
            z, pooled = call.forward(x, norm, r, shortcut, pool=True)
            wanted = ("input", "weight", "bias", "residual", "residual_weight", "residual_bias")
            grads = call.backward(r, x, norm, r, shortcut, output=z, wanted=wanted)
            recomputed = call.backward(r, x, norm)
            up = call.upsample(x, 2, (141, 180), None)
            grad_up, _ = call.upsample_backward(up, 2, x)
            assert pooled is not None
            results += [norm.mean, norm.var, z, pooled, *grads.values(), *recomputed.values()]
            results += [up, grad_up]
    contents = [t.contiguous().view(torch.uint8).numpy().tobytes() for t in results]
    return hashlib.sha256(b"".join(contents)).hexdigest()


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    try:
        digests = set()
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            digests.add(digest())
    finally:
        torch.set_num_threads(before)
    assert len(digests) == 1


def in_subprocess(isa: str, code: str) -> subprocess.CompletedProcess[str]:
    return run_python("-c", code, cwd=Path(__file__).parent, RESUNET_FAST_ISA=isa)


@pytest.mark.parametrize("isa", native.build_info().get("isas", ["default"]))
def test_bits_do_not_depend_on_the_instruction_set(isa: str) -> None:
    code = (
        "from resunet_fast import native; native.unavailable(); import test_native_calls as test;"
        "print(native.ops().cpu_isa(), test.digest())"
    )
    done = in_subprocess(isa, code)
    if done.returncode == 0:
        assert done.stdout.split() == [isa, digest()]
    else:
        assert "that this CPU and build have" in done.stderr


def test_unknown_instruction_set() -> None:
    code = "from resunet_fast import native; native.unavailable(); native.ops().cpu_isa()"
    done = in_subprocess("sse9", code)
    assert done.returncode != 0
    assert "RESUNET_FAST_ISA must name an instruction set" in done.stderr
    assert "got 'sse9'" in done.stderr


@layouts
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0)], ids=str)
def test_empty_images(layout: str, shape: call.Shape) -> None:
    x = image(shape, torch.float32, layout)
    mean, var = call.stats(x)
    assert mean.tolist() == var.tolist() == [0.0] * shape[1]
    norm = Norm(mean, var, torch.ones_like(mean), torch.zeros_like(mean))
    output, pooled = call.forward(x, norm, pool=True)
    assert output.shape == x.shape
    assert pooled is not None
    assert pooled.shape == (shape[0], shape[1], shape[2] // 2, shape[3] // 2)
    grads = call.backward(x, x, norm)
    assert grads["weight"].tolist() == grads["bias"].tolist() == [0.0] * shape[1]
    native.ops().max_pool_backward(None, pooled, output, output)
    native.ops().cast(x, torch.empty_like(x, dtype=torch.bfloat16))


def test_empty_upsampling() -> None:
    x = torch.empty(2, 0, 3, 3)
    skip = torch.randn(2, 4, 6, 6)
    assert torch.equal(call.upsample(x, 1, (6, 6), skip), skip)
    assert call.upsample(torch.empty(0, 2, 3, 3), 1, (6, 6)).shape == (0, 2, 6, 6)
    grad_input, grad_skip = call.upsample_backward(skip, 1, x, skip)
    assert grad_input.shape == x.shape
    assert grad_skip is not None
    assert torch.equal(grad_skip, skip)


X = torch.randn(2, 3, 4, 6)
LAST = X.contiguous(memory_format=torch.channels_last)
V, W = torch.ones(3), torch.ones(4)


def stats(*arguments: Tensor) -> None:
    native.ops().bn_stats(*arguments)


def forward(**changes: Any) -> None:
    named: dict[str, Any] = dict.fromkeys(
        ["residual", "residual_mean", "residual_var", "residual_weight", "residual_bias", "pooled"]
    )
    named |= {"input": X, "mean": V, "var": V, "weight": V, "bias": V, "eps": 0.0}
    named |= {"residual_eps": 0.0, "relu": True, "output": torch.empty_like(X)}
    native.ops().bn_act_forward(**(named | changes))


REFUSALS = {
    "bn_stats: input must have 4 dimensions (N, C, H, W), got 3": lambda: stats(X[0], V, V),
    "bn_stats: input must be float32, float64, bfloat16 or float16, got int64": lambda: stats(
        X.long(), V, V
    ),
    "bn_stats: mean must have shape [3] (one value per channel), got [4]": lambda: stats(X, W, V),
    "bn_stats: var must be contiguous, got strides (2)": lambda: stats(X, V, torch.ones(6)[::2]),
    "bn_stats: var must be float32 for bfloat16 images, got bfloat16": lambda: stats(
        X.bfloat16(), V, V.bfloat16()
    ),
    "bn_stats: input must be dense, contiguous or channels_last": lambda: stats(X[..., ::2], V, V),
    "bn_act_forward: residual must have shape [2, 3, 4, 6], got [2, 3, 4, 5]": lambda: forward(
        residual=torch.ones(2, 3, 4, 5)
    ),
    "bn_act_forward: residual must be float32 like the other images, got float64": lambda: forward(
        residual=X.double()
    ),
    "bn_act_forward: output must be dense, contiguous or channels_last, in the same layout": (
        lambda: forward(output=LAST.clone())
    ),
    "bn_act_forward: pooled must have shape [2, 3, 2, 3], got [2, 3, 4, 6]": lambda: forward(
        pooled=X
    ),
    "bn_act_forward: residual_mean and residual_var must be given together": lambda: forward(
        residual=X, residual_mean=V
    ),
    "bn_act_forward: residual_mean is given without a residual": lambda: forward(
        residual_mean=V, residual_var=V
    ),
    "bn_act_forward: weight must be float32 for float32 images, got float64": lambda: forward(
        weight=V.double()
    ),
    "bn_act_backward: output must be given when there is a residual": lambda: call.backward(
        X, X, Norm(V, V, V, V), X
    ),
    "bn_act_backward: grad_residual_weight and grad_residual_bias need residual_mean": (
        lambda: call.backward(X, X, Norm(V, V, V, V), wanted=("residual_weight",))
    ),
    "upsample_forward: mode must be 0 (nearest), 1 (bilinear)": lambda: call.upsample(X, 3, (8, 8)),
    "upsample_forward: input must have at least one row and one column": lambda: call.upsample(
        X[:, :, :0], 0, (8, 8)
    ),
    "upsample_forward: skip must have shape [2, 3, 8, 8], got [2, 3, 4, 6]": lambda: call.upsample(
        X, 0, (8, 8), X
    ),
    "upsample_backward: grad_input must have the batch size of grad_output": (
        lambda: call.upsample_backward(X[:1], 0, X)
    ),
    "update_running_stats: num_batches_tracked must be given when momentum": (
        lambda: native.ops().update_running_stats(V, V, None, 4, -1.0, V, V, None)
    ),
    "update_running_stats: running_mean must have shape [3]": (
        lambda: native.ops().update_running_stats(V, V, None, 4, 0.1, W, V, None)
    ),
    "update_running_stats: num_batches_tracked must be one int64, got float32": (
        lambda: native.ops().update_running_stats(V, V, None, 4, 0.1, V, V, V)
    ),
    "cast: input and output must be dense with the same strides": (
        lambda: native.ops().cast(X, LAST.clone())
    ),
    "cast: output must have shape [2, 3, 4, 6] like input": lambda: native.ops().cast(X, V),
}


@pytest.mark.parametrize("sentence", REFUSALS)
def test_refusal(sentence: str) -> None:
    with pytest.raises(RuntimeError, match=re.escape(sentence)):
        REFUSALS[sentence]()


def test_vectors_of_one_channel_and_images_of_one_pixel_fit_both_layouts() -> None:
    pixel = torch.randn(4, 3, 1, 1)
    forward(input=pixel, output=pixel.contiguous(memory_format=torch.channels_last))
    plane = torch.randn(2, 1, 4, 4)
    output = plane.contiguous(memory_format=torch.channels_last).clone()
    one = torch.ones(1)
    zero = torch.zeros(1)
    forward(input=plane, output=output, mean=zero, var=one, weight=one, bias=zero)
    assert torch.equal(output, plane.relu())
