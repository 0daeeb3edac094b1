"""The networks: their wiring, written once, the fused ones, and the names that build them."""

from .catalogue import CATALOGUE, Entry, list_models
from .fast import ResUNet, UNetWithResidualConnections, create_model
from .wiring import ListingWiring, Stages, Wiring

__all__ = [
    "CATALOGUE",
    "Entry",
    "ListingWiring",
    "ResUNet",
    "Stages",
    "UNetWithResidualConnections",
    "Wiring",
    "create_model",
    "list_models",
]
