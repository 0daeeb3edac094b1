"""Timing, and what is done to a variant before it is timed."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import network_run, networks, operators, run, test_operators
from bench.command import main
from bench.networks import INFERENCE, NHWC, TRAINING, Network, Setting, Variant
from bench.roofline import Ceilings
from bench.timing import Timing, fitting_rounds, interleaved, ratio, rotating
from resunet_fast.registry import OPERATORS, Implementation
from resunet_fast.testing.checks import differentiable

SMALL = Setting(TRAINING, "fp32", 1, 32, 4)
CEILINGS = Ceilings(1e10, 1e11, "float32")
EAGER = Variant("eager channels_last", networks.plain(NHWC))


def test_percentiles_and_ratios() -> None:
    timing = Timing.of([float(n) for n in range(11)])
    assert (timing.median, timing.p20, timing.p80, timing.samples) == (5.0, 2.0, 8.0, 11)
    assert Timing.of([3.0]) == Timing(3.0, 3.0, 3.0, 1)
    assert ratio([4.0, 6.0, 10.0], [2.0, 2.0, 2.0]).median == 3.0


def test_interleaving_times_every_variant_in_every_round_and_rotates() -> None:
    calls: list[str] = []

    def slow() -> None:
        calls.append("slow")
        time.sleep(0.02)

    samples = interleaved({"slow": slow, "fast": lambda: calls.append("fast")}, 4, warmup=1)
    assert {name: len(times) for name, times in samples.items()} == {"slow": 4, "fast": 4}
    assert min(samples["slow"]) >= 20 > max(samples["fast"])
    assert calls[2:6] == ["slow", "fast", "fast", "slow"]


def test_rounds_fit_the_budget_and_operands_take_turns() -> None:
    assert fitting_rounds(2.0, 9.0, 3, 25) == 4
    assert (fitting_rounds(2.0, -5.0, 3, 25), fitting_rounds(0.0, 9.0, 3, 25)) == (3, 25)
    turns = rotating([lambda: "a", lambda: "b"])
    assert [turns() for _ in range(3)] == ["a", "b", "a"]


class Broken(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.net = networks.prepared(networks.rf.reference.ResUNet(3, 2, base_width=4), SMALL, NHWC)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.factor

    def load_state_dict(self, state: Any, *args: Any, **kwargs: Any) -> Any:
        return self.net.load_state_dict(state)


@pytest.mark.parametrize("factor", [1.01, float("nan")], ids=["off", "nan"])
@pytest.mark.parametrize("phase", [TRAINING, INFERENCE])
def test_a_wrong_variant_is_reported_and_not_timed(phase: str, factor: float) -> None:
    def build(setting: Setting) -> Network:
        module = Broken(factor).train(setting.phase == TRAINING)
        return Network(module, module)

    setting = Setting(phase, "fp32", 1, 32, 4)
    section = network_run.measure(
        setting, CEILINGS, budget=0, rounds=2, variants=[EAGER, Variant("broken", build, ours=True)]
    )
    assert section["variants"]["broken"]["wrong"]
    assert "ms" not in section["variants"]["broken"]
    assert section["variants"]["eager channels_last"]["ms"]["samples"] == 2
    assert section["ratios"] == {}
    assert "WRONG, not timed: broken" in run.network_table(section)


def test_every_variant_of_the_cpu_agrees_with_float64_and_stands_on_the_roofline() -> None:
    setting = Setting(TRAINING, "bf16", 1, 32, 4)
    section = network_run.measure(setting, CEILINGS, budget=0, rounds=1, compile=False)
    assert {"eager NCHW", "fast NCHW", "fast channels_last"} <= section["variants"].keys()
    for name, row in section["variants"].items():
        assert row["wrong"] is False, name
        assert row["roofline_percent"] > 0
        assert row["binds"] in ("memory", "arithmetic")
        assert row["kept_for_backward_bytes"] > 0
    assert section["missing"]["torch.compile default"] == "left out"
    assert "eager NCHW" in section["ratios"]["fast NCHW"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_frozen_networks_take_part_in_inference(precision: str) -> None:
    setting = Setting(INFERENCE, precision, 1, 32, 4)
    names = [variant.name for variant in networks.choose(setting).variants]
    assert "freeze" in names
    assert "freeze" not in [v.name for v in networks.choose(SMALL).variants]
    variants = [v for v in networks.VARIANTS if v.name in ("eager channels_last", "freeze")]
    section = network_run.measure(setting, CEILINGS, budget=0, rounds=1, variants=variants)
    row = section["variants"]["freeze"]
    assert row["wrong"] is False
    assert row["note"].startswith("rf.freeze took")
    assert row["first_call_seconds"] > 0
    assert "freeze over eager channels_last" in run.network_table(section)


def test_a_missing_peer_and_one_that_fails_are_announced_by_name() -> None:
    def fails(_: Setting) -> Network:
        raise RuntimeError("no such operator\nmore")

    absent = Variant("Absent Runtime", fails, requires=("no_such_package",))
    failing = Variant("Failing Runtime", fails)
    variants = [EAGER, absent, failing]
    section = network_run.measure(SMALL, CEILINGS, budget=0, rounds=1, variants=variants)
    text = run.network_table(section)
    assert "missing: Absent Runtime: no_such_package not installed" in text
    assert "missing: Failing Runtime: failed: RuntimeError: no such operator" in text
    # Without an eager row only the absolute bound is left.
    alone = Variant("ours", networks.fast(NHWC), ours=True)
    section = network_run.measure(SMALL, CEILINGS, budget=0, rounds=1, variants=[alone, failing])
    assert not section["variants"]["ours"]["wrong"]
    ours = Variant("ours", fails, ours=True)
    with pytest.raises(RuntimeError, match="no such operator"):
        network_run.measure(SMALL, CEILINGS, budget=0, rounds=1, variants=[ours])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_foreign_runtimes_take_part_and_say_their_precision(precision: str) -> None:
    setting = Setting(INFERENCE, precision, 1, 32, 4)
    peers = [v for v in networks.VARIANTS if v.name in ("ONNX Runtime", "OpenVINO")]
    section = network_run.measure(setting, CEILINGS, budget=0, rounds=1, variants=[EAGER, *peers])
    for peer in peers:
        if not peer.joins(setting):
            continue
        if peer.missing():
            assert section["missing"][peer.name] == peer.missing()
            continue
        row = section["variants"][peer.name]
        assert not row["wrong"], row
        assert "float32" in row["note"] or "computes in" in row["note"]


def test_the_command_writes_what_it_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        run, "SIZES", {("cpu", phase): (1, 32, 4) for phase in (TRAINING, INFERENCE)}
    )
    known = dict.fromkeys(run.PRECISIONS, CEILINGS)
    monkeypatch.setattr(run, "measured_ceilings", lambda device: known)
    out = tmp_path / "deep" / "cpu.json"
    some = ["--only", "training", "inference", "--precisions", "bf16", "--rounds", "1"]
    threads = ["--threads", str(torch.get_num_threads()), "--device", "cpu"]
    assert main(["run", *some, *threads, "--no-compile", "--out", str(out)]) == 0
    results = json.loads(out.read_text())
    assert set(results["seconds"]) == {"training", "inference", "classes_ms"}
    assert results["import_seconds"]["resunet_fast"] > 0
    assert results["inference"]["bf16"]["variants"]["freeze"]["ms"]["samples"] == 1
    assert "convolution" in results["classes_ms"]["fast channels_last"]
    printed = capsys.readouterr().out
    assert "freeze over eager channels_last" in printed
    assert "import beyond torch" in printed


def test_operator_rows_are_checked_before_they_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Benchmark:
        def __init__(self) -> None:
            self.extra_info: dict[str, Any] = {}

        def pedantic(self, *_: Any, **__: Any) -> None:
            raise AssertionError("it was timed")

    case = next(c for c in operators.cases(1, 16, 4, [0]) if c.operator == "upsample")
    operator = OPERATORS["upsample"]
    right = operator.implementations["reference"].compute
    wrong = Implementation("cpu", lambda *args: right(*args) * 1.01)
    monkeypatch.setitem(operator.implementations, "cpu", wrong)
    row = (Benchmark(), case, "cpu", "forward", torch.float32)
    with pytest.raises(pytest.fail.Exception, match="WRONG, not timed"):
        test_operators.test_operator(*row)
    monkeypatch.undo()
    with pytest.raises(AssertionError, match="it was timed"):
        test_operators.test_operator(Benchmark(), *row[1:])


NETWORK_ROWS = [
    pytest.param(case, direction, id=f"{case.id}-{direction}".replace(" ", "-"))
    for case in operators.cases(1, 16, 4, [0])
    for direction in operators.DIRECTIONS
    if direction == "forward" or differentiable(case)
]


@pytest.mark.parametrize(("case", "direction"), NETWORK_ROWS)
def test_operator_cases_of_the_network_are_right(case: Any, direction: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for backend, reasons in operators.implementations(case, dtype, "cpu").items():
            if not reasons:
                prepared = operators.Prepared(case, backend, direction, dtype)
                assert prepared.wrong() == ""
                assert prepared.work().nbytes > 0
