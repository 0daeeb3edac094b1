"""`python -m resunet_fast verify`: ask every implementation that can run here whether it is right.

The questions and the cases are those of the package's own tests (resunet_fast/testing).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from tqdm import tqdm

from . import __version__, environment
from .cli import OneLineParser
from .registry import OPERATORS, PREFERENCE, backends
from .testing import CASES, MUTATING_CASES, Case, checks
from .testing.compare import one_line

ALL_CASES = [*CASES, *MUTATING_CASES]
KINDS = ("forward", "backward", "gradcheck", "opcheck")


@dataclass(frozen=True)
class Question:
    """One thing asked of one implementation on one case.

    Args:
        kind: one of :data:`KINDS`.
        case: a line of the table of cases.
        backend: the implementation.
        detail: layout and dtype, as printed where the answer is wrong.
        ask: returns the largest error as a share of the tolerance, None where the implementation
            refuses the case; raises where the answer is wrong.
    """

    kind: str
    case: Case
    backend: str
    detail: str
    ask: Callable[[], float | None]


@dataclass(frozen=True)
class Answer:
    """What came of a question.

    Args:
        question: what was asked.
        share: the largest error as a share of the tolerance; None if refused.
        problem: one sentence if the answer is wrong.
    """

    question: Question
    share: float | None
    problem: str | None = None


@dataclass(frozen=True)
class Tally:
    """How often something was asked, refused with a reason, and answered wrongly."""

    asked: int
    refused: int
    wrong: int

    def __str__(self) -> str:
        if not self.asked:
            return "-"
        right = f"{self.asked - self.refused - self.wrong} ok"
        refused = f", {self.refused} refused" if self.refused else ""
        return right + refused + (f", {self.wrong} WRONG" if self.wrong else "")


@dataclass(frozen=True)
class Row:
    """Everything that was asked of one implementation of one operator."""

    operator: str
    backend: str
    cases: int
    tallies: dict[str, Tally]
    worst: float


def questions(case: Case, backend: str, *, quick: bool) -> Iterator[Question]:
    """Yield what is asked of an implementation on one case.

    Args:
        case: a line of the table of cases.
        backend: the implementation.
        quick: channels_last only, float32 and float64 only, nothing traced.
    """
    layouts = {"nhwc": checks.LAYOUTS["nhwc"]} if quick else checks.LAYOUTS
    dtypes = checks.DTYPES[:2] if quick else checks.DTYPES
    differentiable = checks.differentiable(case)

    def question(kind: str, detail: str, ask: Callable[[], float | None]) -> Question:
        return Question(kind, case, backend, detail, ask)

    for (name, layout), dtype in product(layouts.items(), dtypes):
        detail = f"{name} {str(dtype).removeprefix('torch.')}"
        arguments = (case, backend, layout, dtype)
        yield question("forward", detail, _bound(checks.check_forward, *arguments))
        if differentiable:
            yield question("backward", detail, _bound(checks.check_backward, *arguments))
    for name, layout in layouts.items() if differentiable else ():
        ask = _bound(checks.check_gradcheck, case, backend, layout)
        yield question("gradcheck", f"{name} float64", ask)
    # Tracing takes a second and sees the operator, hardly the implementation: one case each, here;
    # the tests trace every case.
    tracing = not quick and case is next(c for c in ALL_CASES if c.operator == case.operator)
    detail = "traced" if tracing else "untraced"
    opchecks = {"forward": checks.check_opcheck, "backward": checks.check_opcheck_of_backward}
    for direction in ("forward", "backward") if differentiable else ("forward",):
        ask = _bound(opchecks[direction], case, backend, tracing=tracing)
        yield question("opcheck", f"{direction} {detail}", ask)


def _bound(
    check: Callable[..., float | bool | None], *arguments: Any, **keywords: Any
) -> Callable[[], float | None]:
    """Call `check` later; of those that measure no error, True counts as none, False as refused."""

    def ask() -> float | None:
        result = check(*arguments, **keywords)
        if isinstance(result, bool):
            return 0.0 if result else None
        return result

    return ask


def answer(question: Question) -> Answer:
    """Ask a question, from the same seed each time."""
    torch.manual_seed(0)
    try:
        return Answer(question, question.ask())
    except Exception as error:  # whatever a broken implementation raises is WRONG, and exit code 1
        return Answer(question, None, one_line(error))


def plan(operator: str | None, backend: str | None, *, quick: bool) -> list[Question]:
    """List the questions to every implementation that can run on this machine.

    Args:
        operator, backend: only this one.
        quick: see :func:`questions`; so are the backends of :func:`shortened` asked anyway.
    """
    here = [name for name, reasons in backends().items() if not reasons]
    short = shortened(backend)
    return [
        question
        for case, name in product(ALL_CASES, here)
        if name in OPERATORS[case.operator].implementations
        and operator in (None, case.operator)
        and backend in (None, name)
        for question in questions(case, name, quick=quick or name in short)
    ]


def shortened(backend: str | None) -> list[str]:
    """Backends that are asked less than all, because here they take minutes, unless named."""
    return ["triton"] if environment.triton_interpreted() and backend is None else []


def summarise(answers: Sequence[Answer]) -> list[Row]:
    """Gather the answers by operator and backend, in the order of preference."""
    groups: dict[tuple[str, str], list[Answer]] = {}
    for item in answers:
        key = item.question.case.operator, item.question.backend
        groups.setdefault(key, []).append(item)
    order = sorted(groups, key=lambda key: (key[0], PREFERENCE.index(key[1])))
    return [_row(*key, groups[key]) for key in order]


def _row(operator: str, backend: str, answers: Sequence[Answer]) -> Row:
    cases = {item.question.case.id for item in answers}
    tallies = {
        kind: _tally([item for item in answers if item.question.kind == kind]) for kind in KINDS
    }
    return Row(operator, backend, len(cases), tallies, max(item.share or 0.0 for item in answers))


def _tally(answers: Sequence[Answer]) -> Tally:
    wrong = sum(item.problem is not None for item in answers)
    refused = sum(item.share is None for item in answers) - wrong
    return Tally(len(answers), refused, wrong)


def text(answers: Sequence[Answer], notes: Sequence[str] = ()) -> str:
    """Lay the answers out for reading: a table, the notes, then one line per wrong answer."""
    lines: list[tuple[str, ...]] = [("operator", "backend", "cases", *KINDS, "worst error")]
    lines += [
        (
            row.operator,
            row.backend,
            str(row.cases),
            *(str(row.tallies[kind]) for kind in KINDS),
            f"{row.worst:.0%} of the tolerance",
        )
        for row in summarise(answers)
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    wrong = [f"WRONG {line}" for line in map(_complaint, answers) if line]
    verdict = f"{len(wrong)} of {len(answers)} answers are wrong" if wrong else "all right"
    return "\n".join([*table, "", *_not_asked(), *notes, *wrong, verdict])


def _complaint(item: Answer) -> str | None:
    question = item.question
    where = f"{question.case.id} on {question.backend}, {question.kind}, {question.detail}"
    return f"{where}: {item.problem}" if item.problem else None


def _not_asked() -> list[str]:
    """Backends that cannot run here, with their reasons."""
    return [f"{name} not asked: {'; '.join(why)}" for name, why in backends().items() if why]


def _notes(backend: str | None) -> list[str]:
    return [
        f"{name} is interpreted: asked in channels_last, float32 and float64 only, untraced;"
        f" everything with --backend {name}"
        for name in shortened(backend)
    ]


def document(answers: Sequence[Answer], notes: Sequence[str] = ()) -> dict[str, Any]:
    """Return everything that `verify` prints, ready for JSON."""
    wrong = [line for line in map(_complaint, answers) if line]
    return {
        "resunet_fast": __version__,
        "machine": environment.machine(),
        "ok": not wrong,
        "rows": [asdict(row) for row in summarise(answers)],
        "not_asked": {name: why for name, why in backends().items() if why},
        "notes": list(notes),
        "wrong": wrong,
    }


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m resunet_fast verify",
        description="Compare every operator's implementations that can run here with the formula "
        "in float64: results, gradients with the ReLU's mask imposed, gradients against finite "
        "differences, and torch's own checks of custom operators.",
        epilog="Exit code: 0, 1 when an answer is wrong, 2 when nothing could be asked. "
        "TRITON_INTERPRET=1 includes Triton's kernels on a machine without a GPU.",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument(
        "--operator", choices=sorted({case.operator for case in ALL_CASES}), help="only this one"
    )
    parser.add_argument("--backend", choices=list(backends()), help="only this one")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="channels_last, float32 and float64 only, nothing traced",
    )
    return parser


def main(argv: list[str]) -> int:
    """Run the `verify` command.

    Args:
        argv: the arguments after `verify`.

    Returns:
        0; 1 when an answer is wrong; 2 when there is nothing to ask.
    """
    options = _parser().parse_args(argv)
    todo = plan(options.operator, options.backend, quick=options.quick)
    if not todo:
        reasons = backends().get(options.backend) or ["it has no implementation of this name"]
        print(
            f"verify: nothing to ask of {options.operator or 'any operator'} on "
            f"'{options.backend}': {'; '.join(reasons)}",
            file=sys.stderr,
        )
        return 2
    progress = tqdm(todo, desc="verify", unit="question", disable=None, leave=False)
    answers = [answer(question) for question in progress]
    notes = _notes(options.backend)
    print(json.dumps(document(answers, notes), indent=2) if options.json else text(answers, notes))
    return int(any(item.problem for item in answers))
