"""What the demo measures of a trained network: quality, time and memory."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from resunet_fast.demo.dataset import Batch
from resunet_fast.demo.training import Contestant, segmentation_loss, synchronize
from resunet_fast.testing.memory import kept_bytes


@dataclass(frozen=True)
class Quality:
    """Means over pictures of Dice `2|A and B| / (|A| + |B|)` and IoU `|A and B| / |A or B|`."""

    dice: float
    iou: float


@dataclass(frozen=True)
class Spread:
    """Median with the 20th and 80th percentile."""

    median: float
    p20: float
    p80: float


@dataclass(frozen=True)
class Agreement:
    """How far two networks with equal weights differ.

    Attributes:
        probability: largest absolute difference of a pixel's probability, in evaluation mode.
        gradient: `|g - g'| / |g'|` over all parameters' gradients together, in training mode.
    """

    probability: float
    gradient: float


class Timing(NamedTuple):
    """Seconds of both contestants and the ratio second / first, taken pair by pair."""

    first: Spread
    second: Spread
    ratio: Spread


def quality(predicted: Tensor, masks: Tensor) -> Quality:
    """Compare predicted with true masks.

    Args:
        predicted: [N, 1, H, W] bool.
        masks: [N, 1, H, W], true or nonzero in the foreground; no picture may be without any.

    Returns:
        Dice and IoU, averaged over the N pictures.
    """
    truth = masks.bool()
    overlap = (predicted & truth).sum(dim=(1, 2, 3)).double()
    union = (predicted | truth).sum(dim=(1, 2, 3)).double()
    total = predicted.sum(dim=(1, 2, 3)).double() + truth.sum(dim=(1, 2, 3)).double()
    return Quality((2 * overlap / total).mean().item(), (overlap / union).mean().item())


def spread(values: Sequence[float]) -> Spread:
    """Median and the 20th and 80th percentile of some values."""
    p20, median, p80 = np.percentile(values, (20, 50, 80))
    return Spread(float(median), float(p20), float(p80))


def compare_times(first: Sequence[float], second: Sequence[float]) -> Timing:
    """Summarise durations measured in turn.

    Args:
        first: seconds of the first contestant, one per round.
        second: seconds of the second contestant in the same rounds.

    Returns:
        Both spreads, and that of the ratio second / first within each round.
    """
    ratios = [after / before for before, after in zip(first, second, strict=True)]
    return Timing(spread(first), spread(second), spread(ratios))


@torch.inference_mode()
def logits_of(network: nn.Module, images: Tensor, batch_size: int = 16) -> Tensor:
    """Run a network in evaluation mode over images [N, C, H, W], a few at a time."""
    network.eval()
    return torch.cat([network(part) for part in torch.split(images, batch_size)])


def agreement(fast: nn.Module, plain: nn.Module, images: Tensor, batch: Batch) -> Agreement:
    """Compare the fast network with the plain one at the fast one's weights.

    Training amplifies rounding until two curves part; at equal weights nothing is amplified, and
    what differs is the arithmetic alone.

    Args:
        fast: trained; not changed.
        plain: takes the same state dict; not changed.
        images: [N, C, H, W] for the probabilities, normalised.
        batch: for the gradients, normalised.
    """
    tested, twin = copy.deepcopy(fast), copy.deepcopy(plain)
    twin.load_state_dict(fast.state_dict())
    first, second = (torch.sigmoid(logits_of(network, images)) for network in (tested, twin))
    got, expected = (_gradient(network, batch) for network in (tested, twin))
    return Agreement(
        (first - second).abs().max().item(), ((got - expected).norm() / expected.norm()).item()
    )


def _gradient(network: nn.Module, batch: Batch) -> Tensor:
    network.train().zero_grad()
    segmentation_loss(network(batch.images), batch.masks).backward()
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    return torch.cat([gradient.flatten().double() for gradient in gradients])


@torch.inference_mode()
def inference_times(
    first: Contestant, second: Contestant, images: Tensor, rounds: int, warm_up: int = 3
) -> Timing:
    """Time one forward pass in evaluation mode, both contestants in turn.

    Args:
        first: changes places with `second` after each round.
        second: see `first`.
        images: [N, C, H, W], one call's batch, normalised, on the networks' device.
        rounds: measured rounds.
        warm_up: rounds before them that do not count.
    """
    seconds: dict[str, list[float]] = {first.label: [], second.label: []}
    order = [first, second]
    for contestant in order:
        contestant.network.eval()
    for _ in range(warm_up + rounds):
        for contestant in order:
            synchronize(images.device)
            start = time.perf_counter()
            contestant.network(images)
            synchronize(images.device)
            seconds[contestant.label].append(time.perf_counter() - start)
        order.reverse()
    return compare_times(seconds[first.label][warm_up:], seconds[second.label][warm_up:])


def training_bytes(network: nn.Module, batch: Batch) -> int:
    """Memory that one training step needs beyond the model itself.

    On the CPU: the bytes that forward keeps for backward, that is all tensors that autograd saves,
    each storage counted once, without parameters and buffers. On CUDA: the peak of the allocator
    during forward and backward above what was allocated before.

    Args:
        network: not changed; a copy does the work.
        batch: normalised images and masks on the network's device.
    """
    trial = copy.deepcopy(network).train()
    if batch.images.is_cuda:
        return _cuda_peak(trial, batch)
    return kept_bytes(lambda: segmentation_loss(trial(batch.images), batch.masks), trial)


def _cuda_peak(trial: nn.Module, batch: Batch) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    segmentation_loss(trial(batch.images), batch.masks).backward()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def process_peak_bytes() -> int | None:
    """Largest resident size of this process so far; None where the system does not tell."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return peak if sys.platform == "darwin" else peak * 1024
