"""What :func:`resunet_fast.freeze` returns: layers, blocks and networks that cannot be changed."""

from .network import FrozenResUNet
from .sealed import FrozenError

__all__ = ["FrozenError", "FrozenResUNet"]
