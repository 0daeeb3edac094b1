"""Which convolution and which tiles on which GPU: measured tables, and a heuristic without one."""

from .config import ConvConfig, ConvProblem, pick
from .table import Measurement, Table, load, lookup

__all__ = ["ConvConfig", "ConvProblem", "Measurement", "Table", "load", "lookup", "pick"]
