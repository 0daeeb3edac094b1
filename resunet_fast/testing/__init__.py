"""What tests and benchmarks share: named cases, tolerances, and comparisons that say where.

`check_module` asks the same of a block of yours.
"""

from .cases import CASES, MUTATING_CASES, Case, make_inputs
from .compare import assert_close, worst
from .module import Finding, ModuleReport, check_module
from .tolerances import tolerance

__all__ = [
    "CASES",
    "MUTATING_CASES",
    "Case",
    "Finding",
    "ModuleReport",
    "assert_close",
    "check_module",
    "make_inputs",
    "tolerance",
    "worst",
]
