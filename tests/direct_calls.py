"""Calls of a library past the dispatcher: how many it took, and operands for them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import resunet_fast as rf
from resunet_fast.functional import Norm

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Counted:
    """A library's calls, and how many of them it took."""

    def __init__(self, calls: Any) -> None:
        self.calls, self.taken = calls, 0

    def bn_act(self, *arguments: Any) -> bool:
        taken: bool = self.calls.bn_act(*arguments)
        self.taken += taken
        return taken

    def update_running_stats(self, *arguments: Any) -> bool:
        taken: bool = self.calls.update_running_stats(*arguments)
        self.taken += taken
        return taken

    def bn_act_backward(self, *arguments: Any) -> bool:
        taken: bool = self.calls.bn_act_backward(*arguments)
        self.taken += taken
        return taken


class Unit(NamedTuple):
    """Operands of one call, each its own leaf."""

    x: Tensor
    residual: Tensor | None
    bn: nn.BatchNorm2d

    @staticmethod
    def make(
        mode: str, dtype: torch.dtype, layout: str, residual: bool, size: tuple[int, ...]
    ) -> Unit:
        torch.manual_seed(0)

        def image() -> Tensor:
            values = torch.randn(size).to(dtype).to(memory_format=LAYOUTS[layout])
            return values.requires_grad_()

        momentum = None if mode == "cumulative" else 0.3
        bn = nn.BatchNorm2d(
            size[1],
            momentum=momentum,
            affine=mode != "constant",
            track_running_stats=mode != "untracked",
        )
        bn.train(mode != "evaluation")
        x, r = image(), image() if residual else None
        for parameter in bn.parameters():
            nn.init.normal_(parameter)
        return Unit(x, r, bn.double() if dtype == torch.float64 else bn)

    def results(self, relu: bool) -> list[Tensor]:
        z = rf.functional.bn_act(self.x, Norm.of(self.bn), residual=self.residual, relu=relu)
        assert isinstance(z, Tensor)
        torch.manual_seed(1)
        z.backward(torch.empty_like(z).copy_(torch.randn(z.shape)))
        leaves = (self.x, *self.bn.parameters(), self.residual)
        gradients = [leaf.grad for leaf in leaves if leaf is not None]
        versions = torch.tensor([b._version for b in self.bn.buffers()])
        return [z.detach(), *gradients, *self.bn.buffers(), versions]  # type: ignore[list-item]


def given_back(x: Tensor) -> Tensor:
    """A copy whose memory was freed."""
    copy = x.clone()
    copy.untyped_storage().resize_(0)
    return copy
