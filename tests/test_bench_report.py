"""From results to tables, plots and the tuning table; comparing two runs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from bench import compare, gpu_report, plots, predictions, run
from bench.command import main
from resunet_fast import tuning

ROOT = Path(__file__).resolve().parents[1]


def timing(median: float, spread: float = 0.02) -> dict[str, Any]:
    return {
        "median": median,
        "p20": median * (1 - spread),
        "p80": median * (1 + spread),
        "samples": 9,
    }


def row(median: float, *, ours: bool = False, kept: int | None = None, **more: Any) -> Any:
    return {
        "ours": ours,
        "note": "",
        "error": {"logits": 1e-6},
        "build_seconds": 0.1,
        "first_call_seconds": 0.5,
        "kept_for_backward_bytes": kept,
        "wrong": False,
        "ms": timing(median),
        "flops": 1e9,
        "bytes": 1e6,
        "roofline_percent": 51.0,
        "binds": "arithmetic",
        **more,
    }


def section(phase: str, precision: str) -> dict[str, Any]:
    setting = {"phase": phase, "precision": precision, "batch": 2, "size": 128, "width": 64}
    wrong = row(1.0)
    wrong.update(wrong=True)
    del wrong["ms"]
    kept = 200 << 20 if phase == "training" else None
    ratios = {"fast channels_last": {"eager channels_last": timing(1.23)}}
    if phase == "inference":
        ratios["freeze"] = {"eager channels_last": timing(2.34)}
    return {
        "setting": {**setting, "device": "cpu"},
        "variants": {
            "eager channels_last": row(1234.5, kept=kept),
            "OpenVINO": row(900.0, note="computes in bf16; left to itself it would in bf16"),
            "fast channels_last": row(1000.0, ours=True, kept=kept),
            "broken": wrong,
        },
        "ratios": ratios,
        "missing": {"ONNX Runtime": "onnxruntime not installed"},
    }


MACHINE = {
    "cpu": "Some CPU",
    "cpu_features": ["avx2"],
    "threads": 2,
    "gpu": [],
    "python": "3.12.3",
}
HEAD = {
    "date": "2026-11-25T18:00:00+00:00",
    "commit": "0123456789ab",
    "machine": MACHINE,
    "versions": {"torch": "2.13.0", "openvino": None},
}


def launches(way: str) -> dict[str, Any]:
    ours = {"ms": timing(0.008), "ratio": timing(1.25)}
    return {"bn_act, grad: eager": {"ms": timing(0.01)}, f"bn_act, grad: {way}": ours}


@pytest.fixture
def results() -> dict[str, Any]:
    return {
        **HEAD,
        "ceilings": {
            p: {
                "bytes_per_second": 2e10,
                "flops_per_second": 2.5e11,
                "dtype": d,
                "source": "measured",
            }
            for p, d in (("fp32", "float32"), ("bf16", "bfloat16"))
        },
        "import_seconds": {"torch": 1.0, "resunet_fast": 0.04},
        "operators": {"bn_act-forward-cpu": row(3.0, backend="cpu", direction="forward")},
        "launch": launches("cpu"),
        "training": {p: section("training", p) for p in ("fp32", "bf16")},
        "inference": {p: section("inference", p) for p in ("fp32", "bf16")},
        "classes_ms": {"eager": {"convolution": 9.0, "other": 1.0}, "fast": {"convolution": 8.0}},
    }


def gpu_records() -> dict[str, list[dict[str, Any]]]:
    machine = {**MACHINE, "gpu": ["NVIDIA H200"]}
    head = {**HEAD, "machine": machine, "job": "machine", "status": "OK", "architecture": "sm_90"}
    fields = {"images": 16, "height": 512, "width": 512, "channels": 64, "filters": 128}
    tiles = {"family": "tma", "filters": 64, "rows": 16, "columns": 16, "channels": 64}
    tiles.update(warps=4, stages=2)

    def measured(name: str, ms: float, **more: Any) -> dict[str, Any]:
        share = {"roofline_percent": 60.0, "binds": "memory"}
        return {"implementation": name, "status": "OK", "ms": timing(ms), **share, **more}

    def convolution(operation: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
        what = {"job": f"conv {operation}", "operation": operation, "kernel": 3, "rows": rows}
        return {**what, **fields, "dtype": "bfloat16", "status": "OK"}

    def network(phase: str, variant: str, ms: float, **more: Any) -> dict[str, Any]:
        variants = {"eager channels_last": row(20.0), variant: row(ms, **more)}
        return {"job": variant, "phase": phase, "variant": variant, "variants": variants} | {
            "status": "OK"
        }

    peak = {"peak": {"allocated": 3 << 30, "reserved": 4 << 30}}
    return {
        "shapes": [
            head,
            {
                "job": "ceilings",
                "status": "OK",
                "ceilings": {"bytes_per_second": 4e12, "flops_per_second": 7e14},
            },
            {"job": "launch", "status": "OK", "launch": launches("triton")},
            convolution(
                "fprop",
                [
                    measured("torch (cuDNN)", 0.9),
                    measured("cudnn", 0.8),
                    measured("triton", 0.7),
                    measured("triton tma 64x16x16x64 w4 s2", 0.6, config=tiles),
                    {"implementation": "cuda", "status": "UNAVAILABLE", "note": "no kernel"},
                ],
            ),
            convolution("dgrad", [measured("cudnn", 1.0), measured("triton", 1.5)]),
            convolution("wgrad", [measured("cudnn", 2.0), measured("triton", 1.0)]),
            convolution("add_relu", [measured("cudnn", 0.5)]),
        ],
        "nets": [
            head,
            network("training", "fast channels_last", 40.0, ours=True, **peak),
            network("training", "torch.compile max-autotune", 50.0),
            {"job": "classes", "status": "OK", "variant": "fast", "classes_ms": {"pool": 1.0}},
        ],
        "check": [
            head,
            {"job": "cuda: determinism", "status": "OK"},
            {"job": "triton: no leak", "status": "WRONG", "note": "8 bytes more"},
        ],
    }


def documents(folder: Path) -> tuple[Path, Path]:
    readme, docs = folder / "README.md", folder / "performance.md"
    readme.write_text("before\n<!-- begin speed -->\nold\n<!-- end speed -->\nafter\n")
    blocks = "".join(
        f"<!-- begin {b} -->\n<!-- end {b} -->\n" for b in ("cpu", "gpu", "predictions")
    )
    docs.write_text(f"title\n{blocks}")
    return readme, docs


def arguments(folder: Path) -> list[str]:
    readme, docs = documents(folder)
    paths = {"results": folder / "cpu.json", "gpu": folder / "gpu", "readme": readme, "docs": docs}
    return ["report", *(part for name, path in paths.items() for part in (f"--{name}", str(path)))]


def test_report_renders_tables_and_plots_with_their_provenance(
    tmp_path: Path, results: dict[str, Any]
) -> None:
    (tmp_path / "cpu.json").write_text(json.dumps(results))
    assert main(arguments(tmp_path)) == 0
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("before\n")
    assert readme.endswith("after\n")
    assert "old" not in readme
    row_ = "| fast channels_last | 1,000 ms [980, 1,020] | 51% (arithmetic) | 200 MiB |"
    assert row_ in readme
    assert "| broken | WRONG, not timed |" in readme
    ratio = "| fast channels_last / eager channels_last | 1.23x [1.21, 1.25] | 1.23x [1.21, 1.25] |"
    assert readme.count(ratio) == 1  # of training; docs/performance.md has that of inference too
    assert "| freeze / eager channels_last | 2.34x [2.29, 2.39] |" in readme
    assert "- First call (fp32): eager channels_last 0.50 s, OpenVINO 0.50 s" in readme
    assert "takes 0.04 s beyond torch's own" in readme
    assert "OpenVINO (fp32): computes in bf16; left to itself it would in bf16." in readme
    assert "Missing: ONNX Runtime (bf16): onnxruntime not installed." in readme
    assert "NVIDIA" not in readme
    assert "Some CPU (avx2; no AMX), 2 threads, Python 3.12.3, torch 2.13.0, 2026-11-25" in readme
    assert "commit 0123456789ab" in readme
    docs = (tmp_path / "performance.md").read_text()
    assert docs.count(ratio) == 2
    assert "copy 20.0 GB/s, matrix product 250 GFLOP/s" in docs
    assert "Not yet run on a GPU. `make gpu PART=check`" in docs
    assert "| convolution | 9.00 | 8.00 |" in docs
    assert "| bn_act, grad: eager | 10.0 us [9.8, 10.2] |  |" in docs
    for name in ("training_fp32_cpu.svg", "memory_bf16_cpu.svg", "operators_cpu.svg"):
        assert f"]({name})" in docs
        assert (tmp_path / name).read_text().startswith("<?xml")
    drawn = (tmp_path / "training_fp32_cpu.svg").read_bytes()
    assert main(arguments(tmp_path)) == 0
    assert (tmp_path / "training_fp32_cpu.svg").read_bytes() == drawn


def test_readme_shows_the_networks_of_a_gpu_once_there_are_some(
    tmp_path: Path, results: dict[str, Any]
) -> None:
    (tmp_path / "cpu.json").write_text(json.dumps(results))
    (tmp_path / "gpu").mkdir()
    lines = map(json.dumps, gpu_records()["nets"])
    (tmp_path / "gpu" / "nets.jsonl").write_text("\n".join(lines) + "\n")
    assert main(arguments(tmp_path)) == 0
    readme = (tmp_path / "README.md").read_text()
    assert "| training: fast channels_last | 40.0 ms" in readme
    assert "NVIDIA H200" in readme


def test_report_without_results_leaves_the_measured_blocks_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(tmp_path)) == 0
    assert "old" in (tmp_path / "README.md").read_text()
    assert "`make bench` writes it" in capsys.readouterr().out
    assert "790 TFLOP/s" in (tmp_path / "performance.md").read_text()


def test_report_needs_its_marks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = arguments(tmp_path)
    (tmp_path / "performance.md").write_text("no marks\n")
    assert main(command) == 2
    assert "expected the marks '<!-- begin predictions -->'" in capsys.readouterr().out


def test_the_committed_documents_are_what_the_committed_results_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)  # results are named by their path from here
    committed = {name: Path(name).read_text() for name in ("README.md", "docs/performance.md")}
    copies = {name: tmp_path / Path(name).name for name in committed}
    for name, path in copies.items():
        path.write_text(committed[name])
    readme, docs = map(str, copies.values())
    assert main(["report", "--readme", readme, "--docs", docs]) == 0
    assert {name: path.read_text() for name, path in copies.items()} == committed
    assert predictions.text() in committed["docs/performance.md"]
    if not any((ROOT / "bench/results/gpu").glob("*.jsonl")):
        assert gpu_report.NOT_YET in committed["docs/performance.md"]


def test_report_of_a_gpu(tmp_path: Path) -> None:
    for name, records in gpu_records().items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, records)) + "\n")
    text = gpu_report.text(tmp_path, tmp_path)
    assert "NVIDIA H200" in text
    assert "copy 4.00 TB/s, matrix product 700 TFLOP/s" in text
    assert "| bn_act, grad: triton | 8.0 us [7.8, 8.2] | 1.25x [1.23, 1.27] |" in text
    # Triton's column has its fastest tiles.
    assert "| conv fprop | 0.900 ms, 60% (memory) | 0.800 ms, 60% (memory) | 0.600 ms" in text
    assert (
        "| training: fast channels_last | 40.0 ms [39.2, 40.8] | 0.50x | 1.25x | 3,072 MiB" in text
    )
    assert "| pool | 1.00 |" in text
    assert "- WRONG: triton: no leak: 8 bytes more" in text
    assert "Not yet run on a GPU: `make gpu PART=sanitize`." in text
    drawn = ("convolutions_gpu.svg", "training_gpu.svg", "memory_training_gpu.svg")
    assert all((tmp_path / name).exists() for name in (*drawn, "classes_gpu.svg"))


def test_tune_needs_measurements(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = ["--results", str(tmp_path / "shapes.jsonl"), "--out", str(tmp_path)]
    assert main(["tune", *missing]) == 2
    assert "`make gpu PART=shapes` writes it on a GPU" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_is_not_reported_as_a_measurement(tmp_path: Path) -> None:
    (tmp_path / "shapes.jsonl").write_text(json.dumps({**HEAD, "job": "machine"}) + "\n")
    assert gpu_report.text(tmp_path, tmp_path) == gpu_report.NOT_YET
    status = main(["tune", "--results", str(tmp_path / "shapes.jsonl"), "--out", str(tmp_path)])
    assert status == 2


def test_tune_writes_the_fastest_of_each(tmp_path: Path) -> None:
    records = gpu_records()["shapes"]
    path = tmp_path / "shapes.jsonl"
    path.write_text("\n".join(map(json.dumps, records)) + "\n")
    assert main(["tune", "--results", str(path), "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "sm_90.json").read_text())
    parsed = tuning.table.parse(content)  # what the package reads
    assert {each.fastest for each in parsed.measurements.values()} == {"cudnn", "triton"}
    assert content["gpu"] == "NVIDIA H200"
    assert (content["commit"], content["date"]) == ("0123456789ab", "2026-11-25")
    lines = {line["operator"]: line for line in content["measurements"]}
    forward = lines["conv2d"]
    assert forward["microseconds"] == {"cudnn": 800.0, "triton": 600.0}
    assert forward["config"]["family"] == "tma"
    assert (forward["channels"], forward["filters"]) == (64, 128)
    assert (forward["positions"], forward["kernel"]) == (16 * 512 * 512, [3, 3])
    back = lines["conv2d_backward"]
    assert back["microseconds"] == {"cudnn": 3000.0, "triton": 2500.0}
    assert (back["channels"], back["filters"], back["config"]) == (128, 64, None)
    assert lines["conv_bias_act"]["microseconds"] == {"cudnn": 500.0}
    assert set(lines) == {
        "conv2d",
        "conv_bn_act",
        "bn_act_conv",
        "conv_bias_act",
        "conv2d_backward",
    }


def test_compare_names_what_got_slower_beyond_noise(
    tmp_path: Path, results: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps(results))
    changed = copy.deepcopy(results)
    changed["training"]["fp32"]["variants"]["fast channels_last"]["ms"] = timing(1100.0)
    # Slower, within the spread; faster; slower by less than anyone can tell.
    changed["training"]["bf16"]["variants"]["fast channels_last"]["ms"] = timing(1030.0)
    changed["inference"]["fp32"]["variants"]["fast channels_last"]["ms"] = timing(500.0)
    changed["inference"]["bf16"]["variants"]["fast channels_last"]["ms"] = timing(1010.0, 0.0001)
    del changed["operators"]
    new.write_text(json.dumps(changed))
    assert main(["compare", str(old), str(new)]) == 1
    shown = capsys.readouterr().out
    slower = [line for line in shown.splitlines() if line.startswith("slower beyond noise")]
    assert slower == ["slower beyond noise: training / fp32 / fast channels_last"]
    assert "2.00x [1.92, 2.08]" in shown
    assert "only in the old file: operators / bn_act-forward-cpu" in shown
    assert main(["compare", str(old), str(old)]) == 0


def test_compare_reads_the_records_of_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "nets.jsonl"
    path.write_text("\n".join(map(json.dumps, gpu_records()["nets"])) + "\n")
    _, slower = compare.compare(compare.load(path), compare.load(path))
    assert slower == []
    assert "fast channels_last / fast channels_last" in dict(compare.timings(compare.load(path)))
    path.write_text("\n".join(map(json.dumps, gpu_records()["shapes"])) + "\n")
    assert dict(compare.timings(compare.load(path)))["conv fprop / cudnn"]["median"] == 0.8


def test_the_terminal_shows_what_was_not_measured(results: dict[str, Any]) -> None:
    text = run.text(results)
    assert "apex: not measured" in text
    assert "TensorRT: not measured" in text
    assert "WRONG, not timed: broken" in text
    assert "training fp32, 2x3x128x128, width 64, cpu" in text


def test_plots_have_one_bar_per_row(tmp_path: Path) -> None:
    rows = {"slow": (2.0, 1.5, 2.5, False), "fast": (1.0, 0.9, 1.1, True)}
    plots.bars(tmp_path / "bars.svg", "two", "ms", rows)
    drawn = (tmp_path / "bars.svg").read_text()
    assert "slow" in drawn
    assert "fast" in drawn
    assert plots.OURS in drawn
