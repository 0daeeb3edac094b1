"""`rf.testing.check_module`: right blocks pass, and each way of being wrong is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resunet_fast as rf
from resunet_fast.modules import fused, plain


def image(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(5)).to(dtype)


class Block(nn.Module):
    """Convolution, batch norm, ReLU; `alter` changes what happens behind the convolution."""

    def __init__(self, alter: Callable[[nn.Module, Tensor], Tensor] = lambda _, y: y) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.alter = alter

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.alter(self, self.conv(x))))


class _Doubled(torch.autograd.Function):
    """The identity with the gradient of another function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 1.01


def wrong_backward(block: nn.Module, y: Tensor) -> Tensor:
    return _Doubled.apply(y)


def wrong_statistics(block: nn.Module, y: Tensor) -> Tensor:
    if block.training:
        block.norm.running_mean += 0.01
    return y


def wrong_counter(block: nn.Module, y: Tensor) -> Tensor:
    if block.training:
        block.norm.num_batches_tracked += 1
    return y


def random_values(block: nn.Module, y: Tensor) -> Tensor:
    return y * (1 + 1e-12 * torch.rand_like(y))


def counts_its_calls(block: nn.Module, y: Tensor) -> Tensor:
    block.calls = getattr(block, "calls", 0) + 1
    return y * block.calls


def wrong_in_evaluation(block: nn.Module, y: Tensor) -> Tensor:
    return y if block.training else y + 1e-6


def rounds(block: nn.Module, y: Tensor) -> Tensor:
    return y if y.dtype == torch.float64 else (y * 8).round() / 8


def raises(block: nn.Module, y: Tensor) -> Tensor:
    raise RuntimeError("first line\nsecond line")


def wrong(report: rf.testing.ModuleReport) -> set[str]:
    return {finding.question for finding in report.findings if finding.problem}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_right_block_passes(dtype: torch.dtype) -> None:
    report = rf.testing.check_module(Block().to(dtype), image(dtype), Block().to(dtype))
    assert report.ok, str(report)
    assert len(report.findings) == (12 if dtype != torch.float64 else 10)


@pytest.mark.parametrize(
    "pair",
    [
        (fused.DoubleConv(3, 4), plain.DoubleConv(3, 4)),
        (fused.ResBlock(3, 3), plain.ResBlock(3, 3)),
        (fused.PreActResBlock(3, 3), plain.PreActResBlock(3, 3)),
    ],
    ids=["double_conv", "res_block", "pre_act_res_block"],
)
def test_our_own_blocks_pass(pair: tuple[nn.Module, nn.Module]) -> None:
    report = rf.testing.check_module(pair[0], image(), pair[1])
    assert report.ok, str(report)


def test_without_a_reference_the_block_answers_for_itself() -> None:
    report = rf.testing.check_module(Block(), image())
    assert report.ok
    assert len(report.findings) == 4
    assert not rf.testing.check_module(Block(wrong_backward), image()).ok


@pytest.mark.parametrize(
    ("alter", "questions"),
    [
        (
            wrong_backward,
            {
                f"{mode}: {what}"
                for mode in ("training", "evaluation")
                for what in ("gradients in float64", "gradients equal finite differences")
            },
        ),
        (wrong_statistics, {"training: buffers in float64"}),
        (wrong_counter, {"training: buffers in float64"}),
        (
            wrong_in_evaluation,
            {"evaluation: output in float64", "evaluation: gradients in float64"},
        ),
        (rounds, {"training: output in float32", "evaluation: output in float32"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_each_fault_is_found_and_no_other(
    alter: Callable[[nn.Module, Tensor], Tensor], questions: set[str]
) -> None:
    torch.manual_seed(0)
    assert wrong(rf.testing.check_module(Block(alter), image(), Block())) == questions


@pytest.mark.parametrize("alter", [random_values, counts_its_calls])
def test_results_that_change_from_call_to_call(
    alter: Callable[[nn.Module, Tensor], Tensor],
) -> None:
    report = rf.testing.check_module(Block(alter), image())
    assert "evaluation: the same bits when called again" in wrong(report)
    assert "the output changes from call to call" in str(report)


def test_a_block_that_raises_is_an_answer() -> None:
    report = rf.testing.check_module(Block(raises), image(), Block())
    assert not report.ok
    assert "WRONG  training: output in float64: RuntimeError: first line\n" in str(report)


def test_nothing_is_changed() -> None:
    block, reference = Block(), Block()
    before = {name: value.clone() for name, value in block.state_dict().items()}
    other = {name: value.clone() for name, value in reference.state_dict().items()}
    rf.testing.check_module(block, image(), reference)
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())
    assert all(torch.equal(value, other[name]) for name, value in reference.state_dict().items())
    assert block.training
    assert block.conv.weight.grad is None


def test_bad_arguments() -> None:
    with pytest.raises(
        ValueError, match=r"input: expected a floating point tensor, got torch\.int"
    ):
        rf.testing.check_module(Block(), torch.ones(1, 3, 4, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="reference: expected the module's state dict") as caught:
        rf.testing.check_module(Block(), image(), nn.Conv2d(3, 4, 3))
    assert len(str(caught.value).splitlines()) == 1
