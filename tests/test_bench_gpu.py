"""The parts of `make gpu`: nothing is lost to a wrong, crashing, hanging or late job; dry runs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from bench.command import main
from bench.gpu import convolutions, runner, sanitize, tiles
from bench.gpu.child import attempt
from bench.gpu.job import Job
from resunet_fast import tuning
from resunet_fast.testing import offline
from resunet_fast.testing.checks import seeds_of

ROOT = Path(__file__).resolve().parents[1]


def part(out: Path, module: str, resume: Path | None = None) -> runner.Part:
    return runner.Part("fake", f"tests.{module}", out, resume or out, dry=True)


def statuses(out: Path) -> dict[str, str]:
    lines = (out / "fake.jsonl").read_text(encoding="utf-8").splitlines()
    return {record["job"]: record["status"] for record in map(json.loads, lines)}


def test_every_way_to_end_costs_one_job(tmp_path: Path, capsys: Any) -> None:
    assert runner.run_part(part(tmp_path, "fake_part"), deadline=120) == 1
    assert statuses(tmp_path) == {
        "machine": "OK",
        "right": "OK",
        "wrong": "WRONG",
        "crash": "CRASH",
        "failing": "FAILED",
        "hang": "HANG",
        "unavailable": "UNAVAILABLE",
        "on a GPU": "NEEDS GPU",
    }
    shown = capsys.readouterr().out
    assert "7 records" in shown
    assert shown.strip().endswith("fake: FAILED")
    assert "WRONG       wrong: off by 0.5" in shown
    assert "FAILED      failing: ValueError: no such shape" in shown
    assert (tmp_path / "fake.txt").read_text().strip() == shown.split("\n\n")[-1].strip()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_part_cut_short_goes_on_where_it_stopped(tmp_path: Path) -> None:
    module = "fake_part_quick"
    assert runner.run_part(part(tmp_path, module), deadline=0) == 3
    assert "INCOMPLETE" in (tmp_path / "fake.txt").read_text()
    assert set(statuses(tmp_path).values()) == {"OK", "NO TIME"}
    # One job is done, and the machine goes away in the middle of a line.
    part(tmp_path, module).add({"job": "first", "status": "OK", "stamp": 1})
    with (tmp_path / "fake.jsonl").open("a") as file:
        file.write('{"part": "fake", "job": "second", "stamp"')
    again = tmp_path / "again"
    assert runner.run_part(part(again, module, resume=tmp_path), deadline=120) == 0
    records = [json.loads(line) for line in (again / "fake.jsonl").read_text().splitlines()]
    assert [r["job"] for r in records] == ["machine", "first", "second"]
    assert records[1]["stamp"] == 1
    assert records[2]["stamp"] > 1
    # Nothing is left to do: no process is started.
    assert runner.run_part(part(again, module), deadline=0) == 0


def test_records_of_other_sources_are_not_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part(tmp_path, "fake_part_quick").add({"job": "first", "status": "OK"})
    assert part(tmp_path, "fake_part_quick").left() == ["second"]
    monkeypatch.setattr(runner, "sources", lambda: "another")
    assert part(tmp_path, "fake_part_quick").left() == ["first", "second"]


def test_the_deadline_ends_a_job_that_is_running(tmp_path: Path) -> None:
    start = time.monotonic()
    assert runner.run_part(part(tmp_path, "fake_part_slow"), deadline=8) == 3
    assert time.monotonic() - start < 30
    found = statuses(tmp_path)
    assert found["second"] == found["third"] == "NO TIME"
    assert "INCOMPLETE" in (tmp_path / "fake.txt").read_text()


def test_a_dry_run_of_a_gpu_job_is_collected_only() -> None:
    def fails() -> dict[str, Any]:
        raise RuntimeError

    job = Job("large", fails, needs_gpu=True)
    assert attempt(job, dry=True)["status"] == "NEEDS GPU"
    assert attempt(job, dry=False)["status"] == "FAILED"


@pytest.mark.skipif(torch.cuda.is_available(), reason="it says what a machine without a GPU does")
def test_without_a_gpu_the_command_says_so(capsys: Any) -> None:
    assert main(["gpu", "check"]) == 2
    assert "no NVIDIA GPU" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("status", "output", "error", "match"),
    [
        (86, "========= Invalid __global__ read of size 4\n", AssertionError, "Invalid __global__"),
        (86, "========= ERROR SUMMARY: 2 errors\n3 cases ran on cuda", AssertionError, "2 errors"),
        (1, "========= Device not supported\n", sanitize.UnavailableError, "Device not supported"),
        (127, "", sanitize.UnavailableError, "exit 127"),
    ],
)
def test_what_the_sanitizer_says(
    status: int, output: str, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        sanitize.verdict(status, output)


def test_a_clean_sanitizer_passes() -> None:
    said = "3 cases ran on cuda\n========= ERROR SUMMARY: 0 errors\n"
    assert sanitize.verdict(0, said) == {"note": "ERROR SUMMARY: 0 errors"}


@pytest.mark.slow
def test_tiles_that_are_tried_compile_and_do_not_spill() -> None:
    results = offline.run(["tests.tile_builds"], (90,))
    assert len(results) == 3 * len(tiles.NARROW + tiles.WIDE) + len(tiles.POINTER)
    assert offline.problems(results) == []


@pytest.mark.parametrize(("refused", "status"), [(True, "UNAVAILABLE"), (False, "FAILED")])
def test_only_a_graph_that_cudnn_refuses_is_unavailable(
    refused: bool, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NotSupportedError(Exception):
        pass

    cudnn = mock.MagicMock(__spec__=ModuleSpec("cudnn", None))
    cudnn.cudnnGraphNotSupportedError = NotSupportedError
    error = (NotSupportedError if refused else TypeError)("no engine")
    cudnn.pygraph.return_value.build.side_effect = error
    monkeypatch.setitem(sys.modules, "cudnn", cudnn)
    o = convolutions.operands((1, 4, 4, 8, 8, 3), torch.bfloat16, "cpu")
    records = [way for way in convolutions.ways(o, "relu", dry=False) if isinstance(way, dict)]
    found = next(r for r in records if r["implementation"] == "cudnn-frontend")
    assert found["status"] == status
    assert "no engine" in found["note"]
    assert convolutions.judged([found])["status"] == ("OK" if refused else "FAILED")


def test_tiles_are_tried_in_place_of_the_committed_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    o = convolutions.operands((2, 16, 16, 8, 64, 3), torch.bfloat16, "cpu")
    committed = tuning.load("sm_90")
    for operation, filters, channels in (("fprop", 64, 8), ("dgrad", 8, 64)):
        operator, _ = convolutions.through_registry(o, operation)
        shape = (2, 16, 16, channels, filters, (3, 3), (1, 1), "bfloat16", 2)
        problem = tuning.ConvProblem(operator, *shape)
        for config in tiles.alternatives(64, 8, operation):
            found = []
            read = tiles.trying(
                lambda found=found, problem=problem: found.append(tuning.lookup(problem, (9, 0))),
                operator,
                o,
                config,
            )
            read()
            assert found[0].config == config
    assert tuning.load("sm_90") is committed
    assert tiles.alternatives(64, 8, "wgrad") == ()
    assert all(config.family == "pointer" for config in tiles.alternatives(64, 3, "fprop"))


def test_questions_draw_the_same_numbers_whatever_the_default_device() -> None:
    outputs = (torch.zeros(2, 3, requires_grad=True),)
    (expected,) = seeds_of(outputs)
    with torch.device("meta"):
        (found,) = seeds_of(outputs)
    assert expected is not None
    assert found is not None
    assert torch.equal(found, expected)


def dry(name: str, out: Path) -> dict[str, str]:
    """Run one part without a GPU, as `make gpu PART=... DRY=1` does."""
    command = [sys.executable, "-m", "bench", "gpu", name, "--dry", "--out", str(out)]
    command += ["--resume", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert done.stdout.strip().endswith(f"{name}: OK")
    lines = (out / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return {record["job"]: record["status"] for record in map(json.loads, lines)}


def test_dry_run_of_sanitize(tmp_path: Path) -> None:
    assert "memcheck: cpu" in dry("sanitize", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "some"),
    [
        ("check", ["cpu: determinism", "cpu: conv_bn_act float32 against float64"]),
        ("shapes", ["ceilings", "conv 1x32x32 3->16 wgrad", "bn_act-bn-relu 16x32 backward"]),
        ("nets", ["training: fast channels_last", "kernel classes: fast channels_last"]),
    ],
)
def test_dry_run(name: str, some: list[str], tmp_path: Path) -> None:
    found = dry(name, tmp_path)
    assert {found[job] for job in some} == {"OK"}
    assert set(found.values()) <= {"OK", "NEEDS GPU", "UNAVAILABLE"}
