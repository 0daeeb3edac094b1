"""What went wrong in other libraries' fused normalisation, tried on the operators here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from networks import one_thread as one_thread
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from twins import (
    BACKENDS,
    LAYOUTS,
    batch_norm,
    fused_bn_act,
    fused_conv,
    fused_conv_bn_act,
    image,
    plain_bn_act,
    same,
    tensors,
)

import resunet_fast as rf
from resunet_fast.functional import Conv, Norm
from resunet_fast.registry import OPERATORS
from resunet_fast.testing import CASES, Case, assert_close, make_inputs, tolerance


@pytest.fixture(autouse=True, params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    case = request.node.callspec.params.get("case")
    implementations = OPERATORS[case.operator].implementations if case else {}
    if request.param in implementations:
        reasons = implementations[request.param].refusals(*make_inputs(case))
        if reasons:  # that forcing it raises them is a question of test_operators.py
            pytest.skip(f"{request.param}: {'; '.join(reasons)}")
    with rf.use_backend(request.param):
        yield request.param


def step(
    function: Callable[..., Any], x: Tensor, bn: nn.BatchNorm2d, grad: Tensor, **options: Any
) -> list[Tensor]:
    """Output, gradients of the input, the residual and the parameters, running statistics."""
    leaf = x.detach().requires_grad_()
    bn.zero_grad()
    z = function(leaf, bn, **options)
    z.backward(grad)
    parameters = [p.grad.clone() for p in bn.parameters()]
    return [z.detach(), leaf.grad, *parameters, bn.running_mean.clone(), bn.running_var.clone()]


@pytest.mark.parametrize("channels", [1, 3, 33, 70, 130, 257])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_number_of_channels_on_larger_images(channels: int, layout: str) -> None:
    x = image(2, channels, 37, 41, dtype=torch.float32) + 2
    x = x.contiguous(memory_format=LAYOUTS[layout])
    grad = image(*x.shape, dtype=torch.float32, seed=5)
    bn = batch_norm(channels, torch.float32, momentum=1.0)
    results = step(fused_bn_act, x, bn, grad, relu=False)
    double = batch_norm(channels, momentum=1.0)
    expected = step(plain_bn_act, x.double(), double, grad.double(), relu=False)
    for i, (result, judge) in enumerate(zip(results, expected, strict=True)):
        assert_close(f"result {i}", result, judge, 4 * tolerance(torch.float32, 2 * 37 * 41))


@pytest.mark.parametrize("ratio", [1e2, 1e3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_mean_much_larger_than_the_deviation(layout: str, ratio: float) -> None:
    x = (image(4, 5, 33, 20) + ratio).float().contiguous(memory_format=LAYOUTS[layout])
    bn = nn.BatchNorm2d(5, momentum=1.0)
    fused_bn_act(x, bn)
    var = x.double().var((0, 2, 3), correction=1)
    assert ((bn.running_var - var) / var).abs().max() < 2e-5
    constant = nn.BatchNorm2d(5, momentum=1.0)
    z = fused_bn_act(torch.full_like(x, ratio), constant, relu=False)
    assert ((constant.running_var >= 0) & (constant.running_var < 1e-12 * ratio**2)).all()
    assert z.abs().max() <= ratio * torch.finfo(torch.float32).eps / constant.eps**0.5


GRADS: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded scalar": lambda g: g[:1, :1, :1, :1].expand_as(g),
    "expanded batch": lambda g: g[:1].expand_as(g),
    "expanded channels": lambda g: g[:, :1].expand_as(g),
    "every other column": lambda g: g.repeat_interleave(2, 3)[..., ::2],
    "transposed": lambda g: g.transpose(2, 3).contiguous().transpose(2, 3),
    "permuted": lambda g: g.permute(1, 3, 0, 2).contiguous().permute(2, 0, 3, 1),
    "other layout": lambda g: g.contiguous(memory_format=torch.channels_last),
    "offset": lambda g: torch.cat([g.new_zeros(1), g.flatten()])[1:].view_as(g),
}
FUNCTIONS: dict[str, Callable[[Tensor, nn.BatchNorm2d], Any]] = {
    "bn_act": fused_bn_act,
    "bn_act residual": lambda x, bn: fused_bn_act(x, bn, residual=x.sin()),
    "bn_act residual norm": lambda x, bn: fused_bn_act(
        x, bn, residual=x.sin(), residual_bn=batch_norm(5)
    ),
    "bn_act pool": lambda x, bn: fused_bn_act(x, bn, pool=True),
    "conv_bn_act": lambda x, bn: fused_conv_bn_act(x, fixed_conv(5, 5), bn),
    "bn_act_conv": lambda x, bn: rf.functional.bn_act_conv(
        x, Norm.of(bn), Conv.of(fixed_conv(5, 4)), recompute=True
    ),
    "conv2d": lambda x, bn: fused_conv(
        x, fixed_conv(8, 4), skip=image(2, 3, 12, 14), upsample="bilinear"
    ),
    "upsample": lambda x, bn: rf.functional.upsample(x, (9, 11), "bilinear"),
}


def fixed_conv(before: int, after: int) -> nn.Conv2d:
    conv = nn.Conv2d(before, after, 3, padding=1).double()
    with torch.no_grad():
        conv.weight.copy_(image(*conv.weight.shape, seed=8))
    return conv


@pytest.mark.parametrize("form", GRADS)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_form_of_grad_output(layout: str, function: str, form: str) -> None:
    x = image(2, 5, 6, 7).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    outputs = tensors(FUNCTIONS[function](x, batch_norm(5)))
    grads = [GRADS[form](image(*o.shape, seed=6)) for o in outputs]
    before = [g.clone() for g in grads]
    (result,) = torch.autograd.grad(outputs, x, grads, retain_graph=True)
    dense = [g.contiguous(memory_format=LAYOUTS[layout]) for g in grads]
    (expected,) = torch.autograd.grad(outputs, x, dense)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    if "bn_act" in function:
        assert result.is_contiguous(memory_format=LAYOUTS[layout])
    for grad, value in zip(grads, before, strict=True):
        assert torch.equal(grad, value)


def misaligned(tensor: Tensor) -> Tensor:
    """The same values one element further, so that no vector of several is aligned."""
    dense = tensor.detach().permute(0, 2, 3, 1) if tensor.dim() == 4 else tensor.detach()
    result = torch.cat([dense.new_zeros(1), dense.flatten()])[1:].view(dense.shape)
    result = result.permute(0, 3, 1, 2) if tensor.dim() == 4 else result
    assert result.storage_offset() == 1
    return result.requires_grad_(tensor.requires_grad)


DIFFERENTIABLE = [case for case in CASES if case.operator != "conv_bias_act"]
cases = pytest.mark.parametrize("case", DIFFERENTIABLE, ids=lambda case: case.id)


def run(case: Case, inputs: list[Any], backend: str) -> list[Tensor]:
    """The outputs and the gradients of every input that has one."""
    result = OPERATORS[case.operator](*inputs, backend)
    outputs = [o.detach() for o in tensors(result) if o is not None]
    differentiable = [o for o in tensors(result) if o is not None and o.requires_grad]
    wanted = [v for v in inputs if isinstance(v, Tensor) and v.requires_grad]
    seeds = [image(*o.shape, dtype=o.dtype, seed=9) for o in differentiable]
    return outputs + list(torch.autograd.grad(differentiable, wanted, seeds))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@cases
def test_misaligned_storage_offsets(case: Case, dtype: torch.dtype, backend: str) -> None:
    inputs = make_inputs(case, dtype, requires_grad=True)
    moved = [misaligned(v) if isinstance(v, Tensor) else v for v in inputs]
    for i, (result, expected) in enumerate(
        zip(run(case, moved, backend), run(case, inputs, backend), strict=True)
    ):
        assert_close(f"result {i}", result, expected, tolerance(dtype, 630))


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Every allocation without initial values is filled with NaN."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("layout", LAYOUTS)
@cases
@pytest.mark.usefixtures("poisoned")
def test_every_element_is_written(case: Case, layout: str, backend: str) -> None:
    inputs = make_inputs(case, layout=LAYOUTS[layout], requires_grad=True)
    for i, result in enumerate(run(case, inputs, backend)):
        assert result.isfinite().all(), i


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("case", [c for c in CASES if c.operator == "conv_bias_act"], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_every_element_of_an_inference_is_written(case: Case, relu: bool, backend: str) -> None:
    inputs = make_inputs(case)
    inputs[4] = relu
    assert OPERATORS["conv_bias_act"](*inputs, backend).isfinite().all()


X, CONV = image(2, 3, 4, 5), Conv(image(4, 3, 3, 3))
SMALL, OTHER = image(2, 3, 4, 4), image(2, 4, 2, 3, dtype=torch.float32)
F = rf.functional
MISMATCHES: dict[str, Callable[[], Any]] = {
    "residual: expected shape (2, 3, 4, 5), got (2, 3, 4, 4)": lambda: F.bn_act(
        X, Norm(), residual=SMALL
    ),
    "residual: expected shape (2, 3, 4, 5), got (3, 4, 5)": lambda: F.bn_act(
        X, Norm(), residual=X[0], residual_norm=Norm()
    ),
    "residual: expected dtype torch.float64, got torch.float32": lambda: F.bn_act(
        X, Norm(), residual=X.float()
    ),
    "residual: expected shape (2, 4, 2, 3), got (2, 3, 4, 5)": lambda: F.conv_bn_act(
        X, CONV, Norm(), residual=X
    ),
    "residual: expected dtype torch.float64, got torch.float32 ": lambda: F.conv_bn_act(
        X, CONV, Norm(), residual=OTHER
    ),
    "residual: expected dtype torch.float64, got torch.float32  ": lambda: F.conv_bias_act(
        X, CONV, residual=OTHER
    ),
    "residual: expected shape (2, 4, 2, 3), got (2, 3, 4, 4)": lambda: F.conv_bias_act(
        X, CONV, residual=SMALL
    ),
    "residual_norm: expected None without a residual": lambda: F.bn_act(
        X, Norm(), residual_norm=Norm()
    ),
    "residual_norm: expected None without a residual ": lambda: F.conv_bn_act(
        X, CONV, Norm(), residual_norm=Norm()
    ),
    "upsample: expected 'none' without a skip, got 'nearest'": lambda: F.conv2d(
        X, CONV, upsample="nearest"
    ),
    "upsample: expected 'none' or one of ['nearest', 'bilinear', 'bilinear_align_corners']": (
        lambda: F.conv_bn_act(X, CONV, Norm(), skip=X, upsample="cubic")
    ),
    "skip: expected 4-D sources with the same N, got (2, 3, 4, 5) and (1, 3, 4, 5)": (
        lambda: F.conv2d(X, CONV, skip=X[:1])
    ),
    "skip: expected the input's size with upsample='none', got (4, 5) and (4, 4)": (
        lambda: F.conv2d(X, CONV, skip=SMALL)
    ),
    "mode: expected one of": lambda: F.upsample(X, (8, 8), "cubic"),
    "size: expected two numbers of at least 1, got (0, 8)": lambda: F.upsample(X, (0, 8)),
}


@pytest.mark.parametrize("sentence", MISMATCHES)
def test_operands_that_do_not_fit_together(sentence: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(sentence.rstrip())):
        MISMATCHES[sentence]()


def test_a_batch_norm_used_twice_counts_twice() -> None:
    x, ours, theirs = image(2, 3, 5, 6), batch_norm(3), batch_norm(3)
    z = fused_bn_act(fused_bn_act(x, ours) + x, ours, residual=x, residual_bn=ours)
    expected = plain_bn_act(plain_bn_act(x, theirs) + x, theirs, residual=x, residual_bn=theirs)
    same(z, expected)
    assert ours.num_batches_tracked == 3
    same(ours.running_mean, theirs.running_mean)
    same(ours.running_var, theirs.running_var)
    for model, result in ((ours, z), (theirs, expected)):
        result.square().sum().backward()
        assert model.weight.grad is not None
    same(ours.weight.grad, theirs.weight.grad)


def turned(inputs: list[Any], which: Callable[[int], bool]) -> list[Any]:
    """Some of the images, by position, in the other layout."""
    return [
        v.detach().contiguous(memory_format=LAYOUTS["nchw"]).requires_grad_(v.requires_grad)
        if isinstance(v, Tensor) and v.dim() == 4 and which(i)
        else v
        for i, v in enumerate(inputs)
    ]


class Fakes(TorchDispatchMode):
    """Runs every operator of ours also on fake tensors and compares shapes, dtypes and strides."""

    compared = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if func.namespace == "resunet_fast":
            with FakeTensorMode() as mode:
                given = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args]
                fakes = func(*given)
            self.compared += 1
            for real, fake in zip(tensors(results), tensors(fakes), strict=True):
                assert (real is None) == (fake is None), func
                if real is not None:
                    assert (real.shape, real.dtype) == (fake.shape, fake.dtype), func
                    assert torch._prims_common.check_significant_strides(real, fake)[0], func
        return results


TURNED: dict[str, Callable[[int], bool]] = {
    "all channels_last": lambda i: False,
    "only the first channels_last": lambda i: i != 0,
    "all but the first channels_last": lambda i: i == 0,
}


@pytest.mark.parametrize("which", TURNED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@cases
def test_compilers_know_the_layout_of_mixed_operands(
    case: Case, dtype: torch.dtype, which: str, backend: str
) -> None:
    inputs = turned(make_inputs(case, dtype, requires_grad=True), TURNED[which])
    with Fakes() as fakes:
        run(case, inputs, backend)
    assert fakes.compared >= 2
