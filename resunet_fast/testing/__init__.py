"""What tests and benchmarks share: named cases, tolerances, and comparisons that say where."""

from .cases import CASES, Case, make_inputs
from .compare import assert_close, worst
from .tolerances import tolerance

__all__ = ["CASES", "Case", "assert_close", "make_inputs", "tolerance", "worst"]
