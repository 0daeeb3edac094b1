"""Two networks trained side by side: same weights, same batches, steps interleaved."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from resunet_fast.demo.dataset import Batch

LEARNING_RATE = 3e-3
WEIGHT_DECAY = 1e-4


@dataclass
class Contestant:
    """A network in training and what has been recorded of it.

    Attributes:
        label: how reports call it.
        network: on the device it is trained on.
        optimizer: over all its parameters.
        losses: one value per step.
        seconds: duration of each step: forward, loss, backward and update.
    """

    label: str
    network: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def enter(label: str, network: nn.Module) -> Contestant:
    """Give a network its optimizer."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    return Contestant(label, network, optimizer)


def segmentation_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Binary cross-entropy plus soft Dice loss.

    `BCE(sigmoid(z), m) + 1 - (2 sum(p m) + 1) / (sum(p) + sum(m) + 1)` with `p = sigmoid(z)`; the
    Dice sums run over each picture and its mean over the batch is taken.

    Args:
        logits: [N, 1, H, W], floating point.
        masks: [N, 1, H, W], 0 or 1, same dtype.

    Returns:
        Scalar.
    """
    probabilities = torch.sigmoid(logits)
    overlap = (probabilities * masks).sum(dim=(1, 2, 3))
    total = probabilities.sum(dim=(1, 2, 3)) + masks.sum(dim=(1, 2, 3))
    dice = (2 * overlap + 1) / (total + 1)
    return F.binary_cross_entropy_with_logits(logits, masks) + (1 - dice).mean()


def schedule(step: int, steps: int) -> float:
    """Share of the learning rate at a step: linear warm-up over a tenth, then a half cosine."""
    warm_up = max(1, steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return 0.5 * (1 + math.cos(math.pi * progress))


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all queued work, so that a clock reads what it seems to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def training_step(contestant: Contestant, batch: Batch, rate: float) -> None:
    """Run one timed optimisation step and record its loss.

    Args:
        contestant: in training mode.
        batch: normalised images and masks on the network's device.
        rate: learning rate of this step.
    """
    for group in contestant.optimizer.param_groups:
        group["lr"] = rate
    synchronize(batch.images.device)
    start = time.perf_counter()
    contestant.optimizer.zero_grad(set_to_none=True)
    loss = segmentation_loss(contestant.network(batch.images), batch.masks)
    loss.backward()
    contestant.optimizer.step()
    synchronize(batch.images.device)
    contestant.seconds.append(time.perf_counter() - start)
    contestant.losses.append(loss.item())


def train(contestants: Sequence[Contestant], draw: Callable[[], Batch], steps: int) -> None:
    """Train all contestants on the same batches in the same order.

    Args:
        contestants: trained step by step in turn; whoever was first goes last in the next step,
            because the second one finds the caches warm.
        draw: gives the next batch, normalised, on the networks' device; outside the timed part.
        steps: optimisation steps of each contestant.
    """
    for contestant in contestants:
        contestant.network.train()
    order = list(contestants)
    with tqdm(range(steps), desc="training both models", unit="step") as bar:
        for step in bar:
            batch = draw()
            for contestant in order:
                training_step(contestant, batch, LEARNING_RATE * schedule(step, steps))
            order.append(order.pop(0))
            bar.set_postfix(
                {contestant.label: f"{contestant.losses[-1]:.4f}" for contestant in contestants},
                refresh=False,
            )
