"""What a forward pass keeps for backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def kept_bytes(forward: Callable[[], Tensor], module: nn.Module) -> int:
    """Count the bytes that autograd keeps: every saved storage once, without the module's own.

    Args:
        forward: runs the pass and returns what backward would start from.
        module: its parameters and buffers are not counted.
    """
    own = {_address(tensor) for tensor in (*module.parameters(), *module.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if _address(tensor) not in own:
            kept[_address(tensor)] = tensor.untyped_storage().nbytes()
        # A hook that returns its very argument would keep an operator's output alive in a cycle.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        # Until the result goes out of scope the graph holds every storage: no address comes twice.
        result = forward()
    total = sum(kept.values())
    del result
    return total


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
