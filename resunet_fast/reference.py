"""The networks in plain torch.nn: the specification, and what the fast ones are compared with.

The same arguments, state-dict keys and, from the same seed, the same values as the fast classes.
"""

from __future__ import annotations

from typing import Any, ClassVar

from .models.catalogue import build, list_models
from .models.wiring import PLAIN_STAGES, ListingWiring, Stages, Wiring

__all__ = ["ResUNet", "UNetWithResidualConnections", "create_model", "list_models"]


class ResUNet(Wiring):
    """A residual U-Net of plain torch.nn blocks; arguments as in `models.wiring.Wiring`."""

    stages: ClassVar[Stages] = PLAIN_STAGES


class UNetWithResidualConnections(ListingWiring):
    """The article's network, repaired, of plain torch.nn blocks.

    Args:
        n_channels: channels of the image.
        n_classes: channels of the logits.
    """

    stages: ClassVar[Stages] = PLAIN_STAGES


def create_model(
    name: str, *, in_channels: int = 3, num_classes: int = 1, **overrides: Any
) -> ResUNet:
    """Return a new plain network by its name.

    Args:
        name: one of :func:`list_models`.
        in_channels, num_classes: channels of the image and of the logits.
        overrides: keyword arguments of :class:`ResUNet`, such as `base_width=16`.

    Raises:
        ValueError: an unknown name (the message lists the known ones) or a bad value.
        TypeError: an unknown keyword.
    """
    return build(ResUNet, name, in_channels, num_classes, **overrides)
