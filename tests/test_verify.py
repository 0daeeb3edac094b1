"""`verify`: its table, its exit codes, and that a formula broken on purpose is found."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from resunet_fast import cli, registry, verify
from resunet_fast.registry import OPERATORS, Implementation
from resunet_fast.testing import CASES

SMALL = ["--quick", "--operator", "upsample"]
HERE = [name for name in ("cpu", "reference") if not registry.backends()[name]]
BREAK_AND_VERIFY = """
import dataclasses, sys
from resunet_fast import cli
from resunet_fast.registry import OPERATORS
implementations = OPERATORS["upsample_backward"].implementations
right = implementations["reference"]
wrong = dataclasses.replace(right, compute=lambda *a: right.compute(*a) * 1.01)
implementations["reference"] = wrong
sys.exit(cli.main(["verify", "--quick", "--operator", "upsample", "--backend", "reference"]))
"""


def scaled(implementation: Implementation, index: int, factor: float) -> Implementation:
    """The same implementation with one of its results off by a factor."""

    def compute(*arguments: Any) -> Any:
        results = implementation.compute(*arguments)
        if isinstance(results, torch.Tensor):
            return results * factor
        return tuple(r * factor if i == index else r for i, r in enumerate(results))

    return dataclasses.replace(implementation, compute=compute)


def break_on_purpose(
    monkeypatch: pytest.MonkeyPatch, operator: str, backend: str, index: int = 0
) -> None:
    implementations = OPERATORS[operator].implementations
    monkeypatch.setitem(implementations, backend, scaled(implementations[backend], index, 1.01))


def test_the_table_names_every_implementation_and_the_code_is_0(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["verify", *SMALL]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["operator", "backend", "cases", "forward"]
    cases = sum(case.operator == "upsample" for case in CASES)
    expected = [f"{2 * cases} ok", f"{2 * cases} ok", f"{cases} ok", f"{2 * cases} ok"]
    for backend in HERE:
        row = next(line.split("  ") for line in lines if line.startswith(f"upsample  {backend} "))
        cells = [cell.strip() for cell in row if cell]
        assert cells[2:-1] == [str(cases), *expected]  # forward, backward, gradcheck, opcheck
    assert lines[-1] == "all right"


def test_json_carries_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", *SMALL, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["ok"]
    assert facts["wrong"] == []
    rows = {row["backend"]: row for row in facts["rows"]}
    asked = 2 * sum(case.operator == "upsample" for case in CASES)
    for backend in HERE:
        assert 0 < rows[backend]["worst"] < 1
        assert rows[backend]["tallies"]["forward"] == {"asked": asked, "refused": 0, "wrong": 0}


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize(
    ("operator", "broken", "index"),
    [
        ("upsample", "upsample_backward", 0),
        ("bn_act", "bn_act_backward", 0),
        ("conv2d", "conv2d_backward", 2),  # the weight's
    ],
)
def test_a_broken_backward_formula_is_found(
    operator: str,
    broken: str,
    index: int,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    break_on_purpose(monkeypatch, broken, backend, index)
    arguments = ["--quick", "--operator", operator, "--backend", backend]
    assert cli.main(["verify", *arguments]) == 1
    lines = capsys.readouterr().out.splitlines()
    wrong = [line for line in lines if line.startswith("WRONG")]
    assert any(", backward, nhwc float64: AssertionError: gradient of" in line for line in wrong)
    assert any(", gradcheck, nhwc float64: GradcheckError" in line for line in wrong)
    assert not any(", forward, " in line for line in wrong)
    assert lines[-1].startswith(f"{len(wrong)} of ")


@pytest.mark.parametrize("backend", [name for name in HERE if name != "reference"])
def test_a_broken_forward_formula_is_found(
    backend: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    break_on_purpose(monkeypatch, "upsample", backend)
    assert cli.main(["verify", *SMALL, "--backend", backend]) == 1
    assert ", forward, nhwc float32: AssertionError: output 0" in capsys.readouterr().out


def test_an_implementation_that_raises_is_an_answer_not_a_crash(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def explode(*_: Any) -> Any:
        raise ZeroDivisionError("one\ntwo")

    implementations = OPERATORS["upsample_backward"].implementations
    broken = dataclasses.replace(implementations["reference"], compute=explode)
    monkeypatch.setitem(implementations, "reference", broken)
    assert cli.main(["verify", *SMALL, "--backend", "reference", "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert not facts["ok"]
    assert any("ZeroDivisionError: one" in line for line in facts["wrong"])


def test_broken_from_the_command_line(tmp_path: Path) -> None:
    root = str(Path(cli.__file__).parents[1])
    program = f"import sys; sys.path.insert(0, {root!r})\n{BREAK_AND_VERIFY}"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 1, result.stderr
    assert "WRONG upsample-" in result.stdout


def test_what_cannot_be_asked_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(registry._availability, "cpu", lambda: ["it was never built"])
    assert cli.main(["verify", "--backend", "cpu"]) == 2
    assert "nothing to ask of any operator on 'cpu': it was never" in capsys.readouterr().err
    assert cli.main(["verify", *SMALL, "--backend", "reference"]) == 0
    assert "cpu not asked: it was never built" in capsys.readouterr().out


def test_every_case_and_every_implementation_that_runs_here_is_asked() -> None:
    asked = {(q.case.operator, q.backend) for q in verify.plan(None, None, quick=False)}
    here = [name for name, reasons in registry.backends().items() if not reasons]
    operators = {operator for operator, _ in asked}
    assert asked == {(o, b) for o in operators for b in here if b in OPERATORS[o].implementations}
    kinds = {q.kind for q in verify.plan("bn_act", "reference", quick=True)}
    assert kinds == set(verify.KINDS)


def test_interpreted_kernels_are_asked_less_and_it_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(verify.environment, "triton_interpreted", lambda: True)
    monkeypatch.setattr(verify, "backends", lambda: {"triton": [], "cpu": ["not now"]})
    short, every = (verify.plan("upsample", name, quick=False) for name in (None, "triton"))
    assert {q.backend for q in (*short, *every)} == {"triton"}
    assert {q.detail for q in short if q.kind == "forward"} == {"nhwc float64", "nhwc float32"}
    assert len({q.detail for q in every if q.kind == "forward"}) == 8
    assert "everything with --backend triton" in verify.text([], verify._notes(None))
    assert verify._notes("triton") == []


@pytest.mark.slow
def test_everything_is_right() -> None:
    answers = [verify.answer(q) for q in verify.plan(None, None, quick=False)]
    assert [item.problem for item in answers if item.problem] == []
